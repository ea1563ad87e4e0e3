"""Types and shapes of bwlens' signatures, checked at run time at a cost that a suite can bear.

jaxtyping's import hook decorates every function. An inner one would be compiled anew at each call
of the outer one, and stays as it is here. One without a shape needs no account of shapes, and
meets beartype alone; one with shapes meets it within such an account, where jaxtyping itself would
bind the arguments anew at each call and check them twice. That was more than half of the suite's
time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
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
    dims = [dims for hint in hints.values() for dims in _dims_of(hint)]
    if any("{" in one for one in dims):  # of the arguments' values, which jaxtyping has to bind
        return _jaxtyped(function, typechecker=typechecker)
    return _plain(function, hints, _jaxtyped("context") if dims else None)


def _meaning(text: Any, function: Callable) -> Any:
    try:
        return eval(text, function.__globals__) if isinstance(text, str) else text
    except Exception:  # known to type checkers alone, as jaxtyping has it
        return Any


def _dims_of(hint: Any) -> list[str]:
    """The shapes that an annotation has in it, as they are written."""
    array = isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return [hint.dim_str] if array else [d for arg in get_args(hint) for d in _dims_of(arg)]


def _plain(
    function: Callable, hints: dict[str, Any], shapes: AbstractContextManager[Any] | None
) -> Callable:
    function.__annotations__ = hints
    # As jaxtyping's own: a TypeError, which is what a wrong type would raise without any checks.
    checked = beartype(conf=BeartypeConf(violation_type=TypeError))(function)

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if shapes is None:
            return checked(*args, **kwargs)
        with shapes:
            return checked(*args, **kwargs)

    return either
