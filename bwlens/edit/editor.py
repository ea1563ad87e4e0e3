"""MEND's editor: a network that turns a gradient's rows x and delta into those of an edit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bwlens.model.sites import Site

Factors = Mapping[Site, tuple[Tensor, Tensor]]
"""x and delta of each weight, their last axis [d_in] and [d_out]."""


class Editors(nn.Module):
    """One editor for all weights of a shape.

    Args:
        shapes: (d_in, d_out) of each weight to be edited.
        rank: Of the networks' matrices, at most their width.
        seed: Of their first values.
    """

    def __init__(self, shapes: Mapping[Site, tuple[int, int]], rank: int, seed: int = 0) -> None:
        super().__init__()
        self.shapes, self.rank = dict(shapes), rank
        groups: dict[tuple[int, int], list[Site]] = defaultdict(list)
        for site, shape in shapes.items():
            groups[shape].append(site)
        draws = torch.Generator().manual_seed(seed)
        self._of = {
            site: (f"{shape[0]}x{shape[1]}", index)
            for shape, sites in groups.items()
            for index, site in enumerate(sites)
        }
        self.editors = nn.ModuleDict(
            {f"{s[0]}x{s[1]}": Editor(*s, len(of), rank, draws) for s, of in groups.items()}
        )

    def normalise(self, rows: Mapping[Site, Sequence[tuple[Tensor, Tensor]]]) -> None:
        """Take the mean and deviation of each weight's rows [n, d_in], [n, d_out] from these."""
        for site, listed in rows.items():
            name, index = self._of[site]
            x, delta = (torch.cat(side) for side in zip(*listed, strict=True))
            self._editor(name).normalise(x, delta, index)

    def start_at(self, rate: float) -> None:
        """One step size for all weights."""
        for name in self.editors:
            self._editor(name).log_rate.data.fill_(rate).log_()

    def forward(self, factors: Factors) -> dict[Site, tuple[Tensor, Tensor]]:
        """x~ and -rate * delta~ of each weight; rows of zeros stay such."""
        edited: dict[Site, tuple[Tensor, Tensor]] = {}
        for site, (x, delta) in factors.items():
            name, index = self._of[site]
            there = nonzero(x, delta)
            new_x, new_delta = self._editor(name)(x[there], delta[there], index)
            edited[site] = tuple(  # pyright: ignore[reportArgumentType]
                old.new_zeros(old.shape).index_put(there.nonzero(as_tuple=True), new)
                for old, new in ((x, new_x), (delta, new_delta))
            )
        return edited

    def _editor(self, name: str) -> Editor:
        editor = self.editors[name]
        assert isinstance(editor, Editor)
        return editor


class Editor(nn.Module):
    """The editor of weights of one shape: a residual network, shared by them.

    On the rows z = ([x, delta] - mean) / deviation, two layers
    `z + relu(scale * (U V z + b) + shift)` and the same without relu, with a scale and a shift for
    each weight. What they change of z is carried back to [x, delta]. U is zero at the start, so the
    edit is a gradient step then; V is drawn with deviation 1 / sqrt(width).

    Args:
        d_in: The width of x.
        d_out: The width of delta.
        n: How many weights there are.
        rank: Of U V.
        draws: Where V comes from.
    """

    mean: Float[Tensor, "n width"]
    deviation: Float[Tensor, "n width"]

    def __init__(self, d_in: int, d_out: int, n: int, rank: int, draws: torch.Generator) -> None:
        super().__init__()
        width = d_in + d_out
        self._widths = [d_in, d_out]
        self.register_buffer("mean", torch.zeros(n, width))
        self.register_buffer("deviation", torch.ones(n, width))
        self.layers = nn.ModuleList(_Layer(width, n, rank, draws) for _ in range(2))
        self.log_rate = nn.Parameter(torch.zeros(n))

    def normalise(self, x: Tensor, delta: Tensor, index: int) -> None:
        """Take the mean and the deviation of one weight's rows."""
        for rows, mean, deviation in zip(
            (x, delta),
            self.mean[index].split(self._widths),
            self.deviation[index].split(self._widths),
            strict=True,
        ):
            mean.copy_(rows.mean(0))
            spread = rows.std(0, correction=0)
            least = 0.01 * spread.mean()  # a neuron dead on all these rows may wake on others
            deviation.copy_(spread.clamp_min(least if least > 0 else 1.0))

    def forward(self, x: Tensor, delta: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """x~ and -rate * delta~ of one weight's rows."""
        rows, deviation = torch.cat([x, delta], -1), self.deviation[index]
        first, second = self.layers
        z = (rows - self.mean[index]) / deviation
        moved = first(z, index).clamp(min=0)  # its slope at 0 is 1, where U starts
        moved = moved + second(z + moved, index)
        new_x, new_delta = (rows + moved * deviation).split(self._widths, -1)
        return new_x, new_delta * -self.log_rate[index].exp()


class _Layer(nn.Module):
    def __init__(self, width: int, n: int, rank: int, draws: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, width)
        self.V = nn.Parameter(torch.randn(width, rank, generator=draws) / width**0.5)
        self.U = nn.Parameter(torch.zeros(rank, width))
        self.b = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(n, width))
        self.shift = nn.Parameter(torch.zeros(n, width))

    def forward(self, z: Tensor, index: int) -> Tensor:
        return self.scale[index] * (z @ self.V @ self.U + self.b) + self.shift[index]


def nonzero(x: Tensor, delta: Tensor) -> Tensor:
    """Which rows have a gradient."""
    return x.ne(0).any(-1) & delta.ne(0).any(-1)
