"""The model without the hooks that its user put on it: what it computes by itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from bwlens.model.passes import all_modules
from bwlens.model.protocol import LensModel

_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LISTS = ("fwd_hooks", "bwd_hooks")
"""A hook point's own record of its hooks: TransformerLens' norms look there as well."""


@contextmanager
def hooks_off(
    modules: Iterable[nn.Module], stays: Callable[[Any], bool] = lambda hook: False
) -> Generator[None, None, None]:
    """No hook of these modules runs within but those that stay; all are back, in order, after."""
    hooked = [module for module in modules if has_hooks(module)]
    before = [
        {name: vars(module)[name] for name in (*_DICTS, *_LISTS) if name in vars(module)}
        for module in hooked
    ]
    for module, kept in zip(hooked, before, strict=True):
        for name, hooks in kept.items():
            vars(module)[name] = (
                OrderedDict((key, hook) for key, hook in hooks.items() if stays(hook))
                if name in _DICTS
                else []
            )
    try:
        yield
    finally:
        for module, kept in zip(hooked, before, strict=True):
            vars(module).update(kept)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of any kind hangs on the module."""
    return any(vars(module).get(name) for name in (*_DICTS, *_LISTS))


@contextmanager
def users_hooks_off(model: LensModel) -> Generator[None, None, None]:
    """Run the model without its user's hooks.

    On hook points, the final norm and the unembedding every hook is the user's. Elsewhere those
    that come with the code of torch or of the model's own modules stay: pruning computes a weight
    in one, and a bridge passes values on in others.
    """
    modules = all_modules(model)
    ends = (getattr(model, "ln_final", None), getattr(model, "unembed", None))
    open_to_users = {module for end in ends if end is not None for module in end.modules()}
    open_to_users |= {module for module in modules if hasattr(module, "fwd_hooks")}
    others = [module for module in modules if module not in open_to_users]
    origins = {_origin(type(module)) for module in modules} | {"torch"}
    with hooks_off(open_to_users), hooks_off(others, lambda hook: _origin(hook) in origins):
        yield


def _origin(thing: Any) -> str:
    """The package that a hook or class comes from."""
    while isinstance(thing, partial):
        thing = thing.func
    name = getattr(thing, "__module__", None) or type(thing).__module__
    return name.partition(".")[0]
