"""Figures 22 and 23: how alike the last token's deltas of different layers are."""

from __future__ import annotations

from collections.abc import Sequence
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
from bwlens.experiments.columns import frame
from bwlens.experiments.running import run
from bwlens.gradient.objectives import NLL
from bwlens.model.protocol import LensModel
from bwlens.model.segments import SEGMENTS
from bwlens.model.sites import Layers, Site
from bwlens.reading.effect import EffectOf

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerCosine(Experiment):
    """Cosine between the deltas of two layers at one token, for every pair of layers.

    By the effect it is the correlation, over the vocabulary, of what a step does on one and on the
    other. Rows: `item`, `matrix`, `layer`, `other` (layer < other), `cosine`; nan where a delta is
    zero. Where a segment has several tokens, the first of them is taken.

    Source: Backward Lens, figures 22 and 23 (the last prompt token).
    """

    matrices: tuple[str, ...] = ("W_out",)
    segment: str = "last"
    """Whose token is read, out of `bwlens.model.segments.SEGMENTS`."""
    read_by: str = "plain"
    """"plain" for the deltas themselves, "effect" for what a step along each does."""

    name: ClassVar[str] = "layer_cosine"
    title: ClassVar[str] = "Cosine between layers' deltas"
    source: ClassVar[str] = "Figures 22, 23"
    caption: ClassVar[str] = "How alike the last token's deltas of two layers are."
    published: ClassVar[str] = "cosines above 0.7 over ten neighbouring blocks."
    by: ClassVar[tuple[str, ...]] = ("matrix", "layer", "other")
    values: ClassVar[tuple[str, ...]] = ("cosine",)

    def __post_init__(self) -> None:
        check_segment(self.segment)
        if self.read_by not in ("plain", "effect"):
            raise ValueError(f"reading is {self.read_by!r}; here there are plain and effect")

    def wanted(self, model: Any) -> tuple[str, ...]:
        """The matrices; refused where effects are asked for and it is a mixture's."""
        if self.read_by == "effect":
            check_effects(self.name, model, self.matrices)
        return super().wanted(model)

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch."""
        columns = []
        for matrix in self.matrices:
            sites = [site for site in reading.sites([matrix]) if site.expert is None]
            if len(sites) < 2:
                continue
            held = [self._rows(reading, site) for site in sites]
            items = held[0][0]
            if not len(items):
                continue
            # Layers may lie on several devices.
            deltas = torch.stack([rows.to(items.device) for _, rows in held], 1)
            pairs = zip(items.tolist(), deltas, strict=True)
            cosines = torch.stack([self._gram(reading, sites, at, rows) for at, rows in pairs])
            low, high = torch.triu_indices(len(sites), len(sites), 1)
            layers = np.array([site.layer for site in sites])
            columns.append(
                {
                    "item": np.repeat(items.cpu().numpy(), len(low)),
                    "matrix": matrix,
                    "layer": np.tile(layers[low], len(items)),
                    "other": np.tile(layers[high], len(items)),
                    "cosine": cosines[:, low, high].flatten().cpu().numpy(),
                }
            )
        return frame(columns)

    def _gram(
        self, reading: Reading, sites: Sequence[Site], item: int, rows: Float[Tensor, "layer d"]
    ) -> Float[Tensor, "layer layer"]:
        """Cosines of one prompt's deltas, or of their effects."""
        if self.read_by == "effect":
            one = reading.grads.for_prompt(item)
            at = reading.segments[item] == SEGMENTS.index(self.segment)
            pos = int(at.nonzero()[0])
            task = EffectOf(reading.model, one, NLL(reading.edits[item].target_new))
            rows = measured_effects(task, [(site, pos) for site in sites], list(rows))
            rows = rows - rows.mean(1, keepdim=True)
        unit = rows.double() / rows.double().norm(dim=-1, keepdim=True)
        return unit @ unit.mT

    def draw(self, summary: pd.DataFrame) -> Figure:
        """A map of layers by layers."""
        from bwlens.show.drawing import cosine_maps

        maps = {}
        for matrix in self.matrices:
            held = summary[summary["matrix"] == matrix]
            layers = sorted({*held["layer"], *held["other"]})
            place = {layer: at for at, layer in enumerate(layers)}
            grid = np.full((len(layers), len(layers)), np.nan)  # pairs without a cosine stay blank
            np.fill_diagonal(grid, 1.0)
            for low, high, mean in zip(held["layer"], held["other"], held["mean"], strict=True):
                grid[place[low], place[high]] = grid[place[high], place[low]] = mean
            what = "effect" if self.read_by == "effect" else "\u03b4"
            maps[f"{what} of {matrix}, {self.segment} token"] = (layers, grid)
        return cosine_maps(maps)

    def _rows(self, reading: Reading, site: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts that have the segment, and their delta there."""
        gradient = reading.grads[site]
        assert gradient.prompt is not None
        here = reading.segment_of(gradient) == SEGMENTS.index(self.segment)
        at = here.nonzero().flatten()
        prompts = gradient.prompt[at]
        first = torch.ones_like(prompts, dtype=torch.bool)
        first[1:] = prompts[1:] != prompts[:-1]
        return prompts[first], gradient.delta[at[first]]


def layer_cosine(
    model: LensModel,
    records: Edits,
    *,
    matrices: str | Sequence[str] = ("W_out",),
    layers: Layers = None,
    segment: str = "last",
    reading: str = "plain",
    **options: Any,
) -> Result:
    """Cosines between the deltas of all pairs of layers at one token, the prompts' last.

    With `reading="effect"` correlations of what steps along them do. The settings are those of
    `LayerCosine`, `reading` its `read_by`, the options those of `run`.

    Raises:
        ValueError: No such segment or reading.
        NotImplementedError: The effect of a mixture's experts.
    """
    task = LayerCosine.of(model, layers, matrices=matrices, segment=segment, read_by=reading)
    return run(task, model, records, **options)
