"""Targets: what a model should say next, as token ids.

A target is taken exactly as it is written. "Paris" and " Paris" are different tokens to most
tokenizers; a blank that is likely missing is warned of, and never added.
"""

from __future__ import annotations

import operator
import unicodedata
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from bwlens.model.protocol import LensModel
from bwlens.model.tokenizers import lost_words
from bwlens.model.tokens import text_to_ids, token_texts

Target = str | int | Sequence[int] | Int[Tensor, "*n"] | np.ndarray
"""What a model should say next: text, a token id, or several."""

_NO_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER", "MYANMAR")
"""Scripts that put no blanks between words, by Unicode's names of their characters."""

_ENDS = ",.;:!?)]}%=+"
"""What a word follows with a blank between; after quotes, slashes and the like it needs none."""


class MissingBlank(UserWarning):
    """A target begins without a blank where one is likely meant."""


def warn_of_edits(model: LensModel, edits: Iterable[Any]) -> None:
    """For runs over many records: one warning for all targets of edits that lack a blank."""
    pairs = [(e.text, t) for e in edits for t in (e.target_new, e.target_true) if t is not None]
    warn_of_blanks([pair for pair in pairs if lacks_blank(model, *pair)])


@contextmanager
def unwarned() -> Generator[None, None, None]:
    """No warnings of missing blanks within, as `warn_of_edits` has given the one for all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingBlank)
        yield


def lacks_blank(model: LensModel, prompt: str, target: str) -> bool:
    """Whether a target likely wants a blank before it that it has not.

    It starts with a letter or digit right after a word, and with a blank its tokens are others.
    """
    last, first = prompt[-1:], target[:1]
    if not first.isalnum() or not (last.isalnum() or (last and last in _ENDS)):
        return False
    if any(unicodedata.name(c, "").startswith(_NO_BLANKS) for c in (last, first)):
        return False
    return text_to_ids(model, target, False) != text_to_ids(model, f" {target}", False)


def warn_of_blanks(pairs: Sequence[tuple[str, str]]) -> None:
    """Say once of some prompts and targets without a blank what to write instead."""
    if pairs:
        prompt, target = pairs[0]
        more = f" (and {len(pairs) - 1} more targets so)" if len(pairs) > 1 else ""
        warnings.warn(
            f"the target {target!r} begins without a blank, right after {prompt[-20:]!r}: if it is"
            f" a word of its own, write {f' {target}'!r}{more}",
            MissingBlank,
            stacklevel=1,  # its own place, where Python shows the same text once
        )


def check_ids(model: LensModel, ids: Sequence[int], what: str) -> None:
    """Refuse token ids that the model has no row for.

    Raises:
        ValueError: One is outside the vocabulary.
    """
    d_vocab = model.cfg.d_vocab
    if bad := [i for i in ids if not 0 <= i < d_vocab]:
        raise ValueError(f"{what}: token id {bad[0]} is outside the vocabulary of {d_vocab}")


@dataclass(frozen=True)
class Targets:
    """Turns targets as users write them into one tuple of token ids a prompt.

    Attributes:
        model: The model, whose tokenizer reads them.
        texts: The prompts' texts; None where they were given as tokens.
        rows: The prompts' tokens.
        prepend_bos: Whether the texts got a BOS.
    """

    model: LensModel
    texts: list[str] | None
    rows: list[list[int]]
    prepend_bos: bool | None

    def __call__(self, target: Any, single: bool, what: str) -> tuple[tuple[int, ...], ...]:
        """The ids of each prompt's target; `single` where one prompt was given, not a batch.

        Raises:
            ValueError: An empty target, one the tokenizer does not know, ids outside the
                vocabulary, or another number of targets than of prompts.
        """
        if target is None:
            return ()
        each = self._one_each(target, single)
        n = len(self.rows)
        if len(each) != n:
            raise ValueError(
                f"found {len(each)} {what}s for {n} prompts; give one for all, or one each (a"
                f" {what} of several token ids is a list of its own)"
            )
        ids = tuple(self._ids(index, one, what) for index, one in enumerate(each))
        ends = [(self._end(index), one) for index, one in enumerate(each)]
        texts = dict.fromkeys((end, one) for end, one in ends if isinstance(one, str))
        warn_of_blanks([pair for pair in texts if lacks_blank(self.model, *pair)])
        return ids

    def _one_each(self, target: Any, single: bool) -> list[Any]:
        """One target for each prompt."""
        target = target.tolist() if isinstance(target, np.ndarray) else target
        if isinstance(target, str | int) or (isinstance(target, Tensor) and target.ndim == 0):
            return [target] * len(self.rows)
        listed = list(target)
        if not single or (isinstance(target, Tensor) and target.ndim == 2):
            return listed
        # A batch of one prompt may have its one target in a list.
        return listed if len(listed) == 1 and not isinstance(listed[0], int) else [target]

    def _end(self, index: int) -> str:
        """How the prompt ends, as text."""
        if self.texts is not None:
            return self.texts[index]
        tokenizer = self.model.tokenizer
        return "" if tokenizer is None else token_texts(tokenizer, self.rows[index][-1:])[0]

    def _ids(self, index: int, target: Any, what: str) -> tuple[int, ...]:
        if isinstance(target, str):
            ids = self._text_ids(index, target)
            if lost := lost_words(self.model.tokenizer, target, ids):
                raise ValueError(
                    f"the {what} of prompt {index} is {target!r}, but the tokenizer does not know"
                    f" {lost[0]!r}; name a word that it has"
                )
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
        check_ids(self.model, ids, f"{what} of prompt {index}")
        return tuple(ids)

    def _text_ids(self, index: int, target: str) -> list[int]:
        """Tokens that the target adds to its prompt; on its own where the two would merge."""
        row = self.rows[index]
        if self.texts is not None:
            both = text_to_ids(self.model, self.texts[index] + target, self.prepend_bos)
            if both[: len(row)] == row and len(both) > len(row):
                return both[len(row) :]
        return text_to_ids(self.model, target, False)
