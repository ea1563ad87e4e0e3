"""Where key statistics are kept on disk, by model, text and settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bwlens.model.identity import fingerprint
from bwlens.model.protocol import LensModel


def cache_path(model: LensModel, documents: Sequence[str], settings: Sequence[Any]) -> Path:
    """The file of these statistics, whether it is there or not."""
    mark = hashlib.sha256(json.dumps(settings).encode())
    for document in documents:
        mark.update(hashlib.sha256(document.encode()).digest())
    return _room() / f"{fingerprint(model)}-{mark.hexdigest()[:16]}.safetensors"


def kept_files(model: LensModel) -> list[Path]:
    """The files of a model, told by its weights."""
    return sorted(_room().glob(f"{fingerprint(model)}-*.safetensors"))


def _room() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BWLENS_CACHE") or Path(base) / "bwlens") / "statistics"
