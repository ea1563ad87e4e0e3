"""Prompts as tokens: edits, batches, and where a subject stands.

A batch is padded on the right: in a causal model a token never sees what comes after it, so padding
there needs no mask and cannot touch a result. Prompts padded on the left are shifted first.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bwlens.model.context import check_length
from bwlens.model.passes import device_of
from bwlens.model.protocol import LensModel
from bwlens.model.targets import Target, Targets, check_ids
from bwlens.model.tokenizers import lost_words
from bwlens.model.tokens import text_to_ids, token_texts

Prompts = str | Sequence[Any] | Int[Tensor, " pos"] | Int[Tensor, "batch pos"] | np.ndarray
"""A prompt, a list of several, or their tokens, also in an array or lists.

Tokens [1, pos], as `to_tokens` gives them, are one prompt.
"""

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

    Of a target of several tokens all but the last are appended to the prompt (teacher forcing).

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

    def answers(self) -> tuple[Int[Tensor, "batch answer"], Batch]:
        """The positions whose logits give the targets, and the batch as it is seen there alone.

        Answers shorter than the longest are filled up with their last position.
        """
        counts = torch.tensor([len(ids) for ids in self.targets] or [1] * len(self))
        steps = torch.arange(int(counts.max()))
        steps = torch.minimum(steps, counts[:, None] - 1).to(self.last.device)
        positions = self.last[:, None] + steps
        lengths = counts.to(self.lengths)
        tokens = self.tokens.gather(1, positions)
        alone = Batch(tokens, lengths, torch.ones_like(lengths), self.targets, self.others)
        return positions, alone

    def only(self, *indices: int) -> Batch:
        """Some prompts of the batch, without padding that none of them needs."""
        keep = list(indices)
        lengths = self.lengths[keep]
        return Batch(
            self.tokens[keep, : int(lengths.max())],
            lengths,
            self.prompt_lengths[keep],
            *(tuple(ids[i] for i in keep if ids) for ids in (self.targets, self.others)),
        )


def make_batch(
    model: LensModel,
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
        prompts: A string, a list of strings, or token ids [pos] or [batch, pos]: a tensor, an
            array, or lists (of any lengths).
        target: Text, a token id, or several; for several prompts, one for all (text or id) or a
            list of one each. Text is taken as it is written, with a warning where a blank before
            it is likely missing.
        other: A second answer, in the same way.
        prepend_bos: Whether strings get a BOS token; None is the model's own default.
        attention_mask: 1 at real tokens and 0 at padding, left or right, for token prompts.

    Raises:
        ValueError: An empty prompt or target, one of which the tokenizer knows no word, a prompt
            longer than the model can read, a mask with gaps, ids outside the vocabulary, or
            targets that do not match the prompts in number.
    """
    prompts = _as_given(prompts)
    texts, rows = _prompt_rows(model, prompts, prepend_bos, attention_mask)
    single = isinstance(prompts, str) or (isinstance(prompts, Tensor) and len(rows) == 1)
    to_ids = Targets(model, texts, rows, prepend_bos)
    targets, others = to_ids(target, single, "target"), to_ids(other, single, "other")
    full = [row + list(t[:-1]) for row, t in zip(rows, targets, strict=True)] if targets else rows
    check_length(model, full)
    batch = padded(model, full)
    lengths = torch.tensor([len(row) for row in rows], device=batch.tokens.device)
    return replace(batch, prompt_lengths=lengths, targets=targets, others=others)


def padded(model: LensModel, rows: Sequence[Sequence[int]]) -> Batch:
    """Rows of token ids as a batch without targets, where the model takes its tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(list(row))
    device = device_of(model)
    lengths = lengths.to(device)
    return Batch(tokens.to(device), lengths, lengths)


def one_prompt(prompt: Prompts) -> str | Int[Tensor, " pos"]:
    """The one prompt that is meant, as text or token ids [pos].

    Raises:
        ValueError: There are several, or none.
    """
    given = _as_given(prompt)
    if isinstance(given, Tensor) and given.ndim == 2 and len(given) == 1:
        return given[0]
    if isinstance(given, str) or (isinstance(given, Tensor) and given.ndim == 1):
        return given
    found = f"{len(given)} prompts" if isinstance(given, list | Tensor) else repr(given)
    raise ValueError(f"expected one prompt, text or token ids [pos] or [1, pos]; found {found}")


def _as_given(prompts: Any) -> Any:
    """Arrays, and lists of ids of one length, as a tensor; whatever else there is as it is."""
    if isinstance(prompts, np.ndarray) and prompts.dtype.kind in "biuf":
        integers = prompts.dtype.kind in "iu"
        return torch.from_numpy(prompts.astype(np.int64) if integers else prompts.copy())
    if not isinstance(prompts, list | tuple) or not prompts:
        return prompts
    if all(_is_id(one) for one in prompts):
        return torch.tensor([int(one) for one in prompts])
    rows = [one.tolist() if isinstance(one, Tensor | np.ndarray) else one for one in prompts]
    if _are_rows(rows):
        listed = [[int(i) for i in row] for row in rows]
        return torch.tensor(listed) if len({*map(len, listed)}) == 1 else listed
    return prompts


def _are_rows(given: Any) -> bool:
    """Whether these are lists of token ids."""
    listed = isinstance(given, list) and bool(given)
    return listed and all(isinstance(r, list | tuple) and r and all(map(_is_id, r)) for r in given)


def _is_id(one: Any) -> bool:
    return isinstance(one, int | np.integer) and not isinstance(one, bool)


def _prompt_rows(
    model: LensModel,
    prompts: Any,
    prepend_bos: bool | None,
    attention_mask: Tensor | None,
) -> tuple[list[str] | None, list[list[int]]]:
    """The prompts' texts, if they are texts, and their unpadded tokens."""
    if isinstance(prompts, Tensor):
        integers = not (prompts.is_floating_point() or prompts.dtype is torch.bool)
        if not integers or prompts.ndim not in (1, 2) or prompts.numel() == 0:
            raise ValueError(
                f"expected token ids [pos] or [batch, pos], found {prompts.dtype} of shape"
                f" {tuple(prompts.shape)}"
            )
        rows = _unpad(prompts if prompts.ndim == 2 else prompts[None], attention_mask)
        for index, row in enumerate(rows):
            check_ids(model, row, f"prompt {index}")
        return None, rows
    if attention_mask is not None:
        raise ValueError(
            "attention_mask goes with token prompts of one length; texts are padded here"
        )
    if _are_rows(prompts):
        for index, row in enumerate(prompts):
            check_ids(model, row, f"prompt {index}")
        return None, prompts
    several = list(prompts) if isinstance(prompts, Iterable) else []
    texts = [prompts] if isinstance(prompts, str) else several
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"expected a prompt, a list of prompts or a tensor of token ids, found {prompts!r}"
        )
    rows = [text_to_ids(model, text, prepend_bos) for text in texts]
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if not text or not row:
            raise ValueError(f"prompt {index} is empty; give it some text to read")
        check_ids(model, row, f"prompt {index}")
        _check_words(model.tokenizer, text, row, index)
    return texts, rows


def _check_words(tokenizer: Any, text: str, row: Sequence[int], index: int) -> None:
    """Refuse a text of which the tokens hold nothing; say which words the model does not read."""
    lost = lost_words(tokenizer, text, row)
    if lost and len(lost) == len(text.split()):
        raise ValueError(
            f"the tokenizer knows no word of prompt {index}, {text[:60]!r}: the model would read"
            f" {''.join(token_texts(tokenizer, row))[:60]!r}; give it words that it has"
        )
    if lost:
        warnings.warn(
            f"the tokenizer does not know {', '.join(map(repr, lost[:3]))} in prompt {index},"
            f" {text[:60]!r}: the model reads {''.join(token_texts(tokenizer, row))[:60]!r}",
            stacklevel=1,
        )


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
