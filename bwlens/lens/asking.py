"""What a user asks a lens of, checked before the work: a prompt, a target, numbers."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

from jaxtyping import Int
from torch import Tensor

from bwlens.model.prompts import Edit, one_prompt

READINGS = ("plain", "dual", "cosine", "transported", "effect")
IMPRINTS = ("plain", "dual", "cosine")


def whole_number(value: Any, name: str, most: int | None = None) -> int:
    """A whole number from 1.

    Raises:
        ValueError: Anything else, or more than `most`.
    """
    wanted = "a whole number from 1" + (f" to {most}" if most else "")
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; expected {wanted}") from None
    if isinstance(value, bool) or number < 1 or (most is not None and number > most):
        raise ValueError(f"{name} is {value!r}; expected {wanted}")
    return number


def prompt_of(
    prompt: Any, target: Any, subject: str | None
) -> tuple[str | Int[Tensor, " pos"], Any, str | None, int | None]:
    """One prompt, what is to follow, the subject, and where in the text that begins, if known.

    An `Edit`, or a record of one, brings all of them; a target or subject that is given goes
    before the edit's own.

    Raises:
        ValueError: Several prompts, something that is none, or no target.
    """
    edit = getattr(prompt, "edit", prompt)
    if isinstance(edit, Edit):
        if subject is None or subject == edit.subject:
            subject, start = edit.subject, edit.start
        else:
            start = None
        return edit.text, edit.target_new if target is None else target, subject, start
    if target is None:
        raise ValueError(
            "no target: say what the model is to say next, as in backward_lens(model, 'Lionel"
            " Messi plays for', ' Paris'), or give an Edit, which has one"
        )
    try:
        return one_prompt(prompt), target, subject, None
    except ValueError as error:
        raise ValueError(f"{error}. An Edit does as well; bwlens.capture takes several") from None


def readings_of(reading: Any, normalize: Any, temper: Any, imprint: Any) -> tuple[str, ...]:
    """The readings of a lens, "normalised" in place of the plain one or beside it.

    Raises:
        ValueError: An unknown reading or one named twice, or an option that goes with none of them.
    """
    if not (isinstance(normalize, bool) or normalize == "both"):
        raise ValueError(f"normalize must be True, False or 'both', found {normalize!r}")
    readings = (reading,) if isinstance(reading, str) else tuple(reading)
    for name in readings:
        if name not in READINGS:
            raise ValueError(f"reading is {name!r}; there are {', '.join(READINGS)}")
    if len({*readings}) < max(1, len(readings)):
        raise ValueError(f"reading is {reading!r}; expected one or several, each once")
    if imprint not in IMPRINTS:
        raise ValueError(f"imprint is {imprint!r}; there are {', '.join(IMPRINTS)}")
    if not 0 <= temper <= 1 or (temper and "effect" not in readings):
        raise ValueError(f"temper is {temper}; expected 0 to 1, and it goes with reading='effect'")
    if normalize is False:
        return readings
    if "plain" not in readings:
        raise ValueError(f"normalize goes with reading='plain', not with {reading!r}")
    instead = ("plain", "normalised") if normalize == "both" else ("normalised",)
    return tuple(chain.from_iterable(instead if n == "plain" else (n,) for n in readings))
