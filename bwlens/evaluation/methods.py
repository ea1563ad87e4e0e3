"""Editing methods by name, with their settings; "none" leaves the model as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bwlens.edit import WeightChange
from bwlens.model.prompts import Edit

EditMethod = Callable[..., WeightChange]
"""`method(model, edits, **settings)`: a change that is computed without changing the model."""


@dataclass(frozen=True)
class Method:
    """An editing method under the name that its rows will have.

    Attributes:
        name: As rows and tables call it.
        function: The method; None changes nothing.
        settings: Keyword arguments of each call.
    """

    name: str
    function: EditMethod | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: Any, edit: Edit, prepend_bos: bool | None = None) -> WeightChange:
        """The change that makes the edit; `prepend_bos` is handed on to a method that knows it.

        Raises:
            TypeError: The method returned something else.
        """
        if self.function is None:
            return WeightChange()
        settings = dict(self.settings)
        if prepend_bos is not None and "prepend_bos" in inspect.signature(self.function).parameters:
            settings.setdefault("prepend_bos", prepend_bos)
        change = self.function(model, edit, **settings)
        if not isinstance(change, WeightChange):
            raise TypeError(
                f"{self.name} returned {type(change).__name__}; an editing method computes a"
                f" WeightChange and leaves applying it to others"
            )
        return change

    def described(self) -> dict[str, Any]:
        """What its rows hang on, as JSON holds it."""
        function, settings = _unwrapped(self.function, self.settings)
        where = getattr(function, "__qualname__", type(function).__name__)
        module = getattr(function, "__module__", "")
        return {
            "function": "none" if function is None else f"{module}.{where}",
            "settings": {name: _plain(value) for name, value in sorted(settings.items())},
        }


def editing_methods() -> dict[str, EditMethod]:
    """The methods of `bwlens.edit` by name: its functions of a model and edits."""
    import bwlens.edit as room

    held: dict[str, Any] = {name: getattr(room, name) for name in dir(room)}
    return {name: one for name, one in held.items() if _is_method(one)}


def methods_of(methods: Any, settings: Mapping[str, Any] | None = None) -> tuple[Method, ...]:
    """Methods in any of the ways they may be named.

    Args:
        methods: A name ("rome", "none"), a function of a model and an edit, a `Method`, several of
            these in a list, or a mapping from the names their rows are to have.
        settings: Keyword arguments of a single method.

    Raises:
        ValueError: No such method or setting, or settings for several methods.
    """
    if isinstance(methods, Mapping):
        named = [_method(one, name) for name, one in methods.items()]
    elif isinstance(methods, Sequence) and not isinstance(methods, str):
        named = [_method(one) for one in methods]
    else:
        named = [_method(methods)]
    if not named:
        raise ValueError("no method given; name one, or 'none' for the model as it is")
    if settings:
        if len(named) != 1 or named[0].function is None:
            raise ValueError(
                "settings belong to one method; for several, give a mapping such as"
                " {'at layer 3': functools.partial(fine_tune, layers=[3])}"
            )
        named = [Method(named[0].name, named[0].function, {**named[0].settings, **settings})]
    names = [one.name for one in named]
    if len(set(names)) < len(names):
        raise ValueError(f"two methods have one name: {', '.join(names)}; name them in a mapping")
    for one in named:
        _check_settings(one)
    return tuple(named)


def _method(method: Any, name: str | None = None) -> Method:
    if isinstance(method, Method):
        return Method(name or method.name, method.function, method.settings)
    if method is None or method == "none":
        return Method(name or "none")
    if isinstance(method, str):
        held = editing_methods()
        if method not in held:
            raise ValueError(
                f"there is no editing method {method!r}; there are none, {', '.join(held)}"
            )
        return Method(name or method, held[method])
    if not callable(method):
        raise ValueError(
            f"expected an editing method, its name, or a mapping of them, found {method!r:.80}"
        )
    chosen: Any = method
    inner, _ = _unwrapped(chosen, {})
    return Method(name or getattr(inner, "__name__", type(inner).__name__), chosen)


def _check_settings(method: Method) -> None:
    """Refuse settings that the method does not take, or has to have, before any work."""
    if method.function is None:
        return
    parameters = inspect.signature(method.function).parameters
    needed = [
        name
        for name, p in list(parameters.items())[2:]
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if missing := [name for name in needed if name not in method.settings]:
        raise ValueError(
            f"{method.name} needs a setting {missing[0]!r}; give settings={{{missing[0]!r}: ...}}"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    takes = list(parameters)[2:]
    if unknown := [name for name in method.settings if name not in takes]:
        raise ValueError(
            f"{method.name} has no setting {unknown[0]!r}; it has {', '.join(takes) or 'none'}"
        )


def _is_method(one: Any) -> bool:
    if not inspect.isfunction(one) or one.__name__.startswith("_"):
        return False
    return list(inspect.signature(one).parameters)[:2] in (["model", "edits"], ["model", "edit"])


def _unwrapped(function: Any, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The function inside partials, and all its settings."""
    while isinstance(function, partial):
        function, settings = function.func, {**function.keywords, **settings}
    return function, dict(settings)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple | range):
        return [_plain(one) for one in value]
    return repr(value)
