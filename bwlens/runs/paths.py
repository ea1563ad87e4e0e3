"""Paths that are written to, checked before the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def writable(path: str | os.PathLike[str], endings: Sequence[str] = ()) -> Path:
    """A path that can be written to, so that a mistake in it is met before the work.

    Raises:
        ValueError: Its ending is none of `endings`, its folder is not there, or it is a folder.
    """
    path = Path(path)
    if endings and path.suffix not in endings:
        *most, last = endings
        listed = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"{path.name!r}: name a file that ends in {listed}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise ValueError(f"cannot write {str(path)!r}: it is a folder; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {str(path)!r}: the folder may not be written to")
    return path


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """The same of a folder that may not be there yet.

    Raises:
        ValueError: It cannot be made there, or not be written to.
    """
    path = Path(path)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"cannot write into {str(path)!r}: {str(there)!r} is no folder to write in"
        )
    return path
