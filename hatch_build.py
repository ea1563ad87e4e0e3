"""What of the package's metadata depends on where it is built: its addresses, and PyPI's page.

The repository's address is what `BWLENS_REPOSITORY` says, or on GitHub what a workflow is told
there (`GITHUB_SERVER_URL`, `GITHUB_REPOSITORY`). Built elsewhere, the package names no address.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class AddressesAndDescription(MetadataHookInterface):
    """README.md as the long description, and `project.urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """PyPI shows neither pictures nor pages by a path within the repository."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = long_description(text, repository(), os.environ.get("GITHUB_REF_NAME", "main"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        if address := repository():
            metadata["urls"] = {
                "Source": address,
                "Documentation": f"{address}/blob/main/docs/index.md",
                "Changes": f"{address}/blob/main/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }


def repository() -> str:
    """The repository's address, or "" where none is known."""
    server, name = (os.environ.get(f"GITHUB_{of}", "") for of in ("SERVER_URL", "REPOSITORY"))
    on_github = f"{server}/{name}" if server and name else ""
    return os.environ.get("BWLENS_REPOSITORY", on_github).rstrip("/")


def long_description(readme: str, address: str, ref: str) -> str:
    """A README for readers who have no checkout.

    Relative pictures and links become addresses of the repository; without one, pictures and their
    captions go, and of links the words stay. Of two pictures the light one is taken, as not every
    page follows its reader's colours.
    """
    text = readme.replace('pip install ".[gguf]"', 'pip install "bwlens[gguf]"')
    text = text.replace("In a checkout of this repository; after", "After")
    if not address:
        text = re.sub(r"<picture>.*?</picture>\s*(\*[^*]*\*\s*)?", "", text, flags=re.DOTALL)
        return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    text = re.sub(r"<picture>.*?(<img .*?>).*?</picture>", r"\1", text, flags=re.DOTALL)
    text = re.sub(r'src="(?!https?:)', f'src="{address}/raw/{ref}/', text)
    return re.sub(r"\]\((?!https?:)([^)]*)\)", rf"]({address}/blob/{ref}/\1)", text)
