"""Figure 26: the smallest step that flips the answer, by layer and method, and what it breaks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bwlens.data.given import Edits
from bwlens.edit.given import FIRST_ONLY
from bwlens.edit.shift import forward_pass_shift
from bwlens.edit.smallest import smallest_steps
from bwlens.experiments.base import Experiment, Reading, Result
from bwlens.experiments.columns import frame
from bwlens.experiments.own_steps import (
    Change,
    Step,
    Stepped,
    dense_taps,
    full_matrix,
    low_rank,
    padded,
    stepped,
)
from bwlens.experiments.running import run
from bwlens.model.prompts import Batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, resolve_layers
from bwlens.runs.intervals import summarize

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

METHODS = ("SGD", "Adam", "forward pass shift")

_ADAM_EPS = 1e-8
_FACTOR = 4.0  # Steps are raised or lowered by this until one works and one does not.
_MOST = 8  # So many times at most.


@dataclass(frozen=True)
class StepSizes(Experiment):
    """The smallest step on W_out of one layer that makes the target's first token the answer.

    One step of each method, from the same model, each prompt by itself: SGD adds -step dL/dW, Adam
    (its first step, where both moments are the gradient's own) -step g / (|g| + 1e-8) entry by
    entry, the forward pass shift step outer(x, v), of the first token alone. Steps are found within
    `within`, by raising or lowering and then bisecting, in forward passes that a batch shares.

    Rows: `item`, `layer`, `method`, `flipped` (whether any step that was tried made the target the
    answer), `step` (nan where none did), `norm` (of the change, Frobenius, so that methods can be
    compared), `perplexity` of the text with the change, `perplexity_before`. All are nan where the
    target is the answer already. The summary has the mean of `log10_step` besides.

    Source: Backward Lens, figure 26.
    """

    within: float = 1.1
    """The step is at most this much above one that fails."""
    text: str | None = "demo"
    """What perplexity is measured on, see `bwlens.data.prose.read_prose`; None for nothing."""
    sentences: int = 5
    """How many sentences of it: each is read once for every prompt, layer and method."""

    name: ClassVar[str] = "step_sizes"
    title: ClassVar[str] = "Smallest step that flips the answer"
    source: ClassVar[str] = "Figure 26"
    caption: ClassVar[str] = (
        "How large must one step on one layer be for the target to become the answer, and what does"
        " that step cost in perplexity? Steps of different methods are in different units; their"
        " norms can be compared."
    )
    published: ClassVar[str] = (
        "the three methods need steps of different sizes, and what they cost differs by layer; the"
        " forward pass shift did best in layers 30 to 40 of GPT-2 xl's 48."
    )
    needs: ClassVar[tuple[str, ...] | None] = ("W_out",)

    def wanted(self, model: Any) -> tuple[str, ...]:
        """W_out; the settings are checked as well."""
        if not 1 < self.within < _FACTOR:
            raise ValueError(f"within is {self.within}; expected a factor from 1 to {_FACTOR:g}")
        if self.sentences < 1:
            raise ValueError(f"sentences is {self.sentences}; expected 1 or more")
        dense_taps(model, ["W_out"], resolve_layers(model, self.layers))
        return super().wanted(model)

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch."""
        prose = _Prose.of(reading, self.text, self.sentences)
        before = prose.perplexity({}) if prose else float("nan")
        open_ = (reading.answers != reading.targets.to(reading.answers)).cpu()
        columns = []
        for layer in resolve_layers(reading.model, self.layers):
            site = Site("W_out", layer)
            for method, direction in _directions(reading, site).items():
                step = _smallest(reading, site, direction, open_, self.within)
                ppl = [float("nan")] * len(step)
                for item, size in enumerate(step.tolist()):
                    if prose and math.isfinite(size):
                        change = direction.at(size, item)
                        ppl[item] = prose.perplexity({site: change})
                flipped = torch.where(open_, step.isfinite().float(), float("nan"))
                columns.append(
                    {
                        "item": np.arange(len(step)),
                        "layer": layer,
                        "method": method,
                        "flipped": flipped.numpy(),
                        "step": step.numpy(),
                        "norm": (step * direction.norms.cpu()).numpy(),
                        "perplexity": np.array(ppl),
                        "perplexity_before": before,
                    }
                )
        return frame(columns)

    def summarize(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Means by layer and method, of prompts whose answer could be flipped."""
        rows = rows.assign(log10_step=rows["step"].map(math.log10, na_action="ignore"))
        values = ["log10_step", "norm", "flipped", "perplexity", "perplexity_before"]
        return summarize(rows, ["layer", "method"], values)

    def draw(self, summary: pd.DataFrame) -> Figure:
        """Step size, norm of the change and perplexity by layer, a line for each method."""
        import pandas as pd

        from bwlens.show.drawing import panels

        before = summary[summary["quantity"] == "perplexity_before"].groupby("layer").head(1)
        before = before.assign(quantity="perplexity", method="before")
        shown = {"log10_step": "log10 of the step", "norm": "norm of the change"}
        if len(before):
            shown["perplexity"] = "perplexity"
        held = pd.concat([summary, before])
        rows = [held[held["quantity"] == name] for name in shown]
        figure, axes = panels(held, list(shown.values()), rows, "method", [*METHODS, "before"], "")
        axes[1].set_ylim(bottom=0)
        return figure


def step_sizes(
    model: LensModel,
    records: Edits,
    *,
    layers: Layers = None,
    within: float = 1.1,
    text: str | None = "demo",
    sentences: int = 5,
    **options: Any,
) -> Result:
    """The smallest step of SGD, Adam and the forward pass shift that flips each answer.

    The settings are those of `StepSizes`, the options those of `run`.

    Raises:
        ValueError: A setting out of range, or a text that cannot be read.
        NotImplementedError: A layer is a mixture of experts.
    """
    task = StepSizes.of(model, layers, within=within, text=text, sentences=sentences)
    return run(task, model, records, **options)


@dataclass(frozen=True, eq=False)
class _Direction:
    """What a step of size 1 adds to a matrix, prompt by prompt.

    `build(rows, step)` is the change of some prompts of the batch; `norms` its length for each.
    """

    build: Callable[[slice, Step], Change]
    norms: Float[Tensor, " batch"]

    def every(self, steps: Float[Tensor, " batch"]) -> Change:
        """Each prompt's step."""
        return self.build(slice(None), steps)

    def at(self, step: float, item: int) -> Change:
        """One prompt's step, for whatever passes."""
        return self.build(slice(item, item + 1), step)


def _directions(reading: Reading, site: Site) -> dict[str, _Direction]:
    x, delta = padded(reading.grads[site], reading.grads.batch)
    gradient = x.mT @ delta
    adam = gradient / (gradient.abs() + _ADAM_EPS)
    # Zero rows for prompts that are answered already.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", FIRST_ONLY, UserWarning)  # as the figure does it
        shift = forward_pass_shift(
            reading.model,
            list(reading.edits),
            layer=site.layer,
            lr=1.0,
            tokens="first",
            prepend_bos=reading.prepend_bos,
        )
    kept = [item for item, lr in enumerate(shift.details["lr"]) if lr]
    key, value = (rows.new_zeros(len(x), 1, rows.shape[2]) for rows in (x, delta))
    if kept:
        key[kept, 0] = shift[site].x.to(key)
        value[kept, 0] = shift[site].delta.to(value)
    return {
        "SGD": _Direction(
            lambda rows, step: low_rank(x[rows], -delta[rows], step), _norms(gradient)
        ),
        "Adam": _Direction(lambda rows, step: full_matrix(-adam[rows], step), _norms(adam)),
        "forward pass shift": _Direction(
            lambda rows, step: low_rank(key[rows], value[rows], step),
            key.norm(dim=(1, 2)) * value.norm(dim=(1, 2)),
        ),
    }


def _norms(matrices: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrices)


def _smallest(
    reading: Reading,
    site: Site,
    direction: _Direction,
    open_: Bool[Tensor, " batch"],
    within: float,
) -> Float[Tensor, " batch"]:
    """The smallest steps of the open prompts, in passes that all share; nan where none works.

    They are searched from where the MLP's output moves by its own length.
    """
    model, batch = reading.model, reading.grads.batch
    taps = dense_taps(model, ["W_out"], [site.layer])

    def passed(steps: Tensor) -> Stepped:
        return stepped(model, batch, {site: direction.every(steps)}, taps)

    def works(steps: Tensor) -> Tensor:
        answers = passed(steps).last_logits(batch).argmax(-1)
        return (answers == reading.targets.to(answers)).cpu()

    still = stepped(model, batch, {}, taps).z[site]
    moved = passed(torch.ones(len(batch))).z[site]
    first = still.norm(dim=1) / (moved - still).norm(dim=1)
    first = torch.where(first.isfinite() & (first > 0), first, 1.0).cpu()
    return smallest_steps(works, first, within=within, most=_MOST, factor=_FACTOR, searched=open_)


@dataclass(frozen=True, eq=False)
class _Prose:
    """A text whose perplexity is measured, as one batch."""

    model: Any
    batch: Batch

    @staticmethod
    def of(reading: Reading, source: str | None, sentences: int) -> _Prose | None:
        if source is None:
            return None
        from bwlens.data.prose import read_prose
        from bwlens.evaluation.prose_perplexity import prose_rows

        model = reading.model
        rows = prose_rows(model, read_prose(source)[:sentences], reading.prepend_bos)
        if not rows:
            raise ValueError(f"the text {source!r} has no sentence of two tokens or more")
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for at, row in enumerate(rows):
            tokens[at, : len(row)] = torch.tensor(row)
        device = reading.grads.batch.tokens.device
        tokens, lengths = tokens.to(device), lengths.to(device)
        return _Prose(model, Batch(tokens, lengths, lengths))

    def perplexity(self, changes: dict[Site, Change]) -> float:
        """exp of the mean NLL of every token but each sentence's first."""
        logits = stepped(self.model, self.batch, changes).logits[:, :-1]
        tokens, mask = self.batch.tokens[:, 1:].to(logits.device), self.batch.mask[:, 1:]
        scores = logits.logsumexp(-1) - logits.gather(-1, tokens[..., None])[..., 0]
        return float(scores[mask.to(scores.device)].double().mean().exp())
