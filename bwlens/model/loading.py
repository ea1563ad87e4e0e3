"""Loading a model with its raw weights: the shipped demo model, a folder, or a name on the hub.

The lens reads the raw model. Folding LayerNorm into the weights, as TransformerLens' processing
does, leaves the loss and every delta alone but changes the x of W_in: `x_raw = w * x_folded + b`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from bwlens.demo import MODEL_DIR


def load_model(
    name: str | Path = "demo",
    *,
    kind: Literal["bridge", "hooked"] = "bridge",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    **options: Any,
) -> Any:
    """A TransformerLens model with raw weights, ready for the lens.

    Any TransformerBridge or HookedTransformer made in another way does as well; this only saves
    the steps that are easy to get wrong.

    Args:
        name: "demo" for the small model that ships with bwlens, a Hugging Face folder, or a name
            on the hub (needs a network, or a filled cache).
        kind: "bridge" for a TransformerBridge (TransformerLens 3.9-4); "hooked" for a
            HookedTransformer without weight processing (TransformerLens 3 only).
        dtype: The weights' dtype.
        device: Where the model goes; None lets TransformerLens choose.
        **options: Passed on to `TransformerBridge.boot_transformers` or
            `HookedTransformer.from_pretrained_no_processing`.

    Raises:
        ValueError: No such folder or hub name, or no such kind.
        NotImplementedError: A HookedTransformer was asked for on TransformerLens 4.

    Example:
        >>> load_model("demo").cfg.n_layers
        8
    """
    source = str(MODEL_DIR) if name == "demo" else str(name)
    is_folder = (Path(source) / "config.json").is_file()
    if not is_folder and (Path(source).is_dir() or source.startswith((".", "/", "~"))):
        raise ValueError(f"{source!r} is no Hugging Face model folder: it has no config.json")
    if kind not in ("bridge", "hooked"):
        raise ValueError(f"kind must be 'bridge' or 'hooked', found {kind!r}")
    load = _hooked if kind == "hooked" else _bridge
    try:
        model = load(source, is_folder, dtype, device, options)
    except OSError as error:
        raise ValueError(
            f"could not load {source!r}: it is no folder here, and the model hub does not have it"
            f" or cannot be reached. Give 'demo', a Hugging Face folder, or a hub name"
            f" ({type(error).__name__})"
        ) from error
    if name == "demo":
        model.cfg.default_prepend_bos = False  # as the paper reads GPT-2
    return model.eval()


def _bridge(source: str, is_folder: bool, dtype: Any, device: Any, options: dict[str, Any]) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(source, dtype=dtype, device=device, **options)


def _hooked(source: str, is_folder: bool, dtype: Any, device: Any, options: dict[str, Any]) -> Any:
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
            f"HookedTransformer cannot be made from the config.json of {source!r}: {error}; add"
            f" what is missing there, or use kind='bridge'"
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
