"""Types and shapes of bwlens' signatures, checked at run time at a cost that a suite can bear.

jaxtyping's import hook decorates every function. An inner one would be compiled anew at each call
of the outer one, and stays as it is here; one without a shape needs no account of shapes, and
meets beartype alone. That was more than half of the suite's time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import isclass, isfunction
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

_jaxtyped = jaxtyping.jaxtyped


def install(package: str) -> jaxtyping.ImportHookManager:
    """Check the signatures of a package that is not imported yet; in a `with`, of no later one."""
    jaxtyping.jaxtyped = _decorator
    return jaxtyping.install_import_hook(package, "beartype.beartype")


def _decorator(*, typechecker: Callable) -> Callable:
    def decorate(thing: Any) -> Any:
        if "<locals>" in thing.__qualname__:
            return thing
        if not isfunction(thing):
            return _jaxtyped(thing, typechecker=typechecker)
        hints = {name: _meaning(text, thing) for name, text in thing.__annotations__.items()}
        if any(map(_has_shape, hints.values())):
            return _jaxtyped(thing, typechecker=typechecker)
        return _plain(thing, hints)

    return decorate


def _meaning(text: Any, function: Callable) -> Any:
    try:
        return eval(text, function.__globals__) if isinstance(text, str) else text
    except Exception:  # known to type checkers alone, as jaxtyping has it
        return Any


def _has_shape(hint: Any) -> bool:
    array = isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return array or any(map(_has_shape, get_args(hint)))


def _plain(function: Callable, hints: dict[str, Any]) -> Callable:
    function.__annotations__ = hints
    # As jaxtyping's own: a TypeError, which is what a wrong type would raise without any checks.
    checked = beartype(conf=BeartypeConf(violation_type=TypeError))(function)

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        given = function if jaxtyping.config.jaxtyping_disable else checked
        return given(*args, **kwargs)

    return either
