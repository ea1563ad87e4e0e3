"""A change of weights in words: what each of its directions answers to, and what it writes.

The change of a matrix is a sum of directions, sum_k s_k u_k v_k^T (its singular vectors): where the
input goes along u_k, s_k (x . u_k) v_k is added to the output. Both sides are read in the
vocabulary, u_k as the **imprint** (the input that it answers to) and v_k as the **shift**. Unlike a
gradient a change is *added*: its most probable words are promoted. The sign of u_k and v_k is free;
it is the one that inputs of real text have on average.

How legible is that? A side's scores are standardised over the vocabulary, and by how much each
word stands out in random directions of that kind of matrix (`Usual`). Of V random numbers the
highest is about sqrt(2 ln V); what a word's z goes beyond that counts, z^2/2 - ln V **nats beyond
chance**. Summed over directions, each weighed by its size, this ranks the words that a whole change
writes. The null is not presumed but drawn: a change of the same singular values in random
directions is read beside, in the same way.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.changes.streams import partners_of, stream_side
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.lens.rows import READ_THROUGH
from bwlens.model.head import Head
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site
from bwlens.reading.readouts import Readout, readout_of_scores
from bwlens.reading.scoring import all_scores

SIDES: tuple[Literal["x", "delta"], ...] = ("x", "delta")
_ROWS = 64  # Directions whose scores over the vocabulary are in memory at a time.


class Directions(NamedTuple):
    """The singular directions of one matrix' change: s_k u_k v_k^T, the largest first."""

    u: Float[Tensor, "k d_in"]
    s: Float[Tensor, " k"]
    v: Float[Tensor, "k d_out"]
    norm: float
    """The Frobenius norm of the matrix' change, all directions."""


def directions_of(part: LowRankMatrix, n: int, device: torch.device | str) -> Directions:
    """The n largest, fewer where the rank is lower; wherever the part is, on this device."""
    U, S, Vh = part.svd()
    n = min(n, max(1, int((S[:1] * 1e-6 < S).sum())))
    u, s, v = (rows[:n].to(device, torch.float32) for rows in (U.T, S, Vh))
    return Directions(u, s, v, float(torch.linalg.vector_norm(S)))


def random_like(part: LowRankMatrix, generator: torch.Generator) -> LowRankMatrix:
    """A matrix of the same singular values whose singular vectors are random."""
    S = part.singular_values()
    sides = [
        torch.linalg.qr(torch.randn(width, len(S), generator=generator).double()).Q.T
        for width in part.shape
    ]
    root = S[:, None].sqrt().cpu()
    x, delta = ((root * side).to(part.device, part.dtype) for side in sides)
    return LowRankMatrix(x, delta)


def oriented(directions: Directions, x: Float[Tensor, "n d_in"] | None) -> tuple[Directions, Any]:
    """The sign that inputs have on average, and what each direction adds to the output (RMS)."""
    u, s, v, norm = directions
    if x is None or not len(x):
        return directions, torch.full_like(s, float("nan"))
    along = x.to(u) @ u.T
    sign = torch.where(along.mean(0) < 0, -1.0, 1.0)[:, None]
    return Directions(u * sign, s, v * sign, norm), s * along.square().mean(0).sqrt()


class Usual:
    """What random directions of each kind of matrix look like, and their way into the stream.

    Some words stand out in whatever is read (white space, in many models). A word's z counts by its
    mean and spread over random directions of the same kind of matrix and side. Sides that are in
    the stream by themselves are of one kind, whatever their matrix.
    """

    def __init__(
        self,
        model: LensModel,
        head: Head,
        change: Mapping[Site, LowRankMatrix],
        sampled: int,
        seed: int,
    ) -> None:
        self._d_model, self.partners = head.W_U.shape[0], partners_of(model, change)
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        generator = torch.Generator().manual_seed(seed)
        for name in dict.fromkeys(site.matrix for site in change):
            sites = [site for site in change if site.matrix == name]
            each = -(-sampled // len(sites))
            for axis, side in enumerate(SIDES):
                if _kind(name, side) in self._known:
                    continue
                widths = [change[site].shape[axis] for site in sites]
                drawn = [
                    torch.randn(each, width, generator=generator).to(head.W_U.device)
                    for width in widths
                ]
                pairs = zip(sites, drawn, strict=True)
                there = [self.carried(site, side, rows) for site, rows in pairs]
                rows = [row for row in there if row is not None]
                if rows:
                    vectors = torch.nn.functional.normalize(torch.cat(rows), dim=1)
                    mean, square = torch.zeros(()), torch.zeros(())
                    for chunk in vectors.split(_ROWS):
                        z = standardised(all_scores(head, chunk).float())
                        mean, square = mean + z.sum(0), square + z.norm(dim=0).square()
                    mean, square = mean / len(vectors), square / len(vectors)
                    self._known[_kind(name, side)] = mean, (square - mean**2).clamp_min(1).sqrt()

    def carried(
        self, site: Site, side: Literal["x", "delta"], rows: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n d_model"] | None:
        """One side of a matrix in the stream; None where it does not lead there."""
        carried = stream_side(site, side, rows, self.partners[site])
        return carried if carried is not None and carried.shape[1] == self._d_model else None

    def z(
        self, scores: Float[Tensor, "n d_vocab"], side: str, names: Sequence[str]
    ) -> Float[Tensor, "n d_vocab"]:
        """Scores over the vocabulary as z, less what is usual; written over the scores."""
        z, start = standardised(scores), 0
        for kind, together in groupby(_kind(name, side) for name in names):
            mean, spread = self._known[kind]
            here = z[start : start + len(list(together))]
            here.sub_(mean).div_(spread)
            start += len(here)
        return z


def _kind(matrix: str, side: str) -> str:
    return "stream" if READ_THROUGH[matrix] == side else f"{matrix} {side}"


def standardised(scores: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
    """Each row less its mean, over its spread; in place."""
    scores.sub_(scores.mean(1, keepdim=True))
    # Twice as fast as `std`, which means once more.
    spread = scores.norm(dim=1, keepdim=True) / math.sqrt(scores.shape[1] - 1)
    return scores.div_(spread.clamp_min(1e-12))


@dataclass(frozen=True, eq=False)
class Side:
    """One side of all directions in words.

    Attributes:
        readout: Both ends of each direction [cell]; `zero` where this side cannot be read.
        legibility: The highest z of each direction over the vocabulary [cell].
        words: By layer, and for None over all, the nats beyond chance of each word that has any:
            ids and sums, the highest first.
        opposite: The same of the other end.
    """

    readout: Readout
    legibility: Float[Tensor, " cell"]
    words: Mapping[int | None, tuple[Tensor, Tensor]]
    opposite: Mapping[int | None, tuple[Tensor, Tensor]]


def read_side(
    head: Head,
    cells: Mapping[Site, Directions],
    side: Literal["x", "delta"],
    largest: float,
    top_k: int,
    usual: Usual,
    targets: Sequence[int] = (),
) -> Side:
    """One side of all directions, read by a head; with `top_k` 0 without a readout of each."""
    rows, at, weights, layers, names = [], [], [], [], []
    n = 0
    for site, one in cells.items():
        carried = usual.carried(site, side, one.u if side == "x" else one.v)
        if carried is not None:
            rows.append(carried)
            at += range(n, n + len(one.s))
            weights.append(one.s / largest)
            layers += [site.layer] * len(one.s)
            names += [site.matrix] * len(one.s)
        n += len(one.s)
    tally, legibility = _Tally(head.W_U.shape[1]), torch.full((n,), float("nan"))
    if not rows:
        blank = _blank(n, top_k, len(targets))
        return Side(blank, legibility, tally.words(1), tally.words(-1))
    device = head.W_U.device
    vectors = torch.nn.functional.normalize(torch.cat(rows), dim=1)
    weight, layer = torch.cat(weights), torch.tensor(layers)
    read: list[Readout] = []
    for chunk in torch.arange(len(vectors)).split(_ROWS):
        scores = all_scores(head, vectors[chunk]).float()
        if top_k:
            lead, places = (len(chunk),), torch.arange(len(chunk), device=device)
            lengths, doubtful = vectors[chunk].norm(dim=1), torch.zeros_like(places).bool()
            read.append(readout_of_scores(scores, lengths, doubtful, places, lead, top_k, targets))
        z = usual.z(scores, side, [names[i] for i in chunk.tolist()])
        legibility[torch.tensor(at)[chunk]] = z.amax(1).to(legibility)
        tally.add(z, weight[chunk], layer[chunk])
    joined = _joined(read).placed(at, n) if read else _blank(n, 0, 0)
    return Side(joined, legibility, tally.words(1), tally.words(-1))


class _Tally:
    """Nats beyond chance of each word, by layer and end."""

    def __init__(self, d_vocab: int) -> None:
        self._bar = math.log(d_vocab)
        self._found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, z: Tensor, weight: Tensor, layer: Tensor) -> None:
        edge = math.sqrt(2 * self._bar)
        # Few words stand out anywhere: find those first, then where.
        words = ((z.amax(0) > edge) | (z.amin(0) < -edge)).nonzero()[:, 0]
        z = z[:, words]
        cell, word = (z.abs() > edge).nonzero(as_tuple=True)
        beyond, word = z[cell, word], words[word]
        nats = (beyond.square() / 2 - self._bar) * weight.to(z)[cell]
        for one in layer[cell.cpu()].unique().tolist():
            here = layer.to(cell.device)[cell] == one
            self._found.setdefault(one, []).append((word[here], nats[here], beyond[here] > 0))

    def words(self, sign: int) -> dict[int | None, tuple[Tensor, Tensor]]:
        some = {
            layer: [(w[up == (sign > 0)], nats[up == (sign > 0)]) for w, nats, up in parts]
            for layer, parts in sorted(self._found.items())
        }
        return {None: self._summed([pair for pairs in some.values() for pair in pairs])} | {
            layer: self._summed(pairs) for layer, pairs in some.items()
        }

    def _summed(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if not any(len(words) for words, _ in pairs):
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        words, at = torch.cat([word for word, _ in pairs]).unique(return_inverse=True)
        nats = torch.zeros(len(words), device=words.device).index_add(
            0, at, torch.cat([n for _, n in pairs])
        )
        order = nats.argsort(descending=True, stable=True)
        return words[order].cpu(), nats[order].cpu()


def _joined(parts: Sequence[Readout]) -> Readout:
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return Readout(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


def _blank(n: int, top_k: int, n_targets: int) -> Readout:
    nan, no = torch.full((n, top_k), float("nan")), torch.full((n, top_k), -1)
    flags = torch.zeros(n, dtype=torch.bool)
    return Readout(
        no, nan, no, nan, torch.zeros(n), ~flags, torch.zeros(n), flags,
        torch.full((n, n_targets), -1), torch.full((n, n_targets), float("nan")),
    )  # fmt: skip


def chances(
    legibility: Float[Tensor, " cell"],
    matrices: Sequence[str],
    random: Float[Tensor, " other"],
    others: Sequence[str],
) -> Float[Tensor, " cell"]:
    """Share of a matrix name's random directions that are at least as legible, (1 + n) / (1 + N).

    nan where a side cannot be read.
    """
    p = torch.full_like(legibility, float("nan"))
    for matrix in dict.fromkeys(matrices):
        here = torch.tensor([m == matrix for m in matrices])
        null = random[torch.tensor([m == matrix for m in others])]
        null, own = null[~null.isnan()].sort().values, legibility[here]
        above = len(null) - torch.searchsorted(null, own.contiguous())
        p[here] = torch.where(own.isnan(), own, (1 + above) / (1 + len(null)))
    return p


def random_change(change: WeightChange, seed: int) -> WeightChange:
    """A change of the same singular values, matrix by matrix, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    return WeightChange({site: random_like(part, generator) for site, part in change.items()})
