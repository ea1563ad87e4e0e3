"""What of the package's metadata depends on where it is built: its addresses, and the index' page.

The repository's address is what `BWLENS_REPOSITORY` says, or on GitHub what a workflow is told
there (`GITHUB_SERVER_URL`, `GITHUB_REPOSITORY`). Built elsewhere, the package names no address.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class LongDescription(MetadataHookInterface):
    """README.md for readers without a checkout, and addresses where one is known."""

    def update(self, metadata: dict[str, Any]) -> None:
        """An index knows no paths in the repository, and installs by name."""
        server, name = (os.environ.get(f"GITHUB_{of}", "") for of in ("SERVER_URL", "REPOSITORY"))
        on_github = f"{server}/{name}" if server and name else ""
        address = os.environ.get("BWLENS_REPOSITORY", on_github).rstrip("/")
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = text.replace('pip install ".', 'pip install "bwlens')
        if address:
            metadata["urls"] = {"Source": address, "Issues": f"{address}/issues"}
            # Not every page follows its reader's colours: the light one.
            text = re.sub(r"<picture>.*?(<img .*?>).*?</picture>", r"\1", text, flags=re.DOTALL)
            ref = os.environ.get("GITHUB_REF_NAME", "main")
            text = re.sub(r'src="(?!https?:)', f'src="{address}/raw/{ref}/', text)
            text = re.sub(r"\]\((?!https?:)([^)]*)\)", rf"]({address}/blob/{ref}/\1)", text)
        else:
            text = re.sub(r"<picture>.*?</picture>\s*", "", text, flags=re.DOTALL)
            text = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
