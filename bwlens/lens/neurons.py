"""The neurons that a step moves most at one token.

A token's term of a gradient is one outer product: of W_out x_j delta for row j, of W_in and W_gate
delta_j x for column j. Neuron j moves as far as that term is long. In a mixture a neuron is written
as expert.neuron.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from bwlens.gradient.capturing import Gradients
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.lens.rows import Expert, by_expert
from bwlens.model.sites import Site
from bwlens.model.weights import weights_of
from bwlens.reading.readouts import readout
from bwlens.reading.standardised import head_by

if TYPE_CHECKING:
    import pandas as pd

    from bwlens.lens.backward import BackwardLens

WITH_NEURONS = ("W_in", "W_gate", "W_out")

Key = tuple[int, Expert, int]
"""A neuron: layer, expert (None where there are none), index."""


@dataclass(frozen=True)
class Moved:
    """One neuron that a token's step moves.

    Attributes:
        key: Which one.
        value: Its own entry: for W_out x_j, its activation; for W_in and W_gate delta_j.
        length: How far it moves, for a step of size 1.
    """

    key: Key
    value: float
    length: float

    @property
    def name(self) -> str:
        """Its index, in a mixture after its expert's."""
        _, expert, index = self.key
        return str(index) if expert is None else f"{expert}.{index}"


def moved(
    parts: Mapping[Expert, LowRankGradient], matrix: str, layer: int, n_pos: int, k: int
) -> list[list[Moved]]:
    """The k neurons moved most at each position, the one moved most first; none without gradient.

    `parts` are the gradients of that matrix and layer, by expert.
    """
    found: list[list[Moved]] = [[] for _ in range(n_pos)]
    for expert, part in parts.items():
        own, other = (part.x, part.delta) if matrix == "W_out" else (part.delta, part.x)
        top = own.abs().topk(min(k, own.shape[1]), dim=1).indices
        values = own.gather(1, top).float()
        lengths = values.abs() * other.float().norm(dim=1, keepdim=True)
        pos = range(n_pos) if part.pos is None else part.pos.tolist()
        rows = zip(pos, top.tolist(), values.tolist(), lengths.tolist(), strict=True)
        for at, indices, entries, sizes in rows:
            every = zip(indices, entries, sizes, strict=True)
            found[at] += [Moved((layer, expert, j), v, size) for j, v, size in every if size]
    return [sorted(cell, key=lambda each: -each.length)[:k] for cell in found]


def moved_anywhere(
    grads: Gradients,
    matrices: Iterable[str],
    layers: Iterable[int],
    positions: Sequence[int] | None,
    k: int,
) -> set[Key]:
    """The k neurons moved most by each of these matrices, layers and positions (None for all)."""
    n_pos = grads.batch.tokens.shape[1]
    return {
        each.key
        for matrix, layer in product(matrices, layers)
        for pos, cell in enumerate(moved(by_expert(grads, matrix, layer), matrix, layer, n_pos, k))
        if positions is None or pos in positions
        for each in cell
    }


def read_neurons(model: Any, keys: Iterable[Key], bias: bool = True) -> dict[Key, int]:
    """The token that each neuron's row of W_out promotes most, read plainly at unit length."""
    by_site: dict[Site, list[Key]] = {}
    words: dict[Key, int] = {}
    for key in sorted(set(keys), key=str):
        by_site.setdefault(Site("W_out", key[0], key[1]), []).append(key)
    if not by_site:
        return words
    head = head_by(model, "plain", bias)
    for site, weight in weights_of(model, by_site).items():
        rows = weight.live.reshape(weight.shape)[[index for *_, index in by_site[site]]]
        read = readout(head, rows, 1, normalize=True)
        words |= zip(by_site[site], read.top_ids[:, 0].tolist(), strict=True)
    return words


def frame(
    lens: BackwardLens, matrix: str, layers: Sequence[int], positions: Sequence[int], k: int
) -> pd.DataFrame:
    """A row for each layer, position and neuron, the one moved most first."""
    import pandas as pd

    rows = []
    for layer in layers:
        cells = lens.moved_neurons(matrix, layer, k)
        rows += [
            (layer, pos, lens.tokens[pos], each.name, each.value, each.length, _word(lens, each))
            for pos in positions
            for each in cells[pos]
        ]
    value = "activation" if matrix == "W_out" else "delta"
    return pd.DataFrame(rows, columns=["layer", "pos", "token", "neuron", value, "moved", "word"])


def _word(lens: BackwardLens, neuron: Moved) -> str:
    return lens.vocabulary.get(lens.neuron_id(neuron), "")


def check_matrix(matrix: str) -> None:
    """Refuse a matrix without neurons.

    Raises:
        ValueError: One of attention's.
    """
    if matrix not in WITH_NEURONS:
        raise ValueError(f"{matrix!r} has no neurons; take W_in, W_gate or W_out")
