"""Prompts as tokens: edits, batches, and where a subject stands.

A batch is always padded on the right. In a causal model a token never sees what comes after it, so
padding there needs no mask, moves no position, and cannot touch a result; prompts given with
padding on the left are shifted first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bwlens.model.tokens import text_to_ids

Prompts = str | Sequence[str] | Int[Tensor, " pos"] | Int[Tensor, "batch pos"]
"""A prompt, several, or their tokens."""

Target = str | int | Sequence[int] | Int[Tensor, "*n"]
"""What a model should say next: text, a token id, or several."""


Mask = Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"]
"""1 (or True) at real tokens, 0 at padding."""


@dataclass(frozen=True)
class Edit:
    """A fact to be changed: `prompt.format(subject)` should go on with `target_new`.

    Args:
        prompt: The template, with one `{}` where the subject stands.
        subject: What the fact is about.
        target_new: The answer to be written, with its leading space (" Paris").
        target_true: The answer the fact has, if known.

    Raises:
        ValueError: The template has not exactly one `{}`, or a field is empty or no text.

    Example:
        >>> Edit("{} plays for", subject="Lionel Messi", target_new=" Paris").text
        'Lionel Messi plays for'
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new", "target_true"):
            text = getattr(self, name)
            if not (isinstance(text, str) or (text is None and name == "target_true")):
                raise ValueError(f"{name} is {text!r}; an edit needs text there")
        if (found := self.prompt.count("{}")) != 1:
            raise ValueError(
                f"the template {self.prompt!r} has {found} places {{}} for the subject; write"
                f" exactly one, as in '{{}} plays for'"
            )
        for name in ("subject", "target_new", "target_true"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise ValueError(f"{name} is empty; an edit needs some text there")

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject)

    @property
    def start(self) -> int:
        """Where in the text the subject begins, in characters."""
        return self.prompt.index("{}")


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts as right-padded tokens, with the targets an objective asks about.

    Where a target has several tokens, all but its last are appended to the prompt (teacher
    forcing), so that each can be predicted from those before it.

    Attributes:
        tokens: Token ids [batch, pos]; what stands after `lengths` is padding.
        lengths: Number of real tokens of each row, teacher-forced ones included.
        prompt_lengths: Number of tokens of each prompt alone.
        targets: The target's token ids, a tuple per prompt; empty without a target.
        others: The same for a second answer to compare with.
    """

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    prompt_lengths: Int[Tensor, " batch"]
    targets: tuple[tuple[int, ...], ...] = ()
    others: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @cached_property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True where a token is real, False at padding."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return positions < self.lengths[:, None]

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """Position of each prompt's last token, where the model gives its answer."""
        return self.prompt_lengths - 1

    @property
    def n_rows(self) -> int:
        """Number of real tokens in all."""
        return int(self.lengths.sum())


def make_batch(
    model: Any,
    prompts: Prompts,
    target: Target | Sequence[Target] | None = None,
    other: Target | Sequence[Target] | None = None,
    *,
    prepend_bos: bool | None = None,
    attention_mask: Mask | None = None,
) -> Batch:
    """Tokenise prompts and targets with the model's own tokenizer.

    Args:
        model: A TransformerLens model.
        prompts: A string, a list of strings, or token ids [pos] or [batch, pos].
        target: For one prompt, its target; for several, one for all (a string or id) or a list of
            one each. A target is text, a token id, or a sequence of ids.
        other: A second answer, in the same way.
        prepend_bos: Whether strings get a BOS token; None is the model's own default. Tokens are
            taken as they are.
        attention_mask: 1 at real tokens and 0 at padding, left or right, for token prompts.

    Raises:
        ValueError: An empty prompt or target, a prompt longer than the context, a mask with
            gaps, ids outside the vocabulary, or targets that do not match the prompts in number.
    """
    texts, rows = _prompt_rows(model, prompts, prepend_bos, attention_mask)
    single = isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.ndim == 1)
    to_ids = _Targets(model, texts, rows, prepend_bos)
    targets, others = to_ids(target, single, "target"), to_ids(other, single, "other")
    full = [row + list(t[:-1]) for row, t in zip(rows, targets, strict=True)] if targets else rows
    limit = getattr(model.cfg, "n_ctx", None)
    for index, row in enumerate(full):
        if limit is not None and len(row) > limit:
            raise ValueError(
                f"prompt {index} has {len(row)} tokens, but the model's context holds {limit};"
                f" shorten it"
            )
    device = next(model.embed.parameters()).device
    width = max(map(len, full))
    tokens = torch.zeros(len(full), width, dtype=torch.long)
    for index, row in enumerate(full):
        tokens[index, : len(row)] = torch.tensor(row)
    return Batch(
        tokens.to(device),
        torch.tensor([len(row) for row in full], device=device),
        torch.tensor([len(row) for row in rows], device=device),
        targets,
        others,
    )


def _prompt_rows(
    model: Any,
    prompts: Prompts,
    prepend_bos: bool | None,
    attention_mask: Tensor | None,
) -> tuple[list[str] | None, list[list[int]]]:
    """The prompts' texts, if they are texts, and their unpadded tokens."""
    if isinstance(prompts, Tensor):
        whole = not (prompts.is_floating_point() or prompts.dtype is torch.bool)
        if not whole or prompts.ndim not in (1, 2) or prompts.numel() == 0:
            raise ValueError(
                f"expected token ids [pos] or [batch, pos], found {prompts.dtype} of shape"
                f" {tuple(prompts.shape)}"
            )
        rows = _unpad(prompts if prompts.ndim == 2 else prompts[None], attention_mask)
        for index, row in enumerate(rows):
            _check_ids(model, row, f"prompt {index}")
        return None, rows
    if attention_mask is not None:
        raise ValueError("attention_mask goes with token prompts; texts are padded here")
    listed = list(prompts) if isinstance(prompts, Iterable) else []
    texts = [prompts] if isinstance(prompts, str) else listed
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"expected a prompt, a list of prompts or a tensor of token ids, found {prompts!r}"
        )
    rows = [text_to_ids(model, text, prepend_bos) for text in texts]
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if not text or not row:
            raise ValueError(f"prompt {index} is empty; give it some text to read")
    return texts, rows


def _unpad(tokens: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The real tokens of each row; a row's real tokens must stand together."""
    if attention_mask is None:
        return tokens.tolist()
    if attention_mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the tokens"
            f" {tuple(tokens.shape)}; they must be the same"
        )
    rows = []
    for index, (row, keep) in enumerate(zip(tokens, attention_mask.bool(), strict=True)):
        where = keep.nonzero().flatten()
        if len(where) == 0:
            raise ValueError(f"prompt {index} is empty: its attention_mask is all zero")
        if int(where[-1] - where[0]) + 1 != len(where):
            raise ValueError(
                f"the attention_mask of prompt {index} has a gap; only padding on the left or"
                f" right can be taken off"
            )
        rows.append(row[keep].tolist())
    return rows


def _check_ids(model: Any, ids: Sequence[int], what: str) -> None:
    d_vocab = model.cfg.d_vocab
    bad = [i for i in ids if not 0 <= i < d_vocab]
    if bad:
        raise ValueError(f"{what}: token id {bad[0]} is outside the vocabulary of {d_vocab}")


@dataclass(frozen=True)
class _Targets:
    """Turns targets as users write them into one tuple of token ids a prompt."""

    model: Any
    texts: list[str] | None
    rows: list[list[int]]
    prepend_bos: bool | None

    def __call__(self, target: Any, single: bool, what: str) -> tuple[tuple[int, ...], ...]:
        if target is None:
            return ()
        n = len(self.rows)
        if single:
            listed = [target]
        elif isinstance(target, str | int) or (isinstance(target, Tensor) and target.ndim == 0):
            listed = [target] * n
        else:
            listed = list(target)
        if len(listed) != n:
            raise ValueError(
                f"found {len(listed)} {what}s for {n} prompts; give one for all, or one each (a"
                f" {what} of several token ids is a list of its own)"
            )
        return tuple(self._ids(index, one, what) for index, one in enumerate(listed))

    def _ids(self, index: int, target: Any, what: str) -> tuple[int, ...]:
        if isinstance(target, str):
            ids = self._text_ids(index, target)
        else:
            listed = target.flatten() if isinstance(target, Tensor) else target
            try:
                ids = [operator.index(i) for i in ([target] if isinstance(target, int) else listed)]
            except TypeError:
                raise ValueError(
                    f"the {what} of prompt {index} is {target!r}; expected text, a token id or"
                    f" several token ids"
                ) from None
        if not ids or target == "":
            raise ValueError(f"the {what} of prompt {index} is empty; name a word, as in ' Paris'")
        _check_ids(self.model, ids, f"{what} of prompt {index}")
        return tuple(ids)

    def _text_ids(self, index: int, target: str) -> list[int]:
        """Tokens that the target adds to its prompt; on its own where the two would merge."""
        row = self.rows[index]
        if self.texts is not None:
            both = text_to_ids(self.model, self.texts[index] + target, self.prepend_bos)
            if both[: len(row)] == row and len(both) > len(row):
                return both[len(row) :]
        return text_to_ids(self.model, target, False)
