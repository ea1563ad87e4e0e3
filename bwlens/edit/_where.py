"""Where to write: which weight's keys tell a fact's paraphrases from its neighbours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.data.given import as_records
from bwlens.data.records import Record, Records
from bwlens.edit.given import texts_of
from bwlens.edit.keys import PREFIXES, Position, contexts_of, keys_of
from bwlens.edit.statistics import KeyStatistics, Statistics, statistics_for
from bwlens.model.prompts import make_batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, resolve_layers, resolve_matrices
from bwlens.model.tokens import subject_positions

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

POSITIONS: tuple[Position, ...] = ("subject", "last")
NEAR = 0.05
"""Layers whose selectivity is by at most this share below the best one's are as good as it."""


@dataclass(frozen=True, eq=False, repr=False)
class KeyResponses:
    """How strongly what is written under a fact's key answers elsewhere, `u . k`.

    1 at the key itself. A paraphrase should answer to it, a neighbour should not.

    Attributes:
        sites: The weights.
        paraphrases: Mean over records and their paraphrases [site, position], at the subject's
            last token and at the prompt's last.
        neighbours: Mean over records and their neighbours of the strongest answer at any token
            [site, position].
        n: Number of records.
    """

    sites: tuple[Site, ...]
    paraphrases: Float[Tensor, "site position"]
    neighbours: Float[Tensor, "site position"]
    n: int

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row for each weight and position, with `selectivity`, paraphrases less neighbours."""
        import pandas as pd

        rows = [
            {
                "matrix": site.matrix,
                "position": position,
                "layer": site.layer,
                "paraphrases": float(self.paraphrases[i, j]),
                "neighbours": float(self.neighbours[i, j]),
            }
            for j, position in enumerate(POSITIONS)
            for i, site in enumerate(self.sites)
        ]
        frame = pd.DataFrame(rows)
        return frame.assign(selectivity=frame["paraphrases"] - frame["neighbours"])

    def best(self, matrix: str = "W_out", position: Position = "subject") -> int:
        """The layer to write to: the deepest that is as selective as the best, within 5 %.

        What is written deeper needs to be smaller for the same effect. Where several layers are
        alike, records decide which: docs/results/editing.md says by how much, and what it costs.

        Raises:
            ValueError: Nothing was measured there.
        """
        frame = self.frame
        here = frame[(frame["matrix"] == matrix) & (frame["position"] == position)]
        if here.empty:
            raise ValueError(
                f"nothing was measured of {matrix!r} at {position!r}; there are"
                f" {', '.join(dict.fromkeys(frame['matrix']))} at {', '.join(POSITIONS)}"
            )
        top = here["selectivity"].max()
        good = here[here["selectivity"] >= top - NEAR * abs(top)]
        return int(good["layer"].max())

    def figure(self) -> Figure:
        """Answers through the layers, paraphrases solid and neighbours dashed."""
        from bwlens.show import drawing

        figure, ax = drawing.axes(None, (drawing.COLUMN, 2.4))
        frame = self.frame.assign(place=self.frame["matrix"] + ", " + self.frame["position"])
        for place, rows in frame.groupby("place", sort=False):
            (line,) = ax.plot(rows["layer"], rows["paraphrases"], label=str(place))
            ax.plot(rows["layer"], rows["neighbours"], "--", color=line.get_color(), label="_")
        ax.set(xlabel="layer", ylabel="$u \\cdot k$", ylim=(min(0.0, ax.get_ylim()[0]), None))
        drawing.plain(ax)
        drawing.legend(ax, "— paraphrases\n-- neighbours")
        return figure

    def __repr__(self) -> str:
        best = {matrix: self.best(matrix) for matrix in dict.fromkeys(self.frame["matrix"])}
        told = ", ".join(f"{matrix} of layer {layer}" for matrix, layer in best.items())
        return f"KeyResponses({self.n} records; at the subject best {told})"


def where(
    model: LensModel,
    records: Records | Record | Sequence[Record],
    statistics: Statistics | str | os.PathLike[str] | None = None,
    *,
    matrices: str | Sequence[str] = "W_out",
    layers: Layers = None,
    prefixes: Sequence[str] = PREFIXES,
    prepend_bos: bool | None = None,
) -> KeyResponses:
    """Measure where a fact is to be written: how selective each weight's whitened keys are.

    For each record, weight and position of the key (the subject's last token, the prompt's last):
    `u = C^-1 k / (k^T C^-1 k)` with k the mean key over the contexts, and `u . k'` for the keys k'
    of the paraphrases, at the same position, and of the neighbours, the largest at any token.
    Forward passes alone. From then on the methods that write at the subject take the best layer
    for this model object where no `layer` is given.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        records: Records with paraphrases and neighbours; some forty do.
        statistics: Of the keys of these weights, or their file. None takes the demo model's.
        matrices: Which weights, "W_out" or "W_O" or both.
        layers: Layers from 0, negative ones from the end; None for all.
        prefixes: Contexts of the key.
        prepend_bos: Whether prompts get a BOS token; None is the model's own default.

    Raises:
        ValueError: No record has both paraphrases that name the subject and neighbours; statistics
            missing or of another model; unknown layers.

    Source: this project; u is ROME's, equation 2.

    Example:
        >>> where(model, records, statistics).best("W_out", "subject")  # doctest: +SKIP
        5
    """
    prefixes = texts_of(prefixes, "prefixes")
    sites = [
        Site(matrix, layer)
        for matrix in resolve_matrices(matrices)
        for layer in resolve_layers(model, layers)
    ]
    whiteners = statistics_for(model, sites, statistics)
    answers = [
        _of_record(model, record, sites, whiteners, prefixes, prepend_bos)
        for record in as_records(records)
        if record.neighborhood_prompts and _named(record)
    ]
    if not answers:
        raise ValueError(
            "no record has paraphrases that name its subject and neighbours as well;"
            " bwlens.make_records makes such records of bare requests"
        )
    mean = torch.stack(answers).mean(0)
    result = KeyResponses(tuple(sites), mean[0], mean[1], len(answers))
    _MEASURED[model] = result
    return result


_MEASURED: WeakKeyDictionary[Any, KeyResponses] = WeakKeyDictionary()


def layer_for(model: LensModel, position: Position, default: int) -> int:
    """The layer whose W_out a method writes to: what `where` measured for this model, if it did."""
    measured = _MEASURED.get(model)
    if measured is not None and any(site.matrix == "W_out" for site in measured.sites):
        return measured.best("W_out", position)
    return default


def _named(record: Record) -> list[str]:
    """The paraphrases in which the subject stands."""
    return [text for text in record.paraphrase_prompts if record.edit.subject in text]


def _of_record(
    model: LensModel,
    record: Record,
    sites: Sequence[Site],
    whiteners: dict[Site, KeyStatistics],
    prefixes: Sequence[str],
    prepend_bos: bool | None,
) -> Float[Tensor, "kind site position"]:
    """Answers of one record's paraphrases and of its neighbours."""
    matrices = list(dict.fromkeys(site.matrix for site in sites))
    layers = sorted({site.layer for site in sites})
    subject, last = (
        contexts_of(model, [record.edit], prefixes, position, prepend_bos, targets=False)
        for position in POSITIONS
    )
    own = keys_of(model, subject.batch, matrices, layers)
    texts = _named(record)
    around = make_batch(model, [*texts, *record.neighborhood_prompts], prepend_bos=prepend_bos)
    keys = keys_of(model, around, matrices, layers)
    places = [
        subject_positions(model, text, record.edit.subject, prepend_bos)[-1] for text in texts
    ]
    at = {"subject": places, "last": around.last[: len(texts)].tolist()}
    near = around.mask[len(texts) :]
    found = torch.zeros(2, len(sites), len(POSITIONS))
    for i, site in enumerate(sites):
        for j, (position, contexts) in enumerate(zip(POSITIONS, (subject, last), strict=True)):
            key = contexts.at(own[site])[0].mean(0)
            u = whiteners[site].whitened(key[None])[0].to(key)
            answers = keys[site] @ (u / (u @ key))
            found[0, i, j] = answers[range(len(texts)), at[position]].mean()
            neighbours = answers[len(texts) :].masked_fill(~near, -torch.inf)
            found[1, i, j] = neighbours.amax(1).mean()
    return found
