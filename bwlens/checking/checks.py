"""The checks, one after the other, each a finding and none an exception."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from bwlens.checking.numbers import batch_alone, gradients, head, steps
from bwlens.checking.report import CheckReport, Finding
from bwlens.checking.state import State
from bwlens.checking.texts import tokenizer
from bwlens.checking.twin import same_as_hugging_face
from bwlens.gradient.guard import trusted
from bwlens.gradient.probe import UntrueGradientError
from bwlens.model.identity import model_label
from bwlens.model.probing import logits_and, probe_batch
from bwlens.model.prompts import Batch, Prompts, make_batch, padded
from bwlens.model.sites import MATRICES, available_matrices, check_model, resolve_layers
from bwlens.model.tokens import text_to_ids
from bwlens.runs.parts import bars_can_be_drawn

_REFUSALS = (NotImplementedError, ValueError, RuntimeError, TypeError, AttributeError, IndexError)
"""What a check may meet in a model that it cannot run on; told, not raised."""


def check(
    model: Any,
    prompt: Prompts | None = None,
    *,
    matrices: Sequence[str] | str | None = None,
    layers: Iterable[int] | int | None = None,
    progress: bool = True,
) -> CheckReport:
    """Is what bwlens says of this model true? Measured on the model itself, in seconds.

    - *head*: `readout` of the last stream gives the model's own logits.
    - *gradient*: x^T delta equals what autograd gives for the stored parameter, for each matrix and
      layer.
    - *step*: a small step along -delta at the matrix' output changes the loss by what ||delta||
      says (a central difference; also where weights are packed).
    - *batch*: prompts of several lengths at once give what each gives alone.
    - *tokenizer*: a text survives its tokens, and they fit the vocabulary.
    - *Hugging Face*: the bridge gives the logits of the model that it wraps, run without it.
    - *left as it was*: weights, `.grad`, `requires_grad`, modes, hooks, random numbers.

    The user's hooks are off meanwhile. A check that the model does not admit is "not checked", with
    the reason, and so is one that rounding decides.

    Args:
        model: A TransformerBridge or HookedTransformer, with or without a tokenizer.
        prompt: What to run it on, a text or tokens; None for four tokens from all over the
            vocabulary.
        matrices: Names out of `bwlens.MATRICES`; None for all that the model has.
        layers: Layers from 0, negative ones from the end; None for all. Steps are taken in three
            of them.
        progress: Show a bar.

    Raises:
        TypeError: Not a TransformerLens model.
        ValueError: A prompt, matrix or layer that the model does not have.
        NotImplementedError: An encoder, a remote model, or one without blocks.

    Example:
        >>> report = check(model)  # doctest: +SKIP
        >>> report.ok  # doctest: +SKIP
        True
    """
    check_model(model)
    started = time.perf_counter()
    names = _names(model, matrices)
    chosen = resolve_layers(model, layers)
    batch = _batch(model, prompt)
    text = prompt if isinstance(prompt, str) else None
    logits_and(model, set(), batch.tokens)  # a bridge hangs hooks of its own in its first pass
    before = State.of(model)
    todo: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("head", lambda: [head(model, batch)]),
        ("gradient", lambda: gradients(model, batch, names, chosen)),
        ("step", lambda: steps(model, batch, names, chosen)),
        ("batch", lambda: [batch_alone(model, names, chosen)]),
        ("tokenizer", lambda: [tokenizer(model, text)]),
        ("Hugging Face", lambda: [same_as_hugging_face(model, batch)]),
    ]
    findings: list[Finding] = []
    for name, run in _shown(todo, progress):
        try:
            with trusted():
                findings += run()
        except _REFUSALS as error:
            verdict = "fails" if isinstance(error, UntrueGradientError) else "not checked"
            findings.append(Finding(name, verdict, "-", " ".join(str(error).split())))
    findings.append(before.compared(State.of(model)))
    return CheckReport(model_label(model), tuple(findings), time.perf_counter() - started)


def _names(model: Any, matrices: Sequence[str] | str | None) -> tuple[str, ...]:
    there = available_matrices(model)
    if matrices is None:
        return there
    names = (matrices,) if isinstance(matrices, str) else tuple(matrices)
    if unknown := [name for name in names if name not in there]:
        raise ValueError(
            f"this model has no {', '.join(map(repr, unknown))} that bwlens reads; it has"
            f" {', '.join(there) or f'none of {MATRICES}'}"
        )
    return names


def _batch(model: Any, prompt: Prompts | None) -> Batch:
    if prompt is None:
        return probe_batch(model)
    if isinstance(prompt, str):  # as it is read, also where the tokenizer does not know it
        prompt = torch.tensor(text_to_ids(model, prompt, None), dtype=torch.long)
    batch = make_batch(model, prompt)
    if len(batch) != 1 or batch.tokens.shape[1] < 2:
        raise ValueError(
            f"check takes one prompt of two tokens or more, found {len(batch)} of"
            f" {batch.tokens.shape[1]}"
        )
    return padded(model, batch.tokens.tolist())


def _shown(todo: list[Any], progress: bool) -> Iterator[Any]:
    """The checks one by one, behind a bar."""
    if not progress or torch.is_inference_mode_enabled() or not bars_can_be_drawn():
        yield from todo
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Checking", total=len(todo))
        for name, run in todo:
            bar.update(task, description=f"Checking {name}")
            yield name, run
            bar.advance(task)
