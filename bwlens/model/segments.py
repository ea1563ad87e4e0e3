"""The parts of a prompt that the paper's figures tell apart, by character offsets.

The subject's place is known from the template: one that occurs twice, merges with its neighbours,
or has characters split over several tokens is found all the same.

Source: Backward Lens, section 5.1 (figures 5, 6 and 16-21).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bwlens.model.prompts import Batch, Edit
from bwlens.model.protocol import LensModel
from bwlens.model.tokens import prompt_offsets, span_positions

_SUBJECT = ("first subject", "middle subject", "last subject")
SEGMENTS = ("bos", "before", *_SUBJECT, "after", "last", "target")
"""Names of the segments, in the order in which they stand in a prompt.

- `bos`: the BOS token. It is kept apart, as its norms are unlike any other token's.
- `before`: tokens before the subject.
- `first subject`, `middle subject`, `last subject`: tokens that hold some of the subject. Its
  only token counts as the last.
- `after`: tokens after the subject, but for the prompt's last.
- `last`: the prompt's last token, where the answer is given, also where it holds the subject.
- `target`: tokens of a target of several tokens that are teacher forced after the prompt.
"""


def segment_names(
    model: LensModel, edit: Edit, prepend_bos: bool | None = None, n_target: int = 0
) -> tuple[str, ...]:
    """The segment of each token of an edit's prompt.

    `n_target` is the number of teacher-forced target tokens after the prompt.

    Raises:
        ValueError: The prompt has no token.
        NotImplementedError: The tokenizer gives no offsets (it is not a fast one).

    Example:
        >>> edit = Edit("{} plays for", "Lionel Messi", " Paris")
        >>> segment_names(model, edit)  # doctest: +SKIP
        ('first subject', 'last subject', 'after', 'last')
    """
    lead, offsets = prompt_offsets(model, edit.text, prepend_bos)
    if not offsets:
        raise ValueError(f"the prompt {edit.text!r} has no token")
    start = edit.prompt.index("{}")
    subject = edit.subject.strip()
    start += edit.subject.index(subject)
    stop = start + len(subject)
    held = span_positions(offsets, start, stop)
    names = [
        _in_subject(pos, held) if pos in held else "before" if high <= start else "after"
        for pos, (_, high) in enumerate(offsets)
    ]
    names[-1] = "last"
    return (*["bos"] * lead, *names, *["target"] * n_target)


def segment_codes(
    model: LensModel, edits: Sequence[Edit], batch: Batch, prepend_bos: bool | None = None
) -> Any:
    """The index in `SEGMENTS` of each token of a batch [batch, pos]; -1 at padding."""
    import torch

    codes = torch.full(batch.tokens.shape, -1)
    lengths = batch.lengths.tolist()
    prompts = batch.prompt_lengths.tolist()
    for row, edit in enumerate(edits):
        names = segment_names(model, edit, prepend_bos, lengths[row] - prompts[row])
        codes[row, : len(names)] = torch.tensor([SEGMENTS.index(name) for name in names])
    return codes.to(batch.tokens.device)


def _in_subject(pos: int, held: Sequence[int]) -> str:
    first, middle, last = _SUBJECT
    return last if pos == held[-1] else first if pos == held[0] else middle
