"""Reading on: the logits after new tokens, with the keys and values of earlier ones kept.

Several ways of keeping them exist, and which of them work changes with the versions of
TransformerLens and transformers. So each is tried once on the model at hand, and one that does not
give what reading all again gives is not used.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bwlens.model.passes import call, device_of
from bwlens.model.protocol import LensModel

Step = Callable[[Tensor], Tensor]
"""From the next tokens [row, pos] to the logits after the last of them [row, d_vocab]."""

_NAMES = ("cache", "past_key_values")
"""What transformers calls its cache: the first since 5.24, the second before."""


def quickest_step(model: LensModel) -> Callable[[int], Step]:
    """From a number of rows to a new sequence's step; in eval mode now and at each step."""
    probe = torch.tensor([[3, 5, 4, 7], [7, 3, 3, 6]], device=device_of(model)) % model.cfg.d_vocab
    with torch.no_grad():
        expected = _rereading(model, 2)(probe)
        scale = float(expected.abs().max())
        tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 3e-2
        for way in (_wrapped_cache, _renamed_cache, _hooked_cache):
            # What a model without such a cache makes of it is no news to anybody.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    step = way(model, 2)
                    step(probe[:, :2])
                    step(probe[:, 2:3])
                    found = step(probe[:, 3:])
                except Exception:
                    continue
            if float((found - expected).abs().max()) <= tolerance * scale:
                return partial(way, model)
    return partial(_rereading, model)


def _rereading(model: LensModel, n_rows: int) -> Step:
    """Everything read again at each step."""
    so_far: list[Tensor] = []

    def step(tokens: Tensor) -> Tensor:
        so_far.append(tokens)
        return call(model, torch.cat(so_far, 1))[:, -1]

    return step


def _wrapped_cache(model: LensModel, n_rows: int) -> Step:
    """A bridge's wrapped model runs through the bridge's own parts, and keeps keys and values."""
    wrapped, kept = model.original_model, None
    name = next(n for n in _NAMES if n in inspect.signature(wrapped.forward).parameters)

    def step(tokens: Tensor) -> Tensor:
        nonlocal kept
        out = wrapped(input_ids=tokens, use_cache=True, **{name: kept})
        kept = out[name]
        return out.logits[:, -1]

    return step


def _renamed_cache(model: LensModel, n_rows: int) -> Step:
    """The same, where a bridge's attention knows the cache by its earlier name only.

    With transformers 5.24, bridges of TransformerLens up to 4.3 leave the cache empty otherwise.
    """
    step = _wrapped_cache(model, n_rows)

    def renamed(tokens: Tensor) -> Tensor:
        with _earlier_name(model):
            return step(tokens)

    return renamed


@contextmanager
def _earlier_name(model: LensModel) -> Generator[None, None, None]:
    """Hand the cache to each layer's attention under its earlier name."""
    now, before = _NAMES

    def rename(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if now in kwargs:
            kwargs = {**kwargs, before: kwargs[now]}
            del kwargs[now]
        return args, kwargs

    with ExitStack() as stack:
        for block in model.blocks:
            handle = block.attn.register_forward_pre_hook(rename, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hooked_cache(model: LensModel, n_rows: int) -> Step:
    """HookedTransformer's own cache."""
    if "past_kv_cache" not in inspect.signature(model.forward).parameters:
        raise NotImplementedError("this model takes no cache")
    from importlib import import_module

    library: Any = import_module("transformer_lens.cache.key_value_cache")
    kept = library.TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), n_rows)

    def step(tokens: Tensor) -> Tensor:
        ones = torch.ones_like(tokens)
        return call(model, tokens, past_kv_cache=kept, attention_mask=ones)[:, -1]

    return step
