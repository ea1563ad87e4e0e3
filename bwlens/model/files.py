"""A model folder's files, looked at before anything is loaded: are they there, and whole?"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_JSON = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    *_INDEXES,
)


def ggufs_of(folder: Path) -> list[Path]:
    """The GGUF files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights in a format of Hugging Face's own."""
    return any(
        path.suffix in (".safetensors", ".bin") and path.name.startswith(("model", "pytorch_model"))
        for path in folder.iterdir()
    )


def check_folder(folder: Path) -> None:
    """Refuse a folder whose config is broken, or whose weights are missing or cut short.

    Raises:
        ValueError: Which file it is, and what is wrong with it.
    """
    config, *_ = [_read_json(folder / name) for name in _JSON if (folder / name).is_file()]
    _check_type(folder, config)
    if not has_weights(folder):
        raise ValueError(
            f"{str(folder)!r} has a config.json but no weights: there is no model.safetensors (or"
            f" pytorch_model.bin, or their parts)"
        )
    for name in _INDEXES:
        if (folder / name).is_file():
            _check_parts(folder, name)
    for path in sorted(folder.glob("model*.safetensors")):
        _check_safetensors(path)
    for path in sorted(folder.glob("pytorch_model*.bin")):
        _check_zip(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no valid JSON: {error}") from error


def _check_type(folder: Path, config: Any) -> None:
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as version

    path = str(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{path!r} names no model_type, so that nobody knows what it is")
    if kind not in CONFIG_MAPPING:  # plugins of TransformerLens, bwlens' own among them, bring some
        from transformer_lens.factories.architecture_adapter_factory import (
            ArchitectureAdapterFactory,
        )

        ArchitectureAdapterFactory.discover_entry_points()
    if kind not in CONFIG_MAPPING and "auto_map" not in config:
        raise ValueError(
            f"{path!r} names the model_type {kind!r}, which transformers {version} does not know;"
            f" is it misspelt, or newer than that?"
        )


def _check_parts(folder: Path, index: str) -> None:
    parts = _read_json(folder / index).get("weight_map", {}).values()
    if missing := sorted({part for part in parts if not (folder / part).is_file()}):
        raise ValueError(
            f"{str(folder)!r} lacks {len(missing)} of the {len(set(parts))} files that {index}"
            f" lists, such as {missing[0]}"
        )


def _check_safetensors(path: Path) -> None:
    """Its header says how long the file must be."""
    size = path.stat().st_size
    with path.open("rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            raise ValueError(f"{str(path)!r} is a pointer to the weights; fetch it: git lfs pull")
        length = int.from_bytes(start, "little")
        try:
            header = json.loads(opened.read(min(length, size)))
            ends = [
                value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"
            ]
        except (ValueError, AttributeError, KeyError, TypeError):
            ends = None
    whole = 8 + length + max(ends or [0])
    if ends is None or size != whole:
        more = f" of {whole:,}" if ends is not None else ""
        raise ValueError(
            f"{str(path)!r} is no whole safetensors file: {size:,} bytes{more}; fetch it again"
        )


def _check_zip(path: Path) -> None:
    """torch writes zip files, whose table of contents stands at their end; long ago it did not."""
    with path.open("rb") as opened:
        zipped = opened.read(2) == b"PK"
    if zipped and not is_zipfile(path):
        raise ValueError(f"{str(path)!r} is cut short; fetch it again")
