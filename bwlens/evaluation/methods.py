"""Editing methods by name, with their settings; "none" leaves the model as it is."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

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


def named_method(name: str) -> EditMethod | None:
    """The method of a name; None for "none".

    Raises:
        ValueError: There is no such method.
    """
    held = editing_methods()
    if name != "none" and name not in held:
        raise ValueError(f"there is no editing method {name!r}; there are none, {', '.join(held)}")
    return held.get(name)


def with_statistics(methods: Sequence[Method], statistics: Any) -> tuple[Method, ...]:
    """The methods, with these key statistics for those that take some and have none yet.

    Raises:
        ValueError: None of them takes statistics.
    """
    takes = [
        method.function is not None
        and "statistics" in inspect.signature(method.function).parameters
        for method in methods
    ]
    if not any(takes):
        names = ", ".join(method.name for method in methods)
        raise ValueError(f"statistics were given, and no method takes any: {names}")
    return tuple(
        replace(method, settings={"statistics": statistics, **method.settings}) if wants else method
        for method, wants in zip(methods, takes, strict=True)
    )


def methods_of(methods: Any, settings: Mapping[str, Any] | None = None) -> tuple[Method, ...]:
    """Methods in any of the ways they may be named.

    Args:
        methods: A name ("rome", "none"), a function of a model and an edit, a `Method`, several of
            these in a list, or a mapping from the names their rows are to have.
        settings: Keyword arguments of a single method ("none" beside it has none); of several,
            those of each by its name, `{"rome": {"layer": 5}}`.

    Raises:
        ValueError: No such method or setting, or settings that do not say whose they are.
    """
    if isinstance(methods, Mapping):
        named = [_method(one, name) for name, one in methods.items()]
    elif isinstance(methods, Sequence) and not isinstance(methods, str):
        named = [_method(one) for one in methods]
    else:
        named = [_method(methods)]
    if not named:
        raise ValueError("no method given; name one, or 'none' for the model as it is")
    names = [one.name for one in named]
    if len(set(names)) < len(names):
        raise ValueError(f"two methods have one name: {', '.join(names)}; name them in a mapping")
    if settings:
        each = _settings_of(named, settings)
        named = [replace(one, settings={**one.settings, **each.get(one.name, {})}) for one in named]
    for one in named:
        _check_settings(one)
    return tuple(named)


def _settings_of(
    methods: Sequence[Method], settings: Mapping[str, Any]
) -> Mapping[str, Mapping[str, Any]]:
    """The settings of each method, by its name."""
    able = [method.name for method in methods if method.function is not None]
    if all(name in able and isinstance(value, Mapping) for name, value in settings.items()):
        return settings
    if len(able) == 1:
        return {able[0]: settings}
    raise ValueError(
        f"settings belong to one method, and {', '.join(settings)} is none of"
        f" {', '.join(able) or 'those that have any'}; say whose they are, as in"
        f" {{'rome': {{'layer': 5}}}}"
    )


def _method(method: Any, name: str | None = None) -> Method:
    if isinstance(method, Method):
        return Method(name or method.name, method.function, method.settings)
    if method is None or method == "none":
        return Method(name or "none")
    if isinstance(method, str):
        return Method(name or method, named_method(method))
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
    if isinstance(value, str | os.PathLike) and os.path.isfile(value):
        # Rows hang on what a file holds, not on where it lies.
        return f"file {hashlib.sha256(Path(value).read_bytes()).hexdigest()[:16]}"
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple | range):
        return [_plain(one) for one in value]
    if isinstance(value, torch.Tensor):
        held = value.detach().cpu().flatten()
        return hashlib.sha256(held.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return repr(value)
