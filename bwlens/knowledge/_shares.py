"""The exact share of each row of W_out in a logit: the direct path, the final norm's scale held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bwlens.knowledge.branches import (
    LINEAR,
    Branch,
    Streams,
    held,
    mlp_branches,
    rescaling,
    stream_scales,
)
from bwlens.model.flows import Flow, as_rows
from bwlens.model.head import Head, head_of
from bwlens.model.passes import wide
from bwlens.model.places import Site
from bwlens.model.sites import Layers
from bwlens.model.weights import parameter_of
from bwlens.reading.scoring import all_scores


@dataclass(frozen=True, eq=False)
class Store:
    """One W_out that the last token passes, and what its rows give.

    Attributes:
        site: Which one.
        weights: What its rows are mixed with [d_mlp]: the x of W_out.
        gains: What each row gives the logit for a unit of weight [d_mlp].
        rows: W_out itself [d_mlp, d_model], in the model's memory.
        routed: What a mixture multiplies this expert's product with; 1 without one.
    """

    site: Site
    weights: Float[Tensor, " d_mlp"]
    gains: Float[Tensor, " d_mlp"]
    rows: Float[Tensor, "d_mlp d_model"]
    routed: float


class Shares:
    """The shares of all rows in one prompt's logit of one token, above the vocabulary's mean.

    Args:
        model: A TransformerBridge or HookedTransformer.
        tokens: Token ids [1, pos].
        layers: Whose feed-forward parts.
        target: The token; None for the model's own answer.

    Attributes:
        stores: The stores that the last token passes, layer by layer.
        layers: The layers that have one.
        mlps: What each layer's feed-forward part gives in all [layer], rows and bias.
        target: The token.
        log_probs: Of every token [d_vocab].
        total: The logit above the mean of all, before a soft cap.
    """

    @torch.no_grad()
    def __init__(
        self, model: Any, tokens: Int[Tensor, "1 pos"], layers: Layers, target: int | None
    ) -> None:
        self.head: Head = head_of(model)
        self._branches = mlp_branches(model, layers)
        scales = stream_scales(model)
        self._streams = Streams(model, tokens, self._branches, graph=True)
        logits = wide(self._streams.passed.logits.detach())[0, -1]
        self.log_probs = logits.log_softmax(-1)
        self.target = int(logits.argmax()) if target is None else target
        self.stores: list[Store] = []
        self._entering: dict[int, Tensor] = {}
        self._added: dict[int, _Added] = {}
        along, self.total = self._at_the_end(self._streams.out(len(scales) - 1).detach()[0, -1])
        self.layers = tuple(branch.layer for branch in self._branches)
        mlps = [self._branch(b, along * scales[b.layer]) for b in self._branches]
        self.mlps = torch.tensor(mlps, dtype=torch.float64)

    def _at_the_end(self, stream: Float[Tensor, " d_model"]) -> tuple[Tensor, float]:
        """What a vector of the last stream gives the logit, as [d_model], and the logit itself."""
        head, norm = self.head, self.head.norm
        W_U, b_U = wide(head.W_U), head.b_U
        u = head.scale * (W_U[:, self.target] - W_U.mean(1))
        with torch.enable_grad():
            leaf = stream.to(head.W_U).clone().requires_grad_()
            normed = wide(norm(leaf[None, None])[0, 0])
            (gradient,) = torch.autograd.grad((normed * u).sum(), leaf)
        zero = wide(norm(torch.zeros_like(leaf.detach())[None, None])[0, 0])
        given = float((normed.detach() - zero) @ u)

        def probe(rows: Tensor) -> Tensor:
            return (wide(norm(rows.to(head.W_U)[:, None])[:, 0]) - zero) @ u

        found = held(wide(gradient), wide(leaf.detach()), given, probe, head.W_U.dtype)
        if found is None:
            raise NotImplementedError(
                "the final norm is no LayerNorm or RMSNorm (nor linear), so that with its scale"
                " held the logit is no sum of what the layers give; ablate(...) measures a row"
            )
        bias = 0.0 if b_U is None else float(b_U[self.target] - b_U.mean()) * head.scale
        return found[0], given + float(zero @ u) + bias

    def _branch(self, branch: Branch, along: Float[Tensor, " d_model"]) -> float:
        """Add a branch's stores; what it gives in all."""
        streams = self._streams
        product, out = streams.product(branch), streams.out(branch.layer)
        along = along.to(out.device)
        gradient = _back(out, along, [product])[0]
        if gradient is None:
            raise NotImplementedError(_other(branch, None))
        own = product.detach().reshape(1, out.shape[1], -1)
        at, gradient = wide(own[0, -1]), wide(gradient).reshape(own.shape)[0, -1]
        none = own.clone()
        none[0, -1] = 0
        without = wide(streams.replaced(branch, none)[0, -1])
        given = float((wide(out.detach()[0, -1]) - without) @ along)

        def with_products(rows: Tensor) -> Tensor:
            """What the block gives with these in place of its product, above none [n, d_model]."""
            several = own.repeat(len(rows), 1, 1)
            several[:, -1] = rows.to(own)
            return wide(streams.replaced(branch, several)[:, -1]) - without

        scale = float(gradient @ along / along.square().sum())
        # A gradient in bfloat16 is off by its rounding alone.
        close = max(LINEAR, torch.finfo(out.dtype).eps)
        straight = float((gradient - scale * along).norm()) <= close * float(gradient.norm())
        if straight:
            w, centred = gradient, None
            off = abs(float(w @ at) - given) / float(w.norm() * at.norm() + 1e-30)
            if off > max(LINEAR, 30 * torch.finfo(out.dtype).eps):
                raise NotImplementedError(_other(branch, off))
        else:
            found = held(gradient, at, given, lambda rows: with_products(rows) @ along, out.dtype)
            if found is None:
                raise NotImplementedError(_other(branch, None))
            w, centred = found
        self._entering[branch.layer] = without
        self._added[branch.layer] = _Added(at, scale, centred, with_products)
        flows = [f for f in streams.passed.flows if f.tap in branch.taps]
        self._add_stores(flows, product, w, out.shape[1] - 1)
        return given

    def _add_stores(self, flows: list[Flow], product: Tensor, w: Tensor, last: int) -> None:
        backs: list[Any] = [w] * len(flows)
        if any(site.expert is not None for flow in flows for site, _ in flow.parts):
            backs = _back(product, w, [flow.z for flow in flows])
        for flow, gradient in zip(flows, backs, strict=True):
            rows = [last] if flow.tokens is None else (flow.tokens == last).nonzero().flatten()
            for site, columns in flow.parts:
                if site.matrix != "W_out" or not len(rows) or gradient is None:
                    continue
                row = int(rows[0])
                back = gradient if gradient.ndim == 1 else as_rows(gradient)[row, columns]
                x = wide(as_rows(flow.x.detach())[row])
                W = parameter_of(flow.tap, site)[1].detach()
                back = wide(back).to(x)
                routed = float(back @ w / w.square().sum())
                self.stores.append(Store(site, x, wide(W) @ back, W, routed))

    def added(self, store: Store, chosen: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """What rows of a store add to the stream, each with its weight."""
        vectors = store.routed * store.weights[chosen, None] * wide(store.rows[chosen])
        return self._added[store.site.layer](vectors)

    @torch.no_grad()
    def increases(self, layer: int, added: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """By how much what is added raises the target's log-probability, read behind its own block.

        log p(h + v) - log p(h), with h the stream without this layer's product.
        """
        h = self._entering[layer]
        log_p = all_scores(self.head, torch.cat([h[None], h + added])).log_softmax(-1)
        return (log_p[1:] - log_p[0])[:, self.target]


@torch.enable_grad()
def _back(passed: Tensor, along: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    """The gradients of what passes at the last position, along a vector."""
    total = (wide(passed.reshape(-1, passed.shape[-1])[-1]) * along).sum()
    return list(torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True))


@dataclass(frozen=True, eq=False)
class _Added:
    """What vectors [n, d_model], as parts of a branch's product, add to the stream."""

    at: Tensor
    scale: float
    centred: bool | None
    with_products: Any

    def __call__(self, vectors: Tensor) -> Tensor:
        if self.centred is None:
            return self.scale * vectors
        scales = rescaling(self.at, vectors, self.centred)[:, None]
        return self.with_products(scales * vectors) / scales


def _other(branch: Branch, off: float | None) -> str:
    by = "" if off is None else f" (measured, it gives other than its gradient says, by {off:.1%})"
    return (
        f"what stands between W_out of layer {branch.layer} and the stream is neither linear nor a"
        f" norm of its product alone{by}, so that its rows have no share of their own; name other"
        f" layers, or measure rows with ablate(...)"
    )
