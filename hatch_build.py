"""The package's long description: README.md, without what works in the repository only."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class LongDescription(MetadataHookInterface):
    """PyPI shows no pictures and pages by a path in the repository, and installs by name."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Leave the pictures out, and of relative links all but their words."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = re.sub(r"<picture>.*?</picture>\s*", "", text, flags=re.DOTALL)
        text = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
        text = text.replace('pip install ".', 'pip install "bwlens')
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
