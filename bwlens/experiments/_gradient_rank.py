"""Figure 3: how often a prompt's weight gradient has the rank that Lemma 4.1 allows it at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bwlens.data.given import Edits
from bwlens.experiments.base import Experiment, Reading, Result
from bwlens.experiments.columns import frame
from bwlens.experiments.running import run
from bwlens.gradient.spectra import spectra
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers
from bwlens.runs.intervals import summarize

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_KEPT = 12
"""Singular values whose means are in the summary."""


@dataclass(frozen=True)
class GradientRank(Experiment):
    """Rank, effective rank and spectrum of each prompt's gradient, by matrix and layer.

    Rows: `item`, `matrix`, `layer`, `n` (rows of x and delta: the prompt's tokens), `active` (those
    with a non-zero delta), `rank`, `effective_rank`, `spectrum` (singular values over the largest).
    The summary has the shares of prompts with rank exactly n (`full`) and exactly `active`
    (`full_of_active`), the mean `shortfall` n - rank, and means of the rest.

    Source: Backward Lens, Lemma 4.1 and figure 3.
    """

    matrices: tuple[str, ...] = ("W_in", "W_out")

    name: ClassVar[str] = "gradient_rank"
    title: ClassVar[str] = "Rank of the gradient"
    source: ClassVar[str] = "Figure 3"
    caption: ClassVar[str] = (
        "Each prompt's gradient is a sum of n outer products, so its rank is at most its"
        " number of tokens n; the last layer's has rank 1, as only the last token has a delta"
        " there."
    )
    published: ClassVar[str] = (
        "rank exactly n for more than 98.5 % of prompts in every layer but the last, where it"
        " is 1; where vectors are linearly dependent it falls short by one or two."
    )

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch."""
        return frame(_columns(reading, self.matrices))

    def summarize(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Shares and means by matrix and layer, and the mean spectrum as `s1`, `s2`, ..."""
        rows = rows.assign(
            full=(rows["rank"] == rows["n"]).astype(float),
            full_of_active=(rows["rank"] == rows["active"]).astype(float),
            shortfall=rows["n"] - rows["rank"],
        )
        listed = rows["spectrum"].tolist()
        spectrum = [f"s{place + 1}" for place in range(min(_KEPT, max(map(len, listed))))]
        for place, name in enumerate(spectrum):
            rows[name] = [s[place] if place < len(s) else np.nan for s in listed]
        values = ["full", "full_of_active", "shortfall", "rank", "effective_rank", "n", "active"]
        return summarize(rows, ["matrix", "layer"], [*values, *spectrum])

    def draw(self, summary: pd.DataFrame) -> Figure:
        """The share of full rank, and how many directions carry the gradient."""
        from bwlens.show.drawing import panels

        shown = {
            "full": "share with rank n",
            "shortfall": "shortfall n - rank",
            "effective_rank": "effective rank",
        }
        rows = [summary[summary["quantity"] == name] for name in shown]
        figure, axes = panels(summary, list(shown.values()), rows, "matrix", self.matrices, "")
        axes[0].set_ylim(-0.04, 1.04)
        axes[1].set_ylim(bottom=min(-0.2, axes[1].get_ylim()[0]))
        axes[2].set_ylim(0, axes[2].get_ylim()[1])
        return figure


def gradient_rank(
    model: LensModel,
    records: Edits,
    *,
    matrices: str | Sequence[str] = ("W_in", "W_out"),
    layers: Layers = None,
    **options: Any,
) -> Result:
    """Rank of each prompt's gradient of each matrix, against the number of its tokens.

    The settings are those of `GradientRank`, the options those of `run`.
    """
    return run(GradientRank.of(model, layers, matrices=matrices), model, records, **options)


def _columns(reading: Reading, matrices: Sequence[str]) -> list[dict[str, Any]]:
    columns = []
    for site in reading.sites(matrices):
        found = spectra(reading.grads[site])
        values = found.singular_values.cpu().numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = (values / values[:, :1]).astype(np.float32)
        kept = np.empty(len(values), dtype=object)
        ranks = found.ranks.tolist()
        for at, rank in enumerate(ranks):
            kept[at] = relative[at, :rank].tolist()
        columns.append(
            {
                "item": np.array(found.prompts),
                "matrix": site.matrix,
                "layer": site.layer,
                "expert": site.expert_number,
                "n": found.n.cpu().numpy(),
                "active": found.active.cpu().numpy(),
                "rank": np.array(ranks),
                "effective_rank": found.effective_ranks.cpu().numpy(),
                "spectrum": kept,
            }
        )
    return columns
