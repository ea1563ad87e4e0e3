"""Is x^T delta the gradient of what the model computes? Asked once, before the first capture.

Layers that quantise in passing (BitNet), rescale or adapt break z = x W (+ b) with the weight that
the model holds; gradients that pass roundings as if they were not there are not what the loss does
when z moves. Both are measured on a prompt of four tokens, for every layer once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from bwlens.gradient.probe import Probe, UntrueGradientError, holder_of, linearity
from bwlens.model.sites import ExpertTap, Tap

_ADVICE = "bwlens.check(model) shows all figures"
_trusting: ContextVar[bool] = ContextVar("trusting", default=False)
_straight: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
_stepped: WeakSet[Any] = WeakSet()


@contextmanager
def trusted() -> Generator[None, None, None]:
    """Captures within take a model at its word: the two checks before the first one are left out.

    Example:
        >>> with bwlens.checking.trusted():  # doctest: +SKIP
        ...     bwlens.capture(model, prompts, objective)
    """
    token = _trusting.set(True)
    try:
        yield
    finally:
        _trusting.reset(token)


def check_first_use(model: Any, taps: Sequence[Tap | ExpertTap]) -> None:
    """Refuse layers whose x^T delta is not the gradient, before they are read; each one once.

    Raises:
        UntrueGradientError: With figures.
    """
    if _trusting.get():
        return
    fresh = [tap for tap in taps if _key(tap) not in _straight.get(holder_of(tap), ())]
    if not fresh:
        return
    probe = Probe(model, fresh)
    for flow in probe.flows:
        for site, columns in flow.parts:
            if (fault := linearity(probe.tap_of[site], site, flow, columns).fault) is not None:
                raise UntrueGradientError(f"{fault}; {_ADVICE}")
    if model not in _stepped and (lowest := probe.lowest()) is not None:
        step = probe.step(lowest)
        if step.fault is not None:
            raise UntrueGradientError(f"{step.fault}; {_ADVICE}")
        _stepped.add(model)
    for tap in fresh:
        _straight.setdefault(holder_of(tap), set()).add(_key(tap))


def _key(tap: Tap | ExpertTap) -> Any:
    """What a verdict holds for: another class or forward of the same module is asked anew."""
    holder = holder_of(tap)
    names = tuple(tap.weights) if isinstance(tap, ExpertTap) else (tap.site.matrix,)
    return (names, type(holder), id(vars(holder).get("forward")))
