"""What every experiment is: rows measured on a batch of edits, their summary, a figure.

An experiment is a frozen dataclass of its settings. `run` takes it over any number of edits in
batches of like length: one forward and one backward pass a batch, shared by all experiments that
are run together, with everything reduced to a few numbers a prompt on the model's device, so that
memory does not grow with the number of prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bwlens.data.given import Edits, as_edits
from bwlens.gradient.capturing import Gradients, capture
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.gradient.objectives import NLL
from bwlens.gradient.probe import UntrueGradientError
from bwlens.model.prompts import Edit, make_batch
from bwlens.model.segments import SEGMENTS, segment_codes
from bwlens.model.sites import (
    Layers,
    Site,
    Tap,
    available_matrices,
    check_model,
    find_taps,
    resolve_layers,
    resolve_matrices,
)
from bwlens.model.targets import unwarned, warn_of_edits
from bwlens.reading.effect import EffectOf
from bwlens.reading.trust import true_effects
from bwlens.runs.intervals import summarize
from bwlens.runs.parts import Failure, Part, progress_bar

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

E = TypeVar("E", bound="Experiment")

MAX_MEMORY = 2**30
"""Bytes that the activations and gradients of a batch may take, by a rough estimate."""

_MOST_PROMPTS = 64


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


def run(
    experiment: Experiment,
    model: Any,
    records: Edits,
    *,
    prepend_bos: bool | None = None,
    max_memory: int = MAX_MEMORY,
    progress: bool = True,
) -> Result:
    """Run one experiment over edits, in memory.

    Args:
        experiment: With its settings.
        model: A TransformerBridge or HookedTransformer.
        records: Edits or records, one or several; `read_records` gives some.
        prepend_bos: Whether prompts get a BOS token; None is the model's own default.
        max_memory: Bytes that a batch may take, by a rough estimate.
        progress: Show a bar.

    Raises:
        ValueError: No edits, none that can be read, or settings that do not fit the model.
    """
    work = Batches([experiment], model, records, prepend_bos, max_memory)
    tables: list[pd.DataFrame] = []
    failures = list(work.failures)
    with progress_bar(experiment.title, sum(work.sizes), shown=progress) as advance:
        for number, size in enumerate(work.sizes):
            part = work(number)
            tables.append(part.tables[experiment.name])
            failures += part.failures
            advance(size)
    return Result(experiment, joined(tables), tuple(sorted(failures, key=lambda f: f.item)))


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows of all parts, in the order of the data."""
    import pandas as pd

    rows = pd.concat([table for table in tables if len(table)] or list(tables), ignore_index=True)
    if "item" not in rows:
        return rows
    return rows.sort_values("item", kind="stable", ignore_index=True)


class Batches:
    """Edits in batches of like length, and the work of some experiments on each.

    Edits that cannot be tokenised, or are too long for the model, are set aside as `failures`.

    Raises:
        ValueError: No edits, none that can be read, or settings that do not fit the model.
    """

    def __init__(
        self,
        experiments: Sequence[Experiment],
        model: Any,
        edits: Edits,
        prepend_bos: bool | None = None,
        max_memory: int = MAX_MEMORY,
    ) -> None:
        check_model(model)
        self._experiments, self._model, self._edits = list(experiments), model, as_edits(edits)
        self._prepend_bos = prepend_bos
        wanted = {m for experiment in experiments for m in experiment.wanted(model)}
        self._matrices = [m for m in available_matrices(model) if m in wanted]
        asked = [resolve_layers(model, experiment.layers) for experiment in experiments]
        self._layers = sorted({layer for layers in asked for layer in layers})
        lengths, self.failures = self._lengths()
        if not lengths:
            first = self.failures[0]
            raise ValueError(f"none of the {len(self._edits)} edits can be read; {first.message}")
        warn_of_edits(model, self._edits)
        self.batches = _plan(lengths, max(1, max_memory // memory_per_token(model, self._matrices)))

    @property
    def sizes(self) -> list[int]:
        """Number of edits of each batch."""
        return [len(batch) for batch in self.batches]

    @unwarned()
    def __call__(self, number: int) -> Part:
        """Measure one batch; where it fails as a whole, its edits one by one."""
        items = self.batches[number]
        try:
            return Part(self._measure(items))
        except (ValueError, FloatingPointError) as error:
            if len(items) == 1:
                return Part(self._nothing(), [self._failure(items[0], error)])
        parts, failures = [self._nothing()], []
        for item in items:
            try:
                parts.append(self._measure([item]))
            except (ValueError, FloatingPointError) as error:
                failures.append(self._failure(item, error))
        tables = {e.name: joined([part[e.name] for part in parts]) for e in self._experiments}
        return Part(tables, failures)

    def _measure(self, items: Sequence[int]) -> dict[str, pd.DataFrame]:
        edits = tuple(self._edits[item] for item in items)
        prompts = [edit.text for edit in edits]
        grads = capture(
            self._model,
            prompts,
            NLL([edit.target_new for edit in edits]),
            self._matrices or ("W_out",),
            self._layers if self._matrices else [len(self._model.blocks) - 1],
            prepend_bos=self._prepend_bos,
        )
        codes = segment_codes(self._model, edits, grads.batch, self._prepend_bos)
        tables = {}
        for experiment in self._experiments:
            layers = tuple(resolve_layers(self._model, experiment.layers))
            rows = experiment.measure(
                Reading(self._model, edits, grads, codes, self._prepend_bos, layers)
            )
            if len(rows):
                rows["item"] = torch.tensor(items)[torch.tensor(rows["item"].to_numpy())].numpy()
            tables[experiment.name] = rows
        return tables

    def _nothing(self) -> dict[str, Any]:
        import pandas as pd

        return {experiment.name: pd.DataFrame() for experiment in self._experiments}

    def _failure(self, item: int, error: Exception) -> Failure:
        # A batch of one calls its only prompt "prompt 0".
        message = str(error).replace("prompt 0", "the prompt")
        return Failure(item, f"edit {item} ({self._edits[item].text!r}): {message}")

    @unwarned()
    def _lengths(self) -> tuple[dict[int, int], tuple[Failure, ...]]:
        """Number of tokens of each edit that can be read, and what is wrong with the others."""
        lengths: dict[int, int] = {}
        failures: list[Failure] = []
        for item, edit in enumerate(self._edits):
            try:
                batch = make_batch(
                    self._model, edit.text, edit.target_new, prepend_bos=self._prepend_bos
                )
                lengths[item] = int(batch.lengths[0])
            except ValueError as error:
                failures.append(self._failure(item, error))
        return lengths, tuple(failures)


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


def memory_per_token(model: Any, matrices: Sequence[str]) -> int:
    """Bytes that a token takes in a forward and backward pass, by a rough estimate."""
    cfg = model.cfg
    d_model, n_layers = cfg.d_model, len(model.blocks)
    d_mlp = getattr(cfg, "d_mlp", None) or 4 * d_model
    # About thirty vectors of the residual stream's width and eight of the MLP's are kept for the
    # backward pass of each layer, and six of the vocabulary's for the loss.
    kept = n_layers * (30 * d_model + 8 * d_mlp) + 6 * cfg.d_vocab
    held = n_layers * len(matrices) * (d_model + d_mlp)
    return 4 * (kept + held)


def _plan(lengths: Mapping[int, int], most_tokens: int) -> list[list[int]]:
    """Edits of like length together, as many as a batch may hold of them."""
    batches: list[list[int]] = []
    for item in sorted(lengths, key=lambda item: (lengths[item], item)):
        size = len(batches[-1]) if batches else 0
        if size and size < _MOST_PROMPTS and (size + 1) * lengths[item] <= most_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def frame(columns: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows out of columns, piece by piece; single values are repeated."""
    import numpy as np
    import pandas as pd

    pieces = list(columns)
    if not pieces:
        return pd.DataFrame()
    held: dict[str, Any] = {}
    sizes = [max(np.size(value) for value in piece.values()) for piece in pieces]
    for name in pieces[0]:
        values = [
            np.broadcast_to(np.asarray(piece[name]).reshape(-1), (size,))
            for piece, size in zip(pieces, sizes, strict=True)
        ]
        held[name] = np.concatenate(values)
    return pd.DataFrame(held)


def segment_columns(
    reading: Reading, site: Site, values: Float[Tensor, "n k"], names: Sequence[str]
) -> dict[str, Any]:
    """Columns of a site's values averaged over each segment of each prompt, where it has tokens."""
    import numpy as np

    gradient = reading.grads[site]
    assert gradient.prompt is not None
    means, _ = reading.by_segment(gradient, values)
    group = gradient.prompt * len(SEGMENTS) + reading.segment_of(gradient)
    tokens = torch.bincount(group, minlength=len(reading.edits) * len(SEGMENTS))
    tokens = tokens.unflatten(0, (-1, len(SEGMENTS)))
    prompt, segment = tokens.nonzero(as_tuple=True)
    held = means[prompt, segment].cpu().numpy()
    return {
        "item": prompt.cpu().numpy(),
        "matrix": site.matrix,
        "layer": site.layer,
        "expert": site.expert_number,
        "segment": np.array(SEGMENTS)[segment.cpu().numpy()],
        "tokens": tokens[prompt, segment].cpu().numpy(),
        **{name: held[:, at] for at, name in enumerate(names)},
    }
