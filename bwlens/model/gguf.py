"""GGUF files as Hugging Face models: dequantised by transformers, with the tokenizer they hold."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bwlens.model.reasons import one_line

PLACING = ("device_map", "max_memory", "offload_folder")
"""Options of loading that say where weights go, which transformers takes."""


def installed(name: str) -> Path | None:
    """The GGUF file inside an installed distribution, by its own list of files; None without one.

    The distribution is not imported: what it imports itself need not be there.
    """
    try:
        files = distribution(name).files or ()
    except PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return next((path for path in paths if path.is_file()), None)


def read(
    file: Path, dtype: torch.dtype, device: Any, **placing: Any
) -> tuple[torch.nn.Module, Any]:
    """The model in a GGUF file, dequantised, in eval mode, and its tokenizer.

    The file is parsed once; transformers alone would do it three times.

    Raises:
        ImportError: The package gguf is not there.
        ValueError: The file is no GGUF file or is cut short, or transformers cannot read it.
    """
    if find_spec("gguf") is None:
        raise ImportError(f"reading {file.name} needs the package gguf: pip install 'bwlens[gguf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = _parsed(file)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with _parsed_once(reader):
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(
                **where, dtype=dtype, attn_implementation="eager", **placing
            )
        except (ValueError, KeyError, NotImplementedError, ImportError, OSError) as error:
            raise ValueError(
                f"transformers {version('transformers')} cannot read the GGUF file {str(file)!r},"
                f" of the architecture {_architecture(reader)!r}: {one_line(error)}"
            ) from error
    _forget_quantisation(model)
    if model.config.architectures is None:
        model.config.architectures = [type(model).__name__]
    return (model if device is None else model.to(device)).eval(), tokenizer


@contextmanager
def taken_as_it_is(tokenizer: Any) -> Generator[None, None, None]:
    """Keep TransformerLens from reading the tokenizer again, out of files beside the GGUF file.

    It does so to have a BOS added, unless one is; what `to_tokens` gives is the same either way.
    """
    before = dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs["add_bos_token"] = True
    try:
        yield
    finally:
        tokenizer.init_kwargs = before


def _parsed(file: Path) -> Any:
    """The file's header, and views of its tensors.

    Raises:
        ValueError: It is no whole GGUF file.
    """
    from gguf import GGUFReader

    with file.open("rb") as opened:
        start = opened.read(4)
    if start != b"GGUF":
        hint = ", but the pointer to one that `git lfs pull` fetches" if start == b"vers" else ""
        raise ValueError(f"{str(file)!r} is no GGUF file{hint}")

    class Reader(GGUFReader):
        """Its slices, of which a vocabulary takes a million, are plain arrays: half the time."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    try:
        return Reader(file)
    except Exception as error:  # a header that ends early fails wherever it is read
        size = file.stat().st_size
        raise ValueError(
            f"{str(file)!r} is no whole GGUF file: its {size:,} bytes end before its tensors do;"
            f" fetch it again ({one_line(error)})"
        ) from error


def _architecture(reader: Any) -> str:
    field = reader.fields.get("general.architecture")
    return "unknown" if field is None else str(field.contents())


@contextmanager
def _parsed_once(reader: Any) -> Generator[None, None, None]:
    """Give transformers this reader wherever it would parse the file anew, which takes long.

    The tensors' names, too, are made once, and not for each of the model's modules.
    """
    import gguf

    with (
        mock.patch.object(gguf, "GGUFReader", return_value=reader),
        mock.patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield


def _forget_quantisation(model: Any) -> None:
    """The weights are plain numbers now; marked as quantised they could not be saved or cast."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
