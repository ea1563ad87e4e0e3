"""Figures 6 and 18-21: where the target and the answer stand in the readings of x and delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bwlens.data.given import Edits
from bwlens.experiments.base import Experiment, Reading, Result, frame, run, segment_columns
from bwlens.lens.backward import READ_THROUGH
from bwlens.model.head import head_of
from bwlens.model.protocol import LensModel
from bwlens.model.segments import SEGMENTS
from bwlens.model.sites import Layers
from bwlens.reading.readouts import readout

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TargetRank(Experiment):
    """Mean rank of the target and of the model's own answer over each segment's tokens.

    W_out is read through delta, W_in through x. Rows: `item`, `matrix`, `layer`, `segment`,
    `tokens`, `target_rank`, `answer_rank` (0: most probable, d_vocab - 1: least; `top_share` and
    `bottom_share`: how many of the tokens have the target at that very end), and `silent`, the
    share of tokens whose vector is zero: these have no reading and are left out of the means (the
    paper reads the final norm's bias there, the same rank for all).

    Source: Backward Lens, figures 6, 18 (target in delta), 19 (answer in delta), 20, 21 (x).
    """

    matrices: tuple[str, ...] = ("W_out", "W_in")
    normalize: bool = False
    """Read vectors at unit length (appendix H)."""

    name: ClassVar[str] = "target_rank"
    title: ClassVar[str] = "Rank of target and answer by segment"
    source: ClassVar[str] = "Figures 6, 18-21"
    reading: ClassVar[str] = (
        "Rank 0 is the most probable word. A target at the bottom of delta is what a descent"
        " step promotes most in this reading, which in deep models says what a step does near the"
        " top only; an answer at the top of x is what the layer already reads. Zero vectors are"
        " left out."
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
        "silent",
    )

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch."""
        head = head_of(reading.model)
        followed = torch.stack([reading.targets, reading.answers.to(reading.targets)], 1)
        least = head.W_U.shape[1] - 1
        columns = []
        for site in reading.sites(self.matrices):
            gradient = reading.grads[site]
            assert gradient.prompt is not None
            vectors = getattr(gradient, READ_THROUGH[site.matrix])
            wanted = followed.to(gradient.device)[gradient.prompt]
            read = readout(head, vectors, top_k=1, targets=wanted, normalize=self.normalize)
            assert read.ranks is not None
            ranks = read.ranks.to(gradient.device, gradient.dtype)
            blank = read.zero.to(gradient.device)[:, None]
            at_ends = torch.stack([ranks[:, 0] == 0, ranks[:, 0] == least], 1).to(ranks)
            values = torch.cat([ranks, at_ends], 1).masked_fill(blank, float("nan"))
            values = torch.cat([values, blank.to(values)], 1)
            columns.append(segment_columns(reading, site, values, self.values))
        return frame(columns)

    def draw(self, summary: pd.DataFrame) -> Figure:
        """Target above, answer below, a panel for each matrix."""
        from bwlens.show.drawing import panels

        rows, titles = [], []
        for quantity in ("target_rank", "answer_rank"):
            for matrix in self.matrices:
                held = (summary["quantity"] == quantity) & (summary["matrix"] == matrix)
                rows.append(summary[held])
                factor = READ_THROUGH[matrix].replace("delta", "\u03b4")
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
    normalize: bool = False,
    **options: Any,
) -> Result:
    """Mean rank of the target and of the original answer by layer and prompt segment.

    Each matrix is read through the factor of its gradient that is as wide as the residual stream.
    The settings are those of `TargetRank`, the options those of `run`.
    """
    task = TargetRank.of(model, layers, matrices=matrices, normalize=normalize)
    return run(task, model, records, **options)
