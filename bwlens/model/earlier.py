"""What attention keeps of a prompt's positions, so that later ones can be run again without them.

In a causal model a change at one position changes nothing before it: the keys and values of earlier
positions are given as they were. Whether a model takes them is not told from its class: who runs
later positions alone compares the logits with those of the pass that ran them all.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bwlens.model.protocol import LensModel

_UPDATE = "_update_kv_cache"


def empty(model: LensModel) -> DynamicCache | None:
    """Keeps the keys and values of a pass that is given it; None where the model takes none.

    Nor where layers keep a state of another kind (a convolution's, a recurrence's, an index).
    """
    if _name(model) is None:
        return None
    kinds = {type(layer) for layer in DynamicCache(config=model.original_model.config).layers}
    # A window's layer would forget what is before it; the mask leaves that out as well.
    return DynamicCache() if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else None


def detach(kept: DynamicCache) -> None:
    """Take what is kept off the graph of its pass."""
    layers: list[Any] = kept.layers
    for layer in layers:
        if (pair := _pair(layer)) is not None:
            layer.keys, layer.values = (part.detach() for part in pair)


class Earlier(DynamicCache):
    """The keys and values before a position, the same for every row; what comes is not kept."""

    def __init__(self, kept: DynamicCache, before: int) -> None:
        super().__init__()
        for at, layer in enumerate(kept.layers):
            if (pair := _pair(layer)) is not None:
                keys, values = (part[..., :before, :] for part in pair)
                super().update(keys, values, at)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The earlier positions' and these, for every row."""
        news, olds = (key_states, value_states), _pair(self.layers[layer_idx])
        if olds is None:
            return news
        keys, values = (
            torch.cat([old.expand(len(new), *old.shape[1:]), new], -2)
            for old, new in zip(olds, news, strict=True)
        )
        return keys, values


def _pair(layer: Any) -> tuple[Tensor, Tensor] | None:
    """A layer's keys and values, if it has any yet."""
    keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
    return None if keys is None or values is None else (keys, values)


def options(model: LensModel, kept: DynamicCache | None) -> dict[str, Any]:
    """What the model's call takes for it."""
    name = _name(model)
    return {} if kept is None or name is None else {name: kept, "use_cache": True}


@contextmanager
def known_to_attention(model: LensModel) -> Generator[None, None, None]:
    """TransformerLens' attention looks for it by a name that later transformers have dropped."""
    parts = [part for block in model.blocks for part in block.children()]
    patched = [part for part in parts if callable(getattr(part, _UPDATE, None))]
    before = [vars(module).get(_UPDATE) for module in patched]
    for module in patched:
        vars(module)[_UPDATE] = _renaming(getattr(module, _UPDATE))
    try:
        yield
    finally:
        for module, own in zip(patched, before, strict=True):
            if own is None:
                del vars(module)[_UPDATE]
            else:
                vars(module)[_UPDATE] = own


def _renaming(update: Callable[..., Any]) -> Callable[..., Any]:
    def renamed(key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        return update(key, value, **{"past_key_values": kwargs.get("cache"), **kwargs})

    return renamed


def _name(model: LensModel) -> str | None:
    wrapped = getattr(model, "original_model", None)
    if wrapped is None:
        return None
    there = signature(wrapped.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in there), None)
