"""What an editing method is given, checked before the work."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from bwlens.model.prompts import Edit
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, find_taps, resolve_matrices

FIRST_ONLY = (
    "only the first token of a target of several tokens is written, so that the rest may not follow"
)
"""What the first such edit warns of; each change says it in its note."""


def number(value: Any, name: str, expected: str = "") -> float:
    """A finite number; `expected` says what it should be.

    Raises:
        ValueError: Anything else.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; expected {expected or 'a finite number'}")
    return float(value)


def count(value: Any, name: str) -> int:
    """A whole number of steps, from 1.

    Raises:
        ValueError: Anything else.
    """
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"{name} is {value!r}; expected at least one step, a whole number")
    return int(value)


def texts_of(texts: Any, name: str) -> tuple[str, ...]:
    """Several texts; one text alone is refused, whose letters would be taken for them.

    Raises:
        ValueError: One text, or something that is no text.
    """
    several = isinstance(texts, Iterable) and not isinstance(texts, str)
    given: tuple[Any, ...] = tuple(texts) if several else (None,)
    if not all(isinstance(text, str) for text in given):
        raise ValueError(f"{name} is {texts!r}; expected a list of texts, () for none")
    return given


def chosen_matrices(model: LensModel, matrices: str | Sequence[str], layers: Layers) -> list[str]:
    """Names of matrices that the model has in these layers.

    Raises:
        ValueError: Unknown matrices or layers.
    """
    find_taps(model, matrices, layers)
    return list(resolve_matrices(matrices))


def first_only_note(edits: Sequence[Edit], several: Sequence[bool]) -> str:
    """Names the edits of whose targets only the first token is written, and warns of them."""
    named = [edit for edit, more in zip(edits, several, strict=True) if more]
    if not named:
        return ""
    warnings.warn(FIRST_ONLY, UserWarning, stacklevel=3)
    listed = ", ".join(repr(edit.target_new) for edit in named)
    return f"only the first token is written of {listed}"
