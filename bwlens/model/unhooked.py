"""The model without the hooks that its user put on it: what it computes by itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LISTS = ("fwd_hooks", "bwd_hooks")
"""A hook point's own record of its hooks: TransformerLens' norms look there as well."""


@contextmanager
def hooks_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No hook of these modules runs within; all are back, in their order, after."""
    hooked = [module for module in modules if has_hooks(module)]
    before = [
        {name: vars(module)[name] for name in (*_DICTS, *_LISTS) if name in vars(module)}
        for module in hooked
    ]
    for module, kept in zip(hooked, before, strict=True):
        vars(module).update({name: OrderedDict() if name in _DICTS else [] for name in kept})
    try:
        yield
    finally:
        for module, kept in zip(hooked, before, strict=True):
            vars(module).update(kept)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of any kind hangs on the module."""
    held = vars(module)
    return any(held.get(name) for name in (*_DICTS, *_LISTS))


def open_to_users(model: Any) -> list[nn.Module]:
    """Where a user's hooks hang: every hook point, and the whole of the final norm and unembedding.

    Other modules may carry hooks of the model's own (pruning computes a weight in one), which
    belong to it.
    """
    wrapped = getattr(model, "original_model", None)
    everything = {
        id(module): module
        for tree in (model, wrapped)
        if tree is not None
        for module in tree.modules()
    }
    points = [module for module in everything.values() if hasattr(module, "fwd_hooks")]
    ends = (getattr(model, "ln_final", None), getattr(model, "unembed", None))
    return [*points, *(module for end in ends if end is not None for module in end.modules())]
