"""Figures 6 and 18-21: where the target and the answer stand in the readings of x and delta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.data.given import Edits
from bwlens.experiments.base import (
    Experiment,
    Reading,
    Result,
    check_effects,
    check_segment,
    measured_effects,
)
from bwlens.experiments.columns import frame, segment_columns
from bwlens.experiments.running import run
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.gradient.objectives import NLL
from bwlens.lens.asking import readings_of
from bwlens.lens.rows import READ_THROUGH
from bwlens.model.protocol import LensModel
from bwlens.model.segments import SEGMENTS
from bwlens.model.sites import Layers, Site
from bwlens.reading.effect import EffectOf, tempered
from bwlens.reading.readouts import readout
from bwlens.reading.standardised import head_by

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Ranked = Iterator[tuple[Site, Tensor]]

_TEN = 10
_AT_ONCE = 64
"""Cells whose effects on the whole vocabulary are kept at a time."""


@dataclass(frozen=True)
class TargetRank(Experiment):
    """Mean rank of the target and of the model's own answer over each segment's tokens.

    W_out is read through delta, W_in through x (0: most probable, d_vocab - 1: least, which of
    delta is promoted most); by the effect both are what a step on them does (0: raised most).

    Rows: `item`, `matrix`, `layer`, `segment`, `tokens`, `target_rank`, `answer_rank`; of how many
    of the tokens the target is at the very end, `top_share` and `bottom_share`; of how many target
    and answer are among the ten, `target_top_ten`, `target_bottom_ten`, `answer_top_ten`,
    `answer_bottom_ten`; `silent`, the share of tokens whose vector is zero: these have no reading
    and are left out of the means (the paper reads the final norm's bias there, the same rank for
    all); `unmeasured`, the share whose effect no step size shows, also left out.

    Source: Backward Lens, figures 6, 18 (target in delta), 19 (answer in delta), 20, 21 (x).
    """

    matrices: tuple[str, ...] = ("W_out", "W_in")
    normalize: bool = False
    """Read vectors at unit length (appendix H)."""
    read_by: str = "plain"
    """Of delta: "plain", "dual" or "cosine" (x is read plainly). Or "effect", a replay a token."""
    temper: float = 0.0
    """For the effect, as in `backward_lens`."""
    segments: tuple[str, ...] | None = None
    """Whose tokens are read, out of `bwlens.model.segments.SEGMENTS`; None for all."""

    name: ClassVar[str] = "target_rank"
    title: ClassVar[str] = "Rank of target and answer by segment"
    source: ClassVar[str] = "Figures 6, 18-21"
    caption: ClassVar[str] = (
        "Rank 0 is the most probable word. A target at the bottom of delta is what a descent"
        " step promotes most in this reading, which in deep models says what a step does near the"
        " top only; an answer at the top of x is what the layer already reads. Zero vectors are"
        " left out. Of a measured effect, rank 0 is the word that a step raises most."
    )
    published: ClassVar[str] = (
        "at the last token the target is at the bottom of delta in every layer; in the last"
        " layer all other tokens' deltas are zero, and share the rank that the final norm's"
        " bias gives."
    )
    by: ClassVar[tuple[str, ...]] = ("matrix", "layer", "segment")
    values: ClassVar[tuple[str, ...]] = (
        "target_rank",
        "answer_rank",
        "top_share",
        "bottom_share",
        "target_top_ten",
        "answer_top_ten",
        "target_bottom_ten",
        "answer_bottom_ten",
        "silent",
        "unmeasured",
    )

    def __post_init__(self) -> None:
        readings_of(self.read_by, self.normalize, self.temper, "plain")
        if self.read_by == "transported":
            raise ValueError("reading is 'transported'; here plain, dual, cosine or effect")
        for segment in self.segments or ():
            check_segment(segment)

    def wanted(self, model: Any) -> tuple[str, ...]:
        """The matrices; refused where effects are asked for and it is a mixture's."""
        if self.read_by == "effect":
            check_effects(self.name, model, self.matrices)
        return super().wanted(model)

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch."""
        chosen = self.segments or SEGMENTS
        codes = torch.tensor([SEGMENTS.index(segment) for segment in chosen])
        followed = torch.stack([reading.targets, reading.answers.to(reading.targets)], 1)
        ranked = self._by_effect if self.read_by == "effect" else self._by_vectors
        least = reading.model.cfg.d_vocab - 1
        columns = []
        for site, ranks in ranked(reading, codes, followed):
            gradient = reading.grads[site]
            ends = [ranks[:, 0] == 0, ranks[:, 0] == least]
            tens = [ranks < _TEN, ranks > least - _TEN]
            said = torch.cat([ranks, torch.stack(ends, 1), *tens], 1).to(ranks)
            said = said.masked_fill(ranks[:, :1].isnan(), float("nan"))
            factor = gradient.delta if self.read_by == "effect" else _vectors(gradient, site)
            silent = ~factor.any(1)
            without = torch.stack([silent, ranks[:, 0].isnan() & ~silent], 1)
            values = torch.cat([said, without.to(said)], 1)
            there = segment_columns(reading, site, values, self.values)
            kept = np.isin(there["segment"], chosen)
            columns.append({k: v[kept] if np.ndim(v) else v for k, v in there.items()})
        return frame(columns)

    def _by_vectors(self, reading: Reading, codes: Tensor, followed: Tensor) -> Ranked:
        """Ranks of the followed words by token, nan where there is no reading."""
        for site in reading.sites(self.matrices):
            gradient = reading.grads[site]
            assert gradient.prompt is not None
            here = torch.isin(reading.segment_of(gradient), codes.to(gradient.device))
            vectors = _vectors(gradient, site).masked_fill(~here[:, None], 0.0)  # costs nothing
            wanted = followed.to(gradient.device)[gradient.prompt]
            of_delta = READ_THROUGH[site.matrix] == "delta"
            head = head_by(reading.model, self.read_by if of_delta else "plain")
            read = readout(head, vectors, top_k=1, targets=wanted, normalize=self.normalize)
            assert read.ranks is not None
            ranks = read.ranks.to(gradient.device, torch.float64)
            yield site, ranks.masked_fill(read.zero.to(ranks.device)[:, None], float("nan"))

    def _by_effect(self, reading: Reading, codes: Tensor, followed: Tensor) -> Ranked:
        """The same of what a step on each token does, prompt by prompt."""
        grads, sites = reading.grads, reading.sites(self.matrices)
        ranks = {site: torch.full((grads[site].n, 2), float("nan")).double() for site in sites}
        for item, edit in enumerate(reading.edits):
            one = grads.for_prompt(item)
            task = EffectOf(reading.model, one, NLL(edit.target_new))
            here = torch.isin(reading.segments[item], codes.to(reading.segments.device))
            places = here.nonzero().flatten().tolist()
            cells = [(site, pos) for site in sites for pos in places]
            for start in range(0, len(cells), _AT_ONCE):
                part = cells[start : start + _AT_ONCE]
                deltas = [one[site].delta[pos] for site, pos in part]
                scores = measured_effects(task, part, deltas)
                likely = torch.stack([task.probabilities_at(pos) for _, pos in part])
                scores = tempered(scores, likely, self.temper)
                goals = scores[:, followed[item].to(scores.device)]
                higher = (scores[:, None] > goals[..., None]).sum(-1).double()
                higher = higher.masked_fill(scores.isnan().any(1, keepdim=True), float("nan"))
                for (site, pos), row in zip(part, higher.cpu(), strict=True):
                    gradient = grads[site]
                    assert gradient.prompt is not None
                    assert gradient.pos is not None
                    ranks[site][(gradient.prompt == item) & (gradient.pos == pos)] = row
        for site in sites:
            yield site, ranks[site].to(grads[site].device)

    def draw(self, summary: pd.DataFrame) -> Figure:
        """Target above, answer below, a panel for each matrix."""
        from bwlens.show.drawing import panels

        rows, titles = [], []
        for quantity in ("target_rank", "answer_rank"):
            for matrix in self.matrices:
                held = (summary["quantity"] == quantity) & (summary["matrix"] == matrix)
                rows.append(summary[held])
                factor = READ_THROUGH[matrix].replace("delta", "\u03b4")
                factor = "the effect" if self.read_by == "effect" else factor
                titles.append(f"{quantity.removesuffix('_rank')} in {factor} of {matrix}")
        figure, axes = panels(
            summary, titles, rows, "segment", SEGMENTS, "mean rank", columns=len(self.matrices),
            size=(2.6, 1.9), share_y=True,
        )  # fmt: skip
        axes[0].invert_yaxis()  # the rank's own order: the most probable word at the top
        return figure


def target_rank(
    model: LensModel,
    records: Edits,
    *,
    matrices: str | Sequence[str] = ("W_out", "W_in"),
    layers: Layers = None,
    reading: str = "plain",
    temper: float = 0.0,
    segments: str | Sequence[str] | None = None,
    normalize: bool = False,
    **options: Any,
) -> Result:
    """Mean rank of the target and of the original answer by layer and prompt segment.

    Each matrix is read through the factor of its gradient that is as wide as the residual stream,
    or by the measured effect of a step: a replay a token and layer, so name `segments` or `layers`.
    The settings are those of `TargetRank`, `reading` its `read_by`, the options those of `run`.

    Raises:
        ValueError: No such reading or segment, or an option that does not go with the reading.
        NotImplementedError: The effect of a mixture's experts.

    Example:
        >>> ranks = target_rank(
        ...     model, edits, matrices="W_out", reading="effect", segments="last"
        ... )  # doctest: +SKIP
    """
    chosen = (segments,) if isinstance(segments, str) else segments
    task = TargetRank.of(
        model, layers, matrices=matrices, normalize=normalize, read_by=reading, temper=temper,
        segments=None if chosen is None else tuple(chosen),
    )  # fmt: skip
    return run(task, model, records, **options)


def _vectors(gradient: LowRankGradient, site: Site) -> Float[Tensor, "n d_model"]:
    return gradient.x if READ_THROUGH[site.matrix] == "x" else gradient.delta
