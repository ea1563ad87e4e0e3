"""A record's prompts with both answers, asked in as few forward passes as possible.

An answer of several tokens is scored under teacher forcing, so a prompt and its answer take a row
of tokens: the prompt and all of the answer but its last token. In a causal model a row answers for
every row that it begins with, too. So a prompt whose two answers are one token each takes one row
for both, and prompts that recur take none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bwlens.data.records import Record
from bwlens.model.context import check_length
from bwlens.model.passes import run
from bwlens.model.prompts import make_batch, padded

BATCH_TOKENS = 4096
"""Tokens of a forward pass, padding included, unless told otherwise."""

Row = tuple[int, ...]
"""Token ids."""


@dataclass(frozen=True)
class Asked:
    """An answer to be scored: which row holds it, where its prompt ends, and its tokens."""

    row: int
    last: int
    ids: Row


@dataclass(frozen=True)
class Questions:
    """A record as tokens.

    Attributes:
        rows: What the model has to read.
        prompts: The prompts of each kind, without answers.
        new: Where the new answer to each of these prompts is scored.
        true: The same for the true answer; empty where it is not known.
    """

    rows: tuple[Row, ...]
    prompts: Mapping[str, tuple[Row, ...]]
    new: Mapping[str, tuple[Asked, ...]]
    true: Mapping[str, tuple[Asked, ...]]


@dataclass(frozen=True, eq=False)
class Answers:
    """How probable both answers are after each prompt of a kind.

    Attributes:
        nll_new: Mean NLL of the new answer's tokens, in nats.
        nll_true: The same of the true answer; nan where it is not known.
        right_new: Whether each of the new answer's tokens is the most probable one.
        right_true: The same of the true answer; empty where it is not known.
    """

    nll_new: Float[Tensor, " prompts"]
    nll_true: Float[Tensor, " prompts"]
    right_new: Bool[Tensor, " prompts"]
    right_true: Bool[Tensor, " answered"]


def questions_of(model: Any, record: Record, prepend_bos: bool | None = None) -> Questions:
    """A record's prompts and answers as the model's tokens.

    Raises:
        ValueError: A prompt is longer than the context, or cannot be tokenised.
    """
    kinds = {
        "rewrite": (record.edit.text,),
        "paraphrase": record.paraphrase_prompts,
        "neighbourhood": record.neighborhood_prompts,
        "attribute": record.attribute_prompts,
    }
    texts = list(dict.fromkeys(text for listed in kinds.values() for text in listed))
    new, true = record.edit.target_new, record.edit.target_true
    batch = make_batch(model, texts, new, true, prepend_bos=prepend_bos)
    padded, lengths = batch.tokens.tolist(), batch.prompt_lengths.tolist()
    prompts = [tuple(row[:length]) for row, length in zip(padded, lengths, strict=True)]
    answered = {"new": batch.targets, "true": batch.others}
    wanted = {
        side: [p + ids[:-1] for p, ids in zip(prompts, answers, strict=True)] if answers else []
        for side, answers in answered.items()
    }
    rows, holder = _fewest(row for side in wanted.values() for row in side)
    check_length(model, rows)
    place = {text: i for i, text in enumerate(texts)}

    def asked(side: str) -> dict[str, tuple[Asked, ...]]:
        if not answered[side]:
            return dict.fromkeys(kinds, ())
        each = [
            Asked(holder[row], len(prompt) - 1, ids)
            for row, prompt, ids in zip(wanted[side], prompts, answered[side], strict=True)
        ]
        return {kind: tuple(each[place[t]] for t in listed) for kind, listed in kinds.items()}

    listed = {kind: tuple(prompts[place[t]] for t in texts) for kind, texts in kinds.items()}
    return Questions(rows, listed, asked("new"), asked("true"))


def answers_of(
    model: Any, questions: Questions, batch_tokens: int = BATCH_TOKENS
) -> dict[str, Answers]:
    """How probable the model finds both answers, for each kind of prompt.

    Raises:
        FloatingPointError: The model's logits are not finite.
    """
    asked = [a for side in (questions.new, questions.true) for kind in side.values() for a in kind]
    wanted = sorted({(a.row, a.last + i, t) for a in asked for i, t in enumerate(a.ids)})
    nll: dict[tuple[int, int, int], tuple[float, bool]] = {}
    for chosen, logits in next_logits(model, questions.rows, batch_tokens):
        at = {row: i for i, row in enumerate(chosen)}
        here = [one for one in wanted if one[0] in at]
        spots = list(dict.fromkeys((row, pos) for row, pos, _ in here))
        index = {spot: i for i, spot in enumerate(spots)}
        read = logits[[at[row] for row, _ in spots], [pos for _, pos in spots]]
        read = read if read.dtype == torch.float64 else read.float()
        if not torch.isfinite(read).all():
            raise FloatingPointError(
                "the model's logits are nan or inf; the edit has broken it, or it overflows in its"
                " dtype"
            )
        which = [index[row, pos] for row, pos, _ in here]
        tokens = torch.tensor([token for _, _, token in here], device=read.device)
        total, best = read.logsumexp(-1)[which], read.argmax(-1)[which]
        each = total - read[which, tokens]
        nll |= zip(here, zip(each.tolist(), (best == tokens).tolist(), strict=True), strict=True)
    return {kind: _answers(questions, kind, nll) for kind in questions.new}


def next_logits(
    model: Any, rows: Sequence[Row], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[int], Float[Tensor, "row pos d_vocab"]]]:
    """Rows of like length together, padded on the right: which ones, and the model's logits."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        # The longest first, as it says how many go with it.
        n = max(1, batch_tokens // len(rows[order[-1]]))
        chosen, order = order[-n:], order[:-n]
        yield chosen, run(model, padded(model, [rows[i] for i in chosen]).tokens).logits


def _fewest(rows: Iterable[Row]) -> tuple[tuple[Row, ...], dict[Row, int]]:
    """The rows that no other row begins with, and for every row the place of one that does."""
    kept: list[Row] = []
    holder: dict[Row, int] = {}
    # In alphabetical order, what begins with a row comes right after it.
    for row in sorted(set(rows), reverse=True):
        if not kept or kept[-1][: len(row)] != row:
            kept.append(row)
        holder[row] = len(kept) - 1
    return tuple(kept), holder


def _answers(
    questions: Questions, kind: str, nll: Mapping[tuple[int, int, int], tuple[float, bool]]
) -> Answers:
    def scored(asked: Sequence[Asked]) -> tuple[Tensor, Tensor]:
        each = [[nll[a.row, a.last + i, t] for i, t in enumerate(a.ids)] for a in asked]
        means = [sum(n for n, _ in one) / len(one) for one in each]
        right = [all(r for _, r in one) for one in each]
        return torch.tensor(means, dtype=torch.float64), torch.tensor(right, dtype=torch.bool)

    nll_new, right_new = scored(questions.new[kind])
    nll_true, right_true = scored(questions.true[kind])
    if not len(nll_true):
        nll_true = torch.full_like(nll_new, torch.nan)
    return Answers(nll_new, nll_true, right_new, right_true)
