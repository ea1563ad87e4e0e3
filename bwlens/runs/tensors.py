"""Files of named tensors that say what they hold: safetensors with a format and a version."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bwlens.runs.parts import whole
from bwlens.runs.paths import writable


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    form: str,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write tensors bit for bit, and a few words about them; replaced whole or not at all.

    Raises:
        ValueError: There is no such folder, or it may not be written to.
    """
    path = writable(path)
    # Copies, because the file wants every tensor contiguous and in memory of its own.
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with whole(path) as draft:
        save_file(copies, draft, metadata={**_metadata(form), **(about or {})})
    return path


def read_tensors(
    path: str | os.PathLike[str],
    form: str,
    writer: str,
    device: str | torch.device = "cpu",
    only: Callable[[str], bool] = lambda name: True,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (those of some names `only`) and the words that `write_tensors` wrote.

    Raises:
        ValueError: Another kind of file, or of another version; `writer` says what writes these.
        FileNotFoundError: There is none.
    """
    expected = _metadata(form)
    try:
        file: Any  # safetensors has no types of its own
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata: dict[str, str] = file.metadata() or {}
            if {name: metadata.get(name) for name in expected} != expected:
                raise ValueError(
                    f"{path} is a safetensors file with metadata {metadata}; expected {expected},"
                    f" as {writer} of this version of bwlens writes"
                )
            names: list[str] = [name for name in file.keys() if only(name)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, metadata
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}); expected one written by {writer}"
        ) from error


def _metadata(form: str) -> dict[str, str]:
    return {"format": f"bwlens.{form}", "version": "1"}
