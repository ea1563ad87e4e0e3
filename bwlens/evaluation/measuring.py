"""One row of an evaluation: questions, the edit, answers, metrics, in this order and once."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

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


@dataclass(frozen=True, eq=False)
class Bench:
    """What all records of an evaluation are measured with.

    Attributes:
        model: A TransformerBridge or HookedTransformer.
        options: What is measured, and how.
        writer: Writes on with this model.
        prose: The sentences for perplexity as tokens; none for no perplexity.
        weights: Word weights of the records' reference texts.
    """

    model: Any
    options: Options
    writer: Writer
    prose: tuple[Row, ...]
    weights: metrics.TfIdf

    @staticmethod
    def of(
        model: Any, records: Sequence[Record], sentences: Sequence[str], options: Options
    ) -> Bench:
        """The bench for these records; `sentences` are what perplexity is measured on."""
        with in_eval_mode(model):
            writer = Writer(model)
        prose = prose_rows(model, sentences, options.prepend_bos)
        references = [text for record in records for text in record.reference_texts]
        return Bench(model, options, writer, prose, metrics.TfIdf.of(references))

    @cached_property
    def untouched(self) -> float:
        """Perplexity of the model as it is; measured while a change of nothing is applied."""
        return prose_perplexity(self.model, self.prose, self.options.batch_tokens)


@dataclass(frozen=True, eq=False)
class Said:
    """What an edited model said of a record, before it is judged.

    Attributes:
        answers: How probable both answers are, for each kind of prompt.
        greedy: Whether greedy text holds the target: after the edit's prompt, then paraphrases.
        texts: Sampled texts; None where none were due.
        perplexity: Of the prose; None where it was not due.
        spent: Seconds spent on answers, generation and perplexity.
    """

    answers: Mapping[str, Answers]
    greedy: Bool[Tensor, " prompts"]
    texts: Sequence[str] | None
    perplexity: float | None
    spent: Mapping[str, float]


def row_of(
    bench: Bench,
    method: Method,
    item: int,
    record: Record,
    questions: Questions,
    periodic: bool | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """A record's row, and the seconds spent: its questions, the edit, answers, metrics.

    What is measured for every so many records only is left out of the row of the others;
    `periodic` says whether it is wanted here in spite of that.

    Raises:
        ValueError: The record cannot be edited by this method.
        FloatingPointError: The edited model's logits are not finite.
    """
    change, seconds = _edited(bench, method, item, record)
    said = _said(bench, item, record, questions, change, periodic)
    row: dict[str, Any] = {
        "item": item,
        "case_id": record.case_id,
        "relation": record.relation or "",
        "method": method.name,
        "note": change.note,
        "norm": change.norm(),
        "seconds": math.nan if method.function is None else seconds,
        **_judged(said.answers),
        **_judged_texts(said, record, bench.weights),
    }
    return row, {"edit": seconds, **said.spent}


def _edited(bench: Bench, method: Method, item: int, record: Record) -> tuple[WeightChange, float]:
    """The change that a method makes of a record's fact, and how long it takes.

    It has the same random numbers whenever the record's turn is, and none of the user's.
    """
    device = device_of(bench.model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_seed(bench.options.seed, item))
        start = _now(bench.model)
        change = method(bench.model, record.edit, bench.options.prepend_bos)
        return change, _now(bench.model) - start


def _said(
    bench: Bench,
    item: int,
    record: Record,
    questions: Questions,
    change: WeightChange,
    periodic: bool | None,
) -> Said:
    """What the model says with a change, which is undone afterwards."""
    model, options = bench.model, bench.options
    texts, prose, greedy = None, None, []

    def due(every: int) -> bool:
        return bool(every) and (item % every == 0 if periodic is None else periodic)

    with change.applied(model), in_eval_mode(model), torch.no_grad():
        times = [_now(model)]
        answers = answers_of(model, questions, options.batch_tokens)
        if options.greedy_tokens:
            prompts = [*questions.prompts["rewrite"], *questions.prompts["paraphrase"]]
            target = record.edit.target_new
            greedy = bench.writer.greedy_contains(prompts, target, options.greedy_tokens)
        times.append(_now(model))
        if due(options.generation_every):
            prompts = [
                tuple(text_to_ids(model, text, options.prepend_bos))
                for text in record.generation_prompts
            ]
            seed = _seed(options.seed, record.case_id)
            texts = bench.writer.sampled(prompts, options.generation_tokens, options.top_k, seed)
        times.append(_now(model))
        if due(options.perplexity_every) and bench.prose:
            prose = (
                prose_perplexity(model, bench.prose, options.batch_tokens)
                if len(change)
                else bench.untouched
            )
        times.append(_now(model))
    spent = [end - start for start, end in itertools.pairwise(times)]
    return Said(
        answers,
        torch.tensor(greedy, dtype=torch.bool),
        texts,
        prose,
        dict(zip(("answers", "generation", "perplexity"), spent, strict=True)),
    )


def _judged_texts(said: Said, record: Record, weights: metrics.TfIdf) -> dict[str, float]:
    """The metrics of what was written, as far as it was."""
    row: dict[str, float] = {}
    if len(said.greedy):
        row["greedy"] = metrics.accuracy(said.greedy[:1])
        row["greedy_paraphrase"] = metrics.accuracy(said.greedy[1:])
    if said.texts is not None:
        row["GE"] = metrics.generation_entropy(said.texts)
        row["RS"] = metrics.consistency(said.texts, record.reference_texts, weights)
    if said.perplexity is not None:
        row["perplexity"] = said.perplexity
    return row


def _now(model: Any) -> float:
    if device_of(model).type == "cuda":
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
