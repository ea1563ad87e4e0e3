"""Named tensors in files, one read at a time: safetensors (sharded or not), torch's .bin, a model.

`Tensors` is a mapping that reads a tensor when it is asked for, so that two checkpoints can be
compared in the memory of one matrix.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and safetensors leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class Tensors(Mapping[str, Tensor]):
    """The tensors of some files by name, each read when it is asked for.

    Raises:
        ValueError: A file is broken.
    """

    def __init__(self, files: list[Path]) -> None:
        self._where: dict[str, Path] = {}
        self._mapped: dict[Path, dict[str, Tensor]] = {}
        for file in files:
            if file.suffix != ".safetensors":
                self._mapped[file] = _torch_file(file)
            names = self._mapped.get(file) or _names(file)
            self._where |= dict.fromkeys(names, file)

    def __getitem__(self, name: str) -> Tensor:
        path = self._where[name]
        if path in self._mapped:
            return self._mapped[path][name]
        file: Any
        with _opened(path) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def tensors_of(path: Path) -> Tensors:
    """The tensors of a safetensors or .bin file, or of a checkpoint's folder.

    Raises:
        ValueError: There are none, or a file is broken.
    """
    if path.is_file():
        return Tensors([path])
    for ending in ("*.safetensors", "*.bin"):
        files = sorted(p for p in path.glob(ending) if not p.name.startswith(("adapter_", "train")))
        if files:
            return Tensors(files)
    raise ValueError(
        f"{str(path)!r} holds no weights: expected .safetensors or .bin files of a checkpoint, or"
        f" an adapter (adapter_config.json)"
    )


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    file: Any  # safetensors has no types of its own
    with _opened(path) as file:
        return file.metadata() or {}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}") from error


def _names(path: Path) -> list[str]:
    file: Any
    with _opened(path) as file:
        return list(file.keys())


def _torch_file(path: Path) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(f"{str(path)!r} is no file of tensors: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{str(path)!r} holds a {type(state).__name__}, not named tensors")
    return {str(name): t for name, t in state.items() if isinstance(t, Tensor)}
