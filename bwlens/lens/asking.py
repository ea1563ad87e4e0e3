"""What a user asks a lens of, checked before the work: a prompt, a target, numbers."""

from __future__ import annotations

import operator
from typing import Any

from jaxtyping import Int
from torch import Tensor

from bwlens.model.prompts import Edit, one_prompt


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
