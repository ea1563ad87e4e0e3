"""What a user asks a lens of, checked before the work: a prompt, a target, numbers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from bwlens.model.prompts import Edit


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
    if isinstance(prompt, str):
        return prompt, target, subject, None
    ids = _ids(prompt)
    if ids is None:
        raise ValueError(
            f"backward_lens reads one prompt: a text, token ids [pos] or [1, pos], or an Edit;"
            f" found {_described(prompt)}. bwlens.capture takes several"
        )
    return ids, target, subject, None


def _ids(prompt: Any) -> Tensor | None:
    """Token ids [pos], if that is what they are."""
    if isinstance(prompt, Sequence) and prompt and all(_is_id(i) for i in prompt):
        return torch.tensor([operator.index(i) for i in prompt])
    if isinstance(prompt, np.ndarray) and prompt.dtype.kind in "iu":
        prompt = torch.as_tensor(prompt)
    if not isinstance(prompt, Tensor):
        return None
    if prompt.ndim == 2 and len(prompt) == 1:
        return prompt[0]
    return prompt if prompt.ndim == 1 else None


def _is_id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | Tensor | np.ndarray)


def _described(prompt: Any) -> str:
    if isinstance(prompt, Tensor | np.ndarray):
        return f"{type(prompt).__name__} of shape {list(prompt.shape)}"
    if isinstance(prompt, Sequence):
        kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in prompt)) or "nothing"
        return f"a {type(prompt).__name__} of {len(prompt)}: {kinds}"
    return repr(prompt)[:80]
