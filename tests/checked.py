"""Types and shapes of bwlens' signatures, checked at run time at a cost that a suite can bear.

jaxtyping's import hook decorates every function. An inner one would be compiled anew at each call
of the outer one, and stays as it is here; one without a shape needs no account of shapes, and
meets beartype alone. That was more than half of the suite's time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
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
        if isfunction(thing):
            return _checked(thing, typechecker)
        if is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = _checked(thing.__init__, typechecker)
        return thing

    return decorate


def _checked(function: Callable, typechecker: Any) -> Callable:
    hints = {name: _meaning(text, function) for name, text in function.__annotations__.items()}
    if any(map(_has_shape, hints.values())):
        return _jaxtyped(function, typechecker=typechecker)
    return _plain(function, hints)


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
