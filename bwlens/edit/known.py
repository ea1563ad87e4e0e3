"""Edits whose target is the model's answer already: there is nothing to write for them."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from bwlens.model.passes import run
from bwlens.model.prompts import Batch, Edit, make_batch
from bwlens.model.protocol import LensModel

_AT_ONCE = 32  # Edits that are asked in one batch.


def open_edits(
    model: LensModel, edits: Sequence[Edit], prepend_bos: bool | None = None
) -> tuple[list[Edit], str]:
    """The edits that there is something to do for, and what to say of the others.

    A target is known when each of its tokens is the argmax, those before it teacher forced.

    Raises:
        ValueError: A prompt or target that cannot be tokenised, or is too long.
    """
    known: list[bool] = []
    for start in range(0, len(edits), _AT_ONCE):
        some = edits[start : start + _AT_ONCE]
        prompts, targets = [edit.text for edit in some], [edit.target_new for edit in some]
        batch = make_batch(model, prompts, targets, prepend_bos=prepend_bos)
        known += answered(run(model, batch.tokens).logits, batch)
    left = [edit for edit, is_known in zip(edits, known, strict=True) if not is_known]
    return left, known_note(edits, known)


def answered(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> list[bool]:
    """Which targets the model answers, every teacher-forced token of each."""
    says = logits.argmax(-1)
    return [
        all(int(says[i, last + k]) == token for k, token in enumerate(ids))
        for i, (last, ids) in enumerate(zip(batch.last.tolist(), batch.targets, strict=True))
    ]


def known_note(edits: Sequence[Edit], known: Sequence[bool]) -> str:
    """Names the edits that are known already."""
    return "; ".join(
        f"{edit.text!r} is answered {edit.target_new!r} already, left out"
        for edit, is_known in zip(edits, known, strict=True)
        if is_known
    )
