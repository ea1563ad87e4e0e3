"""A part of a block as a branch of the stream: what it adds, and how it gets there.

A feed-forward part's product (what W_out gives, a mixture's experts together) reaches the stream as
it is, scaled, or through a norm; the stream reaches the last block as it is, or scaled. Both are
measured, not looked up: `held` is the linear map that the model itself applies, a norm's scale held
where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from bwlens.model.blocks import dense_mlps, mixtures
from bwlens.model.head import stream_of
from bwlens.model.passes import Addition, run, wide
from bwlens.model.places import ExpertTap, Point, Tap
from bwlens.model.probing import probe_batch, undisturbed
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, find_taps

LINEAR = 1e-3
"""Share by which a map may differ from the linear one that it is taken for."""


@dataclass(frozen=True, eq=False)
class Branch:
    """A part of one layer: the taps of its last matrix, and where its product passes."""

    layer: int
    taps: tuple[Tap | ExpertTap, ...]
    points: tuple[Point, ...]


def mlp_branches(model: LensModel, layers: Layers = None) -> list[Branch]:
    """The feed-forward part of each layer that has one.

    Raises:
        ValueError: No layer asked for has one.
        NotImplementedError: A W_out that cannot be read, or two parts side by side in a block.
    """
    by_layer: dict[int, list[Tap | ExpertTap]] = {}
    for tap in find_taps(model, "W_out", layers):
        layer = tap.layer if isinstance(tap, ExpertTap) else tap.site.layer
        by_layer.setdefault(layer, []).append(tap)
    branches = []
    for layer, taps in by_layer.items():
        block = model.blocks[layer]
        first = taps[0]
        if isinstance(first, Tap) and first.site.expert is None:
            branches.append(Branch(layer, (first,), first.z))
            continue
        parts = mixtures(block)
        if len(parts) != 1 or dense_mlps(block):
            raise NotImplementedError(
                f"layer {layer} has experts beside another feed-forward part, so its product passes"
                f" no one place; name layers that have one part"
            )
        branches.append(Branch(layer, tuple(taps), (Point(parts[0], "output"),)))
    return branches


def attention_branches(model: LensModel, layers: Layers = None) -> list[Branch]:
    """The attention of each layer that has one, as far as its W_O.

    Raises:
        ValueError: No layer asked for has one.
        NotImplementedError: A W_O that cannot be read, or several in a block.
    """
    branches = []
    for tap in find_taps(model, "W_O", layers):
        assert isinstance(tap, Tap)
        if branches and branches[-1].layer == tap.site.layer:
            raise NotImplementedError(
                f"layer {tap.site.layer} has several W_O, so its attention's product passes no one"
                f" place; name other layers"
            )
        branches.append(Branch(tap.site.layer, (tap,), tap.z))
    return branches


@dataclass(frozen=True, eq=False)
class Parted:
    """The stream s that passes by a part, what the part adds to it, and what becomes of their sum.

    Attributes:
        stream: s [batch, pos, d_model].
        added: What the part adds to it.
        handed_on: From streams in place of s + added, batch after batch, to what leaves the block.
    """

    stream: Float[Tensor, "batch pos d_model"]
    added: Float[Tensor, "batch pos d_model"]
    handed_on: Callable[[Float[Tensor, "rows pos d_model"]], Float[Tensor, "rows pos d_model"]]


class Streams:
    """One batch's pass, with the stream behind each block and each branch's product.

    Args:
        model: A TransformerBridge or HookedTransformer.
        tokens: Token ids [batch, pos].
        branches: Whose products are noted.
        graph: Whether gradients are to be taken.
    """

    def __init__(
        self,
        model: LensModel,
        tokens: Int[Tensor, "batch pos"],
        branches: Sequence[Branch],
        graph: bool = False,
    ) -> None:
        self._model, self._tokens = model, tokens
        self._outputs = [Point(block, "output") for block in model.blocks]
        self._first = Point(model.blocks[0], "input")
        points = {point for branch in branches for point in branch.points} | set(self._outputs)
        points |= {self._first}
        taps = [tap for branch in branches for tap in branch.taps]
        self.passed = run(
            model, tokens, taps=taps, points=points, keeping=list(model.blocks), graph=graph
        )

    def out(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The stream that leaves a block."""
        return self._stream(self._outputs[layer], f"leaves block {layer}")

    def entering(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The stream that enters a block."""
        return self.out(layer - 1) if layer else self._stream(self._first, "enters block 0")

    def _stream(self, point: Point, what: str) -> Float[Tensor, "batch pos d_model"]:
        stream = stream_of(self.passed.seen.get(point))
        if stream is None or stream.shape[:-1] != self._tokens.shape:
            raise NotImplementedError(
                f"what {what} is no stream [batch, pos, d_model] that bwlens can follow"
            )
        return stream

    def product(self, branch: Branch) -> Tensor:
        """What the feed-forward part of a block gives, as it passes."""
        for point in branch.points:
            if tensors := self.passed.seen.get(point):
                return tensors[-1]
        raise NotImplementedError(
            f"the product of layer {branch.layer} passed no hook point in the model's present"
            f" mode; reload the model raw (bwlens.load_model)"
        )

    def replaced(
        self, branch: Branch, products: Float[Tensor, "rows pos d"]
    ) -> Float[Tensor, "rows pos d_model"]:
        """What leaves the block, a batch of rows for each of some products in place of its own."""
        n = len(products) // len(self._tokens)
        own = self.product(branch).detach().reshape(*self._tokens.shape, -1)
        added = products.to(own) - repeat(own, "batch ... -> (n batch) ...", n=n)
        block, below = self._model.blocks[branch.layer], self._model.blocks[: branch.layer]
        passed = run(
            self._model,
            self._tokens.repeat(n, 1),
            taps=[tap for tap in branch.taps if isinstance(tap, ExpertTap)],  # run one by one
            additions=[Addition(branch.points, added, name=f"W_out of layer {branch.layer}")],
            giving=self._giving(list(below), n),
            keeping=[block],
            until=block,
        )
        stream = stream_of([passed.left[block]])
        assert stream is not None
        return stream

    def parted(self, branch: Branch) -> Parted:
        """What passes by a branch, and what the branch adds to it.

        A feed-forward part, and attention beside it, adds to what leaves the block. Attention below
        it adds to what enters the block: that product and stream meet as they are is measured.

        Raises:
            NotImplementedError: Something stands between attention's product and the stream.
        """
        out, own = self.out(branch.layer), self.product(branch)
        own = own.reshape(*out.shape[:2], -1)
        matrix = branch.taps[0].matrices[-1]
        draw = torch.Generator().manual_seed(0)
        if matrix != "W_O" or self._last_to_add(branch, own, draw):
            stream = self.replaced(branch, torch.zeros_like(own))
            return Parted(stream, out - stream, lambda streams: streams)
        # Where W_O is given what takes the stream away and puts one vector in the place of every
        # token, nothing but that vector goes on.
        entering = self.entering(branch.layer)
        one = torch.randn(entering.shape[-1], generator=draw).to(entering)
        one *= entering.norm(dim=-1).max() / one.norm()
        left = wide(self.replaced(branch, one - entering))
        off = float((left - left[:1, :1]).norm(dim=-1).max() / left[0, 0].norm())
        if not off <= max(LINEAR, 30 * torch.finfo(entering.dtype).eps):
            raise NotImplementedError(
                f"what W_O of layer {branch.layer} gives does not meet the stream as it is"
                f" (measured, off by {off:.1%}): a norm or a factor stands between, so that the"
                f" residual round this attention cannot be taken away here; name other layers"
            )

        def handed_on(streams: Tensor) -> Tensor:
            by = repeat(entering, "batch ... -> (n batch) ...", n=len(streams) // len(entering))
            return self.replaced(branch, streams - by)

        return Parted(entering, own, handed_on)

    def _last_to_add(self, branch: Branch, own: Tensor, draw: torch.Generator) -> bool:
        """Whether more of a product leaves the block as so much more, nothing else reading it."""
        more = torch.randn(own.shape, generator=draw).to(own)
        more *= (own.norm(dim=-1, keepdim=True) / more.norm(dim=-1, keepdim=True)).clamp_min(1e-6)
        change = wide(self.replaced(branch, own + more)) - wide(self.out(branch.layer))
        return float((change - more).norm() / more.norm()) <= 10 * LINEAR

    def after(
        self, layer: int, streams: Float[Tensor, "rows pos d_model"], **options: Any
    ) -> Float[Tensor, "rows position d_vocab"]:
        """The logits where these streams, batch after batch, leave a block in place of its own."""
        n = len(streams) // len(self._tokens)
        upto = list(self._model.blocks[: layer + 1])
        left = _with_stream(self.passed.left[upto[-1]], streams)
        giving = dict.fromkeys(upto, left)
        return wide(run(self._model, self._tokens.repeat(n, 1), giving=giving, **options).logits)

    def _giving(self, below: list[nn.Module], n: int) -> dict[nn.Module, Any]:
        if not below:
            return {}
        stream = repeat(self.out(len(below) - 1).detach(), "batch ... -> (n batch) ...", n=n)
        return dict.fromkeys(below, _with_stream(self.passed.left[below[-1]], stream))


def _with_stream(left: Any, stream: Tensor) -> Any:
    """What left a block, with another stream in its place."""
    if isinstance(left, tuple | list):
        return type(left)([_with_stream(left[0], stream), *left[1:]])
    return stream.to(left)


def stream_scales(model: LensModel) -> list[float]:
    """By how much each block's stream is scaled on its way to the end: 1 in nearly every model.

    Measured: a stream so large that what the blocks add to it does not count.

    Raises:
        NotImplementedError: Some block turns the stream into another direction (a norm stands in
            the stream itself), so that nothing reaches the end directly.
    """
    tokens, first = probe_batch(model).tokens, Point(model.blocks[0], "input")
    outputs = [Point(block, "output") for block in model.blocks]
    with undisturbed(model):
        stream = run(model, tokens, points={first}).seen[first][0]
        large = stream * (1e4 if stream.dtype is torch.float16 else 1e6) / stream.abs().max()
        more = Addition((first,), large - stream, name="the first block")
        seen = run(model, tokens, points=set(outputs), additions=[more]).seen
    total = []
    for layer, point in enumerate(outputs):
        left = stream_of(seen.get(point))
        one = large.flatten().double()
        other = None if left is None else left.flatten().to(one)
        if other is None or len(other) != len(one):
            raise NotImplementedError(f"the stream of block {layer} is not to be followed")
        scale = float(one @ other / (one @ one))
        off = float((other - scale * one).norm() / other.norm())
        if not off < 0.05 or scale < 1e-2:
            raise NotImplementedError(
                f"block {layer} does not hand on its stream as it is: {1 - min(off, 1):.0%} of a"
                f" large stream passes. A norm stands in the stream itself (post-norm, GPT-1), so"
                f" that no row's share reaches the logits directly; ablate(...) measures it"
            )
        total.append(scale)
    scales = [total[-1] / scale for scale in total]
    return [1.0 if abs(scale - 1) < 1e-2 else scale for scale in scales]


def held(
    gradient: Float[Tensor, " d"],
    at: Float[Tensor, " d"],
    given: float,
    probe: Callable[[Float[Tensor, "n d"]], Float[Tensor, " n"]],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, " d"], bool] | None:
    """The linear map that a norm (or anything linear) is at one place, its scale held.

    f(v) = A v / h(|v|) + b gives w with w v = along A v / h(|at|). The gradient lacks what the
    scale's own change takes away, all of it along `at` (without its mean, for a LayerNorm): so much
    is added that w at = along (f(at) - f(0)). Whether this is the map is then measured.

    Args:
        gradient: Of along f, at the place.
        at: The place.
        given: along (f(at) - f(0)).
        probe: Rows [n, d] to along (f(row) - f(0)) [n].
        dtype: What f computes in.

    Returns:
        w, and whether f takes the mean out; None where f is no such map.
    """
    noise = torch.Generator().manual_seed(0)
    v = torch.randn(len(at), generator=noise, dtype=torch.float64).to(at)
    scales = [rescaling(at, v[None], centred)[0] for centred in (False, True)]
    measured = probe(torch.stack([scale * v for scale in scales]))
    found = []
    for centred, scale, value in zip((False, True), scales, measured, strict=True):
        base = at - at.mean() if centred else at
        w = gradient + base * ((given - gradient @ at) / base.square().sum())
        found.append((float((w @ v - value / scale).abs() / (w.norm() * v.norm())), w, centred))
    # The closer one: where the mean is small, both are close.
    off, w, centred = min(found, key=lambda one: one[0])
    # Entries are rounded each by itself, so that a product with v is off by less than each.
    rounding = 2 * torch.finfo(dtype).eps / len(at) ** 0.5
    return (w, centred) if off <= max(LINEAR, rounding) else None


def rescaling(
    at: Float[Tensor, " d"], vectors: Float[Tensor, "n d"], centred: bool
) -> Float[Tensor, " n"]:
    """What each vector is to be multiplied with for a norm to scale it as it scales `at`."""
    rows = torch.cat([at[None], vectors])
    lengths = (rows - rows.mean(1, keepdim=True) if centred else rows).norm(dim=1)
    return lengths[0] / lengths[1:].clamp_min(torch.finfo(at.dtype).tiny)
