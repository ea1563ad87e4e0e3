"""What every experiment is: rows measured on a batch of edits, their summary, a figure.

An experiment is a frozen dataclass of its settings, which measures the gradients of a batch of
edits. bwlens/experiments/running.py makes the batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bwlens.gradient.capturing import Gradients
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.gradient.probe import UntrueGradientError
from bwlens.model.prompts import Edit
from bwlens.model.segments import SEGMENTS
from bwlens.model.sites import (
    Layers,
    Site,
    Tap,
    available_matrices,
    find_taps,
    resolve_layers,
    resolve_matrices,
)
from bwlens.reading.effect import EffectOf
from bwlens.reading.trust import true_effects
from bwlens.runs.intervals import summarize
from bwlens.runs.parts import Failure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

E = TypeVar("E", bound="Experiment")


@dataclass(frozen=True, eq=False)
class Reading:
    """What experiments are given of a batch of edits."""

    model: Any
    edits: tuple[Edit, ...]
    grads: Gradients
    """x and delta of every matrix that some experiment reads."""
    segments: Int[Tensor, "batch pos"]
    """The index in `SEGMENTS` of each token; -1 at padding."""
    prepend_bos: bool | None = None
    layers: tuple[int, ...] | None = None
    """This experiment's layers; `grads` may have others as well."""

    @property
    def answers(self) -> Int[Tensor, " batch"]:
        """The model's own next token after each prompt."""
        return self.grads.next_logits.argmax(-1)

    @property
    def targets(self) -> Int[Tensor, " batch"]:
        """The first token of each target."""
        first = [ids[0] for ids in self.grads.batch.targets]
        return torch.tensor(first, device=self.segments.device)

    def sites(self, matrices: Sequence[str]) -> list[Site]:
        """The captured sites of some matrices, in the experiment's layers."""
        return [
            site
            for site in self.grads
            if site.matrix in matrices and (self.layers is None or site.layer in self.layers)
        ]

    def segment_of(self, gradient: LowRankGradient) -> Int[Tensor, " n"]:
        """The segment of each row of a gradient."""
        assert gradient.prompt is not None
        assert gradient.pos is not None
        codes = self.segments.to(gradient.device)
        return codes[gradient.prompt, gradient.pos]

    def by_segment(
        self, gradient: LowRankGradient, values: Float[Tensor, "n k"]
    ) -> tuple[Float[Tensor, "batch segment k"], Int[Tensor, "batch segment k"]]:
        """Means of the rows' values over each prompt's segments, nan values left out; counts."""
        n_segments = len(SEGMENTS)
        assert gradient.prompt is not None
        group = gradient.prompt * n_segments + self.segment_of(gradient)
        there = ~values.isnan()
        shape = (len(self.edits) * n_segments, values.shape[1])
        total = values.new_zeros(shape).index_add(0, group, values.nan_to_num(0.0))
        counts = torch.zeros(shape, dtype=torch.long, device=values.device)
        counts = counts.index_add(0, group, there.long())
        means = (total / counts).unflatten(0, (-1, n_segments))
        return means, counts.unflatten(0, (-1, n_segments))


@dataclass(frozen=True)
class Experiment(ABC):
    """An experiment's settings, and how it is measured, summarised and drawn.

    Attributes:
        layers: Layers from 0, negative ones from the end; None for all.
    """

    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = ""
    """What it is called on the command line and in files."""
    title: ClassVar[str] = ""
    """What it is about, in a few words."""
    source: ClassVar[str] = ""
    """The paper's figures."""
    caption: ClassVar[str] = ""
    """How to read the figure."""
    published: ClassVar[str] = ""
    """What the published figure shows."""
    in_paper: ClassVar[bool] = True
    """Whether the paper has it."""
    needs: ClassVar[tuple[str, ...] | None] = ()
    """Matrices to capture where the experiment has no field `matrices`."""

    @abstractmethod
    def measure(self, reading: Reading) -> pd.DataFrame:
        """Tidy rows of a batch; the column `item` is the place in the batch."""

    by: ClassVar[tuple[str, ...]] = ()
    """Columns of the rows that make a group of the summary."""
    values: ClassVar[tuple[str, ...]] = ()
    """Columns whose means are in the summary."""

    def summarize(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Means over prompts with counts and intervals: `quantity`, `mean`, `low`, `high`, `n`."""
        return summarize(rows, self.by, self.values)

    @abstractmethod
    def draw(self, summary: pd.DataFrame) -> Figure:
        """The figure."""

    def given(self, data: Any) -> Experiment:
        """This experiment, with what it takes from the data as a whole: nothing."""
        return self

    def wanted(self, model: Any) -> tuple[str, ...]:
        """The matrices whose gradients it reads."""
        asked = getattr(self, "matrices", self.needs)
        held = available_matrices(model)
        if asked is None:
            return held
        if missing := [matrix for matrix in asked if matrix not in held]:
            raise ValueError(
                f"{self.name}: this model has no {', '.join(missing)}; it has {', '.join(held)}"
            )
        return tuple(asked)

    @classmethod
    def of(cls: type[E], model: Any, layers: Layers, **settings: Any) -> E:
        """The experiment as a call sets it: layers of any form, `matrices` one or several.

        Raises:
            ValueError: A layer that the model does not have, or no such matrix.
        """
        if settings.get("matrices") is not None:
            settings["matrices"] = resolve_matrices(settings["matrices"])
        chosen = None if layers is None else tuple(resolve_layers(model, layers))
        return cls(layers=chosen, **settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, as JSON holds them."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in held.items()}


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What an experiment found: rows, their summary, a figure.

    Attributes:
        experiment: The experiment with its settings.
        rows: Tidy rows, one or more for each edit; `item` is the edit's index in the data.
        failures: The edits that could not be measured.
    """

    experiment: Experiment
    rows: pd.DataFrame
    failures: tuple[Failure, ...] = ()

    @cached_property
    def summary(self) -> pd.DataFrame:
        """Means over prompts with counts `n` and 95 % bootstrap intervals `low`, `high`.

        Raises:
            ValueError: There are no rows.
        """
        if not len(self.rows):
            raise ValueError(
                f"{self.experiment.name} gave no rows for this model and these edits, so there is"
                f" nothing to summarise or draw"
            )
        return self.experiment.summarize(self.rows)

    def figure(self) -> Figure:
        """The experiment's figure (matplotlib)."""
        return self.experiment.draw(self.summary)

    def __repr__(self) -> str:
        n = self.rows["item"].nunique() if len(self.rows) else 0
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"Result({self.experiment.name}: {n} prompts, {len(self.rows)} rows{failed})"

    def _repr_html_(self) -> str:
        import base64

        if not len(self.rows):
            return f"<p>{self!r}</p>"
        png, size = self.figure()._repr_png_()  # pyright: ignore[reportAttributeAccessIssue]
        image = base64.b64encode(png).decode()
        table = self.summary.to_html(max_rows=10, index=False, float_format="%.4g")
        return (
            f"<p><b>{self.experiment.title}</b> ({self.experiment.source})</p>"
            f'<img alt="{self.experiment.title}" width="{size["width"]}"'
            f' src="data:image/png;base64,{image}">{table}'
        )


def check_segment(segment: str) -> None:
    """Raise a ValueError that names all segments if there is none of this name."""
    if segment not in SEGMENTS:
        raise ValueError(f"no segment {segment!r}; expected one of {', '.join(SEGMENTS)}")


def measured_effects(
    task: EffectOf, cells: Sequence[tuple[Site, int]], deltas: Sequence[Tensor]
) -> Float[Tensor, "cell d_vocab"]:
    """What steps on cells do to the words; nan where no step size shows it, or delta is zero.

    Of thousands of cells some have a delta so short that no step is both linear and above rounding:
    they are left out, where `true_effects` refuses them.
    """
    try:
        return true_effects(task, cells, deltas)[0]
    except UntrueGradientError:
        found = task.of(cells)
        return found.scores.masked_fill(~found.measured[:, None], float("nan"))


def check_effects(name: str, model: Any, matrices: Sequence[str]) -> None:
    """Refuse matrices of a mixture's experts, whose effects are not read.

    Raises:
        NotImplementedError: The matrix.
    """
    for tap in find_taps(model, list(matrices)):
        if not isinstance(tap, Tap) or tap.routing is not None:
            raise NotImplementedError(
                f"{name}: {', '.join(tap.matrices)} is a mixture of experts in some layer, where a"
                f" token has a step of its own in each expert; its effect is not read"
            )
