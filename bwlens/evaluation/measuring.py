"""One row of an evaluation: a record edited, asked everything, and put back."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from bwlens.data.records import Record
from bwlens.edit import WeightChange
from bwlens.evaluation import metrics
from bwlens.evaluation.generation import Writer
from bwlens.evaluation.methods import Method
from bwlens.evaluation.prose_perplexity import prose_perplexity, prose_rows
from bwlens.evaluation.questions import (
    BATCH_TOKENS,
    Answers,
    Questions,
    Row,
    answers_of,
    questions_of,
)
from bwlens.model.passes import device_of, in_eval_mode
from bwlens.model.tokens import text_to_ids


@dataclass(frozen=True)
class Options:
    """How an evaluation measures.

    Attributes:
        generation_every: Texts are generated (GE, RS) for every so many records; 0 for none.
        generation_tokens: Their length with the prompt, as far as the context goes.
        top_k: They are sampled from so many tokens at each place.
        greedy_tokens: Length of the greedy continuations that should hold the target; 0 for none.
        perplexity_every: Perplexity is measured for every so many records; 0 for none.
        prepend_bos: Whether prompts get a BOS token; None is the model's own default.
        seed: Of sampled texts, and of methods that draw at random.
        batch_tokens: Tokens of a forward pass, padding included.

    Raises:
        ValueError: A number is too small.
    """

    generation_every: int = 10
    generation_tokens: int = 100
    top_k: int = 5
    greedy_tokens: int = 10
    perplexity_every: int = 10
    prepend_bos: bool | None = None
    seed: int = 0
    batch_tokens: int = BATCH_TOKENS

    def __post_init__(self) -> None:
        for name in ("generation_tokens", "top_k", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("generation_every", "greedy_tokens", "perplexity_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 (never) or more")

    @staticmethod
    def of(named: Mapping[str, Any]) -> Options:
        """Options by name.

        Raises:
            ValueError: There is no such option, or a number is too small.
        """
        known = [field.name for field in fields(Options)]
        if unknown := [name for name in named if name not in known]:
            raise ValueError(f"unknown option {unknown[0]!r}; there are {', '.join(known)}")
        return Options(**named)


class Gauge:
    """Measures what a method does to a model on one record after another.

    Args:
        model: A TransformerBridge or HookedTransformer.
        records: The records.
        sentences: What perplexity is measured on; none for no perplexity.
        options: What is measured, and how.

    Attributes:
        spent: Seconds spent so far on edits, answers, generation and perplexity.
        prose: The sentences as tokens.
    """

    def __init__(
        self,
        model: Any,
        records: Sequence[Record],
        sentences: Sequence[str] = (),
        options: Options | None = None,
    ) -> None:
        self._model, self._records = model, records
        self._options = options or Options()
        with in_eval_mode(model):
            self._writer = Writer(model)
        self.prose: tuple[Row, ...] = prose_rows(model, sentences, self._options.prepend_bos)
        references = [text for record in records for text in record.reference_texts]
        self._weights = metrics.TfIdf.of(references)
        self._held: tuple[int, Questions] | None = None
        self.spent = {"edit": 0.0, "answers": 0.0, "generation": 0.0, "perplexity": 0.0}

    def row(self, method: Method, item: int, periodic: bool | None = None) -> dict[str, Any]:
        """Edit a record's fact, measure, undo.

        What is measured for every so many records only is left out of the row of the others;
        `periodic` says whether it is wanted here in spite of that.

        Raises:
            ValueError: The record cannot be tokenised, or not be edited by this method.
            FloatingPointError: The edited model's logits are not finite.
        """
        record, options = self._records[item], self._options
        questions = self._questions(item)
        with self._own_luck(item), self._timed("edit") as seconds:
            change = method(self._model, record.edit, self._options.prepend_bos)
        row: dict[str, Any] = {
            "item": item,
            "case_id": record.case_id,
            "relation": record.relation or "",
            "method": method.name,
            "note": change.note,
            "norm": change.norm(),
            "seconds": math.nan if method.function is None else seconds[0],
        }

        def due(every: int) -> bool:
            return bool(every) and (item % every == 0 if periodic is None else periodic)

        with change.applied(self._model), in_eval_mode(self._model), torch.no_grad():
            with self._timed("answers"):
                row |= _judged(answers_of(self._model, questions, options.batch_tokens))
                row |= self._greedy(record, questions)
            if due(options.generation_every):
                with self._timed("generation"):
                    row |= self._generated(record)
            if due(options.perplexity_every) and self.prose:
                with self._timed("perplexity"):
                    row["perplexity"] = self._perplexity(change)
        return row

    def _questions(self, item: int) -> Questions:
        """The record's tokens, kept while the methods take turns on it."""
        if self._held is None or self._held[0] != item:
            made = questions_of(self._model, self._records[item], self._options.prepend_bos)
            self._held = (item, made)
        return self._held[1]

    def _greedy(self, record: Record, questions: Questions) -> dict[str, float]:
        """Whether greedy text holds the target, without teacher forcing."""
        if not self._options.greedy_tokens:
            return {}
        prompts = [*questions.prompts["rewrite"], *questions.prompts["paraphrase"]]
        target, most = record.edit.target_new, self._options.greedy_tokens
        held = torch.tensor(self._writer.greedy_contains(prompts, target, most))
        return {
            "greedy": metrics.accuracy(held[:1]),
            "greedy_paraphrase": metrics.accuracy(held[1:]),
        }

    def _generated(self, record: Record) -> dict[str, float]:
        options = self._options
        prompts = [
            tuple(text_to_ids(self._model, text, options.prepend_bos))
            for text in record.generation_prompts
        ]
        seed = _seed(options.seed, record.case_id)
        texts = self._writer.sampled(prompts, options.generation_tokens, options.top_k, seed)
        return {
            "GE": metrics.generation_entropy(texts),
            "RS": metrics.consistency(texts, record.reference_texts, self._weights),
        }

    def _perplexity(self, change: WeightChange) -> float:
        return self._perplexity_now() if len(change) else self._untouched

    @cached_property
    def _untouched(self) -> float:
        """Perplexity of the model as it is; measured while a change of nothing is applied."""
        return self._perplexity_now()

    def _perplexity_now(self) -> float:
        return prose_perplexity(self._model, self.prose, self._options.batch_tokens)

    @contextmanager
    def _own_luck(self, item: int) -> Iterator[None]:
        """The same random numbers for a record whenever its turn is, and none of the user's."""
        device = device_of(self._model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(self._options.seed, item))
            yield

    @contextmanager
    def _timed(self, what: str) -> Iterator[list[float]]:
        """Add the seconds spent within; the list yielded holds them afterwards."""
        seconds: list[float] = []
        start = self._now()
        yield seconds
        seconds.append(self._now() - start)
        self.spent[what] += seconds[0]

    def _now(self) -> float:
        if device_of(self._model).type == "cuda":
            torch.cuda.synchronize()  # what was asked of the GPU is done then
        return time.perf_counter()


def _judged(answers: Mapping[str, Answers]) -> dict[str, float]:
    """Both families of metrics, for each kind of prompt."""
    row: dict[str, float] = {}
    for kind, a in answers.items():
        letter, name = ("E", "efficacy") if kind == "rewrite" else (kind[0].upper(), kind)
        wanted, other, right = a.nll_new, a.nll_true, a.right_new
        if kind == "neighbourhood":
            wanted, other, right = a.nll_true, a.nll_new, a.right_true
        row[f"{letter}S"] = metrics.success(wanted, other)
        row[f"{letter}M"] = metrics.magnitude(wanted, other)
        row[name] = metrics.accuracy(right)
    return row


def _seed(seed: int, item: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{item}".encode()).digest()[:7], "big")
