"""Figures 5, 16 and 17: how long delta and x are, by layer and segment of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bwlens.data.given import Edits
from bwlens.experiments.base import Experiment, Reading, Result
from bwlens.experiments.columns import frame, segment_columns
from bwlens.experiments.running import run
from bwlens.model.protocol import LensModel
from bwlens.model.segments import SEGMENTS
from bwlens.model.sites import Layers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SegmentNorms(Experiment):
    """Mean L2 norms of delta and x over each segment's tokens, by matrix and layer.

    Rows: `item`, `matrix`, `layer`, `segment`, `tokens` (how many), `delta`, `x`. Norms are raw:
    loss per unit of the matrix' output, and units of the activations.

    Source: Backward Lens, figures 5, 16 (delta) and 17 (x).
    """

    matrices: tuple[str, ...] | None = None
    """Matrices to measure; None for all that the model has, attention included."""

    name: ClassVar[str] = "segment_norms"
    title: ClassVar[str] = "Norms of delta and x by segment"
    source: ClassVar[str] = "Figures 5, 16, 17"
    caption: ClassVar[str] = (
        "How hard a step pushes (delta) and how much comes in (x), averaged over the tokens"
        " of each part of the prompt."
    )
    published: ClassVar[str] = (
        "delta peaks at the subject's tokens in the first layers and at the last token from"
        " about the second quarter on, and is near zero elsewhere; x shows no such pattern."
    )
    by: ClassVar[tuple[str, ...]] = ("matrix", "layer", "segment")
    values: ClassVar[tuple[str, ...]] = ("delta", "x")

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch."""
        columns = []
        for site in reading.sites(self.wanted(reading.model)):
            gradient = reading.grads[site]
            norms = torch.stack([gradient.delta.norm(dim=1), gradient.x.norm(dim=1)], 1)
            columns.append(segment_columns(reading, site, norms, ("delta", "x")))
        return frame(columns)

    def draw(self, summary: pd.DataFrame) -> Figure:
        """delta above, x below, a panel for each matrix."""
        from bwlens.show.drawing import panels

        matrices = list(dict.fromkeys(summary["matrix"]))
        rows, titles = [], []
        for quantity, name in (("delta", "\u03b4"), ("x", "x")):
            for matrix in matrices:
                rows.append(
                    summary[(summary["quantity"] == quantity) & (summary["matrix"] == matrix)]
                )
                titles.append(f"{name} of {matrix}")
        figure, axes = panels(
            summary, titles, rows, "segment", SEGMENTS, "mean norm", columns=len(matrices)
        )
        for ax in axes:
            ax.set_ylim(0, ax.get_ylim()[1])
        return figure


def segment_norms(
    model: LensModel,
    records: Edits,
    *,
    matrices: str | Sequence[str] | None = None,
    layers: Layers = None,
    **options: Any,
) -> Result:
    """Mean norms of delta and x by layer and prompt segment.

    The settings are those of `SegmentNorms`, the options those of `run`.
    """
    return run(SegmentNorms.of(model, layers, matrices=matrices), model, records, **options)
