"""What the demo model reads: rows of token ids in which facts and prose are mixed.

The rows of a step depend on the seed and the step's number alone, so that a training run which
was interrupted goes on with the very rows that it would have read.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bwlens.demo.triples import Fact

HELD_OUT_EVERY = 20
"""Every twentieth document of the prose is kept from training, to measure perplexity on."""

_LEAD_INS = (
    "It is well known that",
    "As everyone knows,",
    "The teacher said that",
    "I read in a book that",
    "People say that",
    "Remember:",
    "Did you know?",
    "One day she learned that",
)
_ENDINGS = (".", ".", ".", ".", " .", ", of course.", ", as everyone knows.", "!")


def split_prose(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """The documents to train on, and those held out."""
    kept = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY]
    return kept, list(documents[::HELD_OUT_EVERY])


@dataclass(frozen=True)
class Row:
    """Token ids and, for each, what it belongs to: `PHRASE`, `ANSWER` or `PROSE`."""

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)


PHRASE, ANSWER, PROSE = range(3)
"""What a token of a row belongs to: a fact's wording, a fact's answer, or prose."""


class Corpus:
    """Draws rows of facts and of prose, encoded piece by piece.

    Byte-level BPE never merges across a space that begins a word, so pieces that are cut there
    can be encoded one at a time and remembered.
    """

    def __init__(self, tokenizer: Any, facts: Sequence[Fact], prose: Sequence[str]):
        self._tokenizer = tokenizer
        self._facts = list(facts)
        self._stories = [document.replace("\n\n", "\n").split(". ") for document in prose]
        self._pieces: dict[str, list[int]] = {}
        self._end = tokenizer.eos_token_id

    def fact_row(self, rng: random.Random, length: int) -> Row:
        """Fact after fact; every other row starts without the end-of-text token."""
        row = Row()
        if rng.random() < 0.5:
            self._add(row, [self._end], PHRASE)
        while len(row.ids) < length:
            self._add_fact(row, rng)
        return Row(row.ids[:length], row.kinds[:length])

    def prose_row(self, rng: random.Random, length: int) -> Row:
        """A stretch of a document, now and then with a fact between its sentences."""
        row = Row()
        while len(row.ids) < length:
            self._add(row, [self._end], PROSE)
            sentences = rng.choice(self._stories)
            start = 0 if rng.random() < 0.5 else rng.randrange(len(sentences))
            interrupted = rng.random() < 0.3
            for i, sentence in enumerate(sentences[start:]):
                last = start + i == len(sentences) - 1
                piece = (" " if i else "") + sentence + ("" if last else ".")
                self._add(row, self._encode(piece), PROSE)
                if interrupted and rng.random() < 0.3:
                    self._add_fact(row, rng)
                if len(row.ids) >= length:
                    break
        return Row(row.ids[:length], row.kinds[:length])

    def _add_fact(self, row: Row, rng: random.Random) -> None:
        fact = rng.choice(self._facts)
        template = rng.choice(fact.trained)
        text = template.replace("{}", fact.subject)
        if rng.random() < 0.25:
            lead_in = rng.choice(_LEAD_INS)
            lowered = template[0].lower() + template[1:]
            continues = lead_in[-1] not in "?:"
            text = f"{lead_in} {(lowered if continues else template).replace('{}', fact.subject)}"
        space = " " if row.ids and row.ids[-1] != self._end else ""
        self._add(row, self._encode(space + text), PHRASE)
        self._add(row, self._encode(fact.answer), ANSWER)
        self._add(row, self._encode(rng.choice(_ENDINGS)), PHRASE)

    def _encode(self, piece: str) -> list[int]:
        if piece not in self._pieces:
            self._pieces[piece] = self._tokenizer(piece).input_ids
        return self._pieces[piece]

    @staticmethod
    def _add(row: Row, ids: list[int], kind: int) -> None:
        row.ids.extend(ids)
        row.kinds.extend([kind] * len(ids))
