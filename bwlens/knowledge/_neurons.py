"""`Neurons`: which rows of which store gave an answer, and which of them a step would move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.model.sites import Layers, Site
from bwlens.runs.paths import writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

N_WORDS = 8
"""Words kept of a row."""

OVERLAP = 20
"""So many neurons that give most are compared with as many that a step moves most."""

_SHUFFLES = 20


class Neuron(NamedTuple):
    """One row of a store: its layer, its index in W_out and, in a mixture, its expert."""

    layer: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    expert: int | str | None = None

    @property
    def site(self) -> Site:
        """The W_out that it is a row of."""
        return Site("W_out", self.layer, self.expert)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.layer}.{'' if self.expert is None else f'{self.expert}.'}{self.index}"


class Row(NamedTuple):
    """What one row gives.

    Attributes:
        neuron: Which one.
        weight: What it is mixed with.
        share: Of the target's logit.
        log_prob: By how much it raises the target's log-probability behind its own block, in nats.
        promoted: The words that it raises most, as it is weighted.
        suppressed: The words that it lowers most.
    """

    neuron: Neuron
    weight: float
    share: float
    log_prob: float
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Neurons:
    """The shares of every row of every store in one answer; made by `neurons`.

    Shares are of the answer's logit above the mean of all (what softmax sees of it), before a soft
    cap. One tensor [d_mlp] for each of `stores`; the shares of a layer's stores and its `biases`
    sum to its `mlps`.

    Attributes:
        prompt: The prompt.
        target: The answer's token.
        target_id: Its id.
        step_target: What the step compared with is towards.
        probability: The answer's.
        logit: What is shared out.
        layers: The layers read.
        stores: Every W_out that the last token passes.
        weights: What each row is mixed with.
        gains: What each row gives for a unit of weight.
        moved: How far a step moves each row of W_out: the norm of its gradient.
        moved_keys: The same of each neuron's column of W_in; empty where W_in is not read.
        mlps: What each layer's feed-forward part gives in all [layer].
        biases: What its bias gives of that [layer].
        rows: The rows with the largest shares of each store, in words.
        n_layers: How many layers the model has.
    """

    prompt: str
    target: str
    target_id: int
    step_target: str
    probability: float
    logit: float
    layers: tuple[int, ...]
    stores: tuple[Site, ...]
    weights: tuple[Float[Tensor, " _"], ...]
    gains: tuple[Float[Tensor, " _"], ...]
    moved: tuple[Float[Tensor, " _"], ...]
    moved_keys: tuple[Float[Tensor, " _"], ...]
    mlps: Float[Tensor, " layer"]
    biases: Float[Tensor, " layer"]
    rows: tuple[Row, ...]
    n_layers: int

    @property
    def shares(self) -> tuple[Float[Tensor, " _"], ...]:
        """Each row's share of the logit: weight times gain."""
        return tuple(a * gain for a, gain in zip(self.weights, self.gains, strict=True))

    @property
    def rest(self) -> float:
        """What comes from elsewhere: embedding, attention, layers that were not read."""
        return self.logit - float(self.mlps.sum())

    def values(self, by: str = "share") -> tuple[Float[Tensor, " _"], ...]:
        """What neurons are ordered by: "share", "weight" (its size), "moved" or "moved_keys".

        Raises:
            ValueError: Another name, or no W_in was read.
        """
        known = {
            "share": self.shares,
            "weight": tuple(a.abs() for a in self.weights),
            "moved": self.moved,
            "moved_keys": self.moved_keys,
        }
        if by not in known:
            raise ValueError(f"by is {by!r}; expected one of {', '.join(known)}")
        if not known[by]:
            raise ValueError(f"by={by!r}: W_in of this model is not read; order by another")
        return known[by]

    def top(self, n: int = 10, *, layers: Layers = None, by: str = "share") -> list[Neuron]:
        """The n neurons with the largest values, of all stores or some layers'.

        Raises:
            ValueError: A layer that was not read, or no such order.
        """
        chosen = self._chosen(layers)
        values = self.values(by)
        every = torch.cat([values[at] for at in chosen])
        places = every.topk(min(n, len(every))).indices.tolist()
        starts = np.cumsum([0, *(len(values[at]) for at in chosen)])
        out = []
        for place in places:
            at = int(np.searchsorted(starts, place, side="right")) - 1
            site = self.stores[chosen[at]]
            out.append(Neuron(site.layer, place - int(starts[at]), site.expert))
        return out

    def resolve_layers(self, layers: Layers) -> tuple[int, ...]:
        """Those layers that were meant.

        Raises:
            ValueError: One was not read.
        """
        if layers is None:
            return self.layers
        if isinstance(layers, slice):
            return self.layers[layers]
        wanted = [layers] if isinstance(layers, int) else list(layers)
        wanted = [layer + self.n_layers if layer < 0 else layer for layer in wanted]
        if missing := set(wanted) - {*self.layers}:
            raise ValueError(f"layer {min(missing)} was not read; there are {list(self.layers)}")
        return tuple(sorted(set(wanted)))

    def _chosen(self, layers: Layers) -> list[int]:
        """Places of the stores of some layers."""
        wanted = self.resolve_layers(layers)
        return [at for at, site in enumerate(self.stores) if site.layer in wanted]

    def share_of(self, neuron: Sequence[Any]) -> float:
        """The share of one neuron (layer, index), with experts (layer, index, expert)."""
        one = Neuron(*neuron)
        if one.site not in self.stores:
            raise ValueError(
                f"{one.site} was not passed; there are {', '.join(map(str, self.stores))}"
            )
        return float(self.shares[self.stores.index(one.site)][one.index])

    def table(self) -> DataFrame:
        """The rows kept: layer, expert, neuron, weight, share, percent of the logit, words."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": row.neuron.layer,
                "expert": row.neuron.expert,
                "neuron": row.neuron.index,
                "weight": row.weight,
                "share": row.share,
                "percent": 100 * row.share / self.logit,
                "log_prob": row.log_prob,
                "promoted": " ".join(word.strip() for word in row.promoted),
                "suppressed": " ".join(word.strip() for word in row.suppressed),
            }
            for row in self.rows
        )

    def cumulative(self, layers: Layers = None, *, by: str = "share") -> Float[np.ndarray, " m"]:
        """What the first 1, 2, ... neurons give together, the largest first."""
        chosen = self._chosen(layers)
        shares = torch.cat([self.shares[at] for at in chosen]).double()
        order = torch.cat([self.values(by)[at] for at in chosen]).argsort(descending=True)
        return shares[order].cumsum(0).numpy()

    def agreement(self, seed: int = 0) -> DataFrame:
        """Whether the rows that give the answer are those that a step moves, store by store.

        - `of`: "values", rows of W_out; "keys", columns of W_in.
        - `r`: Spearman's, between the size of the share and how far the step moves the neuron.
        - `control`: The same with gains dealt out anew among neurons: what strong weights alone
          make alike.
        - `overlap`: How many of the 20 first are the same, over 20; `chance` what is expected.
        """
        import pandas as pd

        draw = torch.Generator().manual_seed(seed)
        out = []
        for at, site in enumerate(self.stores):
            size, gain = self.weights[at].abs().double(), self.gains[at].abs().double()
            n = min(OVERLAP, len(gain))
            for of, moved in (("values", self.moved), ("keys", self.moved_keys)):
                if not moved:
                    continue
                shuffled = [
                    _spearman(size * gain[torch.randperm(len(gain), generator=draw)], moved[at])
                    for _ in range(_SHUFFLES)
                ]
                first = [set(v.topk(n).indices.tolist()) for v in (size * gain, moved[at])]
                out.append(
                    {
                        "layer": site.layer,
                        "expert": site.expert,
                        "of": of,
                        "r": _spearman(size * gain, moved[at]),
                        "control": float(np.mean(shuffled)),
                        "overlap": len(first[0] & first[1]) / n,
                        "chance": n / len(gain),
                    }
                )
        return pd.DataFrame(out)

    def figure(self, layers: Layers = None) -> Figure:
        """Cumulative shares by number of neurons, and each layer's sum."""
        from bwlens.show.neurons import cumulative_figure

        return cumulative_figure(self, layers)

    def save(self, path: str | Path) -> Path:
        """Write the table and figure as a page (.html).

        Raises:
            ValueError: Another ending, or a folder that is not there.
        """
        from bwlens.show.neurons import page

        path = writable(path, (".html",))
        path.write_text(page(self), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        best = ", ".join(f"{n} ({self.share_of(n):+.2f})" for n in self.top(3))
        return (
            f"Neurons({self.prompt!r} -> {self.target!r}, p {self.probability:.2f}: feed-forward"
            f" parts give {float(self.mlps.sum()):.2f} of {self.logit:.2f}; most from {best})"
        )

    def _repr_html_(self) -> str:
        from bwlens.show.neurons import table

        return table(self)


def _spearman(one: Tensor, other: Tensor) -> float:
    """Correlation of ranks, ties in the middle."""
    import pandas as pd

    ranks = (pd.Series(v.numpy()).rank() for v in (one, other))
    return float(next(ranks).corr(next(ranks)))
