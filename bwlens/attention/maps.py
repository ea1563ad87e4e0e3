"""Reversed Attention: what a loss asks of each head's attention, as a map from token to token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.gradient.objectives import NLL, LogitDifference, as_objective
from bwlens.model.attention import Attended, attended, lowest
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.losses import Run, check_mode
from bwlens.model.passes import wide
from bwlens.model.prompts import Batch, Mask, Prompts, make_batch
from bwlens.model.sites import Layers
from bwlens.model.tokens import token_texts

Heads = Iterable[int] | int | slice | None
"""Heads from 0, negative ones from the last: one, several, a slice, or None for all."""

Kind = Literal["reversed", "forward"]


@dataclass(frozen=True, eq=False)
class ReversedAttention:
    """The reversed and the forward attention map of heads.

    With S = Q K^T * scale and A = softmax(S), R = dL/dS * scale, so that dL/dQ = R K and
    dL/dK = R^T Q for queries and keys as they are multiplied (after rotation and norms). A step
    down the gradient raises attention where R is negative. Rows of R sum to 0 where nothing but a
    scale and a mask stands between product and softmax (no soft cap, no sink).

    Attributes:
        losses: One loss per prompt [batch].
        batch: The tokens.
        tokens: Their texts, a list per prompt.
        layers: Those that have a map, out of those asked for.
        heads: The heads of each layer.
    """

    losses: Float[Tensor, " batch"]
    batch: Batch
    tokens: list[list[str]]
    heads: dict[int, list[int]]
    n_layers: int
    _maps: dict[Kind, dict[int, Tensor]] = field(repr=False)

    @property
    def layers(self) -> list[int]:
        """The layers that have a map, out of those asked for."""
        return list(self.heads)

    @property
    def reversed(self) -> Float[Tensor, "batch layer head query key"]:
        """R of every prompt, padding 0."""
        return self._stacked("reversed")

    @property
    def forward(self) -> Float[Tensor, "batch layer head query key"]:
        """A of every prompt, padding 0."""
        return self._stacked("forward")

    def map(
        self, layer: int, head: int, *, kind: Kind = "reversed", prompt: int = 0
    ) -> Float[Tensor, "query key"]:
        """One head's map for one prompt, R or (`kind="forward"`) A.

        Raises:
            KeyError: Not among the layers and heads asked for.
            IndexError: No such prompt.
        """
        layer = layer + self.n_layers if layer < 0 else layer
        if layer not in self.heads:
            raise KeyError(f"layer {layer} has no map here; there are layers {self.layers}")
        if head not in self.heads[layer]:
            raise KeyError(f"head {head} was not asked for; layer {layer} has {self.heads[layer]}")
        if not -len(self.batch) <= prompt < len(self.batch):
            raise IndexError(f"prompt {prompt} asked for, but there are {len(self.batch)}")
        length = int(self.batch.lengths[prompt])
        maps = self._maps[kind][layer][prompt, self.heads[layer].index(head)]
        return maps[:length, :length]

    def norms(self, kind: Kind = "reversed") -> Float[Tensor, "batch layer head"]:
        """Frobenius norm of every map."""
        return self._stacked(kind, lambda maps: maps.double().norm(dim=(-2, -1)).to(maps.dtype))

    def strongest(self, top_k: int = 10) -> list[tuple[int, int]]:
        """(layer, head) by the norm of R, the mean over prompts, largest first."""
        means = {
            (layer, head): float(norm)
            for layer, maps in self._maps["reversed"].items()
            for head, norm in zip(
                self.heads[layer], maps.norm(dim=(-2, -1)).mean(0).tolist(), strict=True
            )
        }
        return sorted(means, key=lambda place: -means[place])[:top_k]

    def _stacked(self, kind: Kind, of: Any = lambda maps: maps) -> Tensor:
        parts = [of(maps) for maps in self._maps[kind].values()]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(
                "the layers have different numbers of heads, so they make no one tensor; take them"
                " one by one with .map(layer, head), or ask for the same heads of each (heads=)"
            )
        return torch.stack([part.to(self.losses.device) for part in parts], dim=1)

    def __repr__(self) -> str:
        n_heads = sum(map(len, self.heads.values()))
        return (
            f"ReversedAttention({n_heads} heads of layers {self.layers[0]}-{self.layers[-1]};"
            f" {len(self.batch)} prompts)"
        )


@one_thread_at_a_time
def reversed_attention(
    model: Any,
    prompts: Prompts,
    objective: Any,
    *,
    layers: Layers = None,
    heads: Heads = None,
    prepend_bos: bool | None = None,
    attention_mask: Mask | None = None,
) -> ReversedAttention:
    """R and A of every head, from one forward and one backward pass.

    Queries and keys that are scaled before they are multiplied are meant unscaled; of grouped keys
    each head has its own copy. In hybrids, layers without an attention map are left out.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        prompts: As for `capture`.
        objective: As for `capture`.
        layers: Which; the backward pass stops at the lowest.
        heads: Which heads of each layer.
        prepend_bos: As for `capture`.
        attention_mask: As for `capture`.

    Raises:
        ValueError: As for `capture`; a head or layer out of range.
        NotImplementedError: A layer asked for has no attention map (a state-space layer, a
            compressed cache), as the message says.

    Source: Katz and Wolf, "Reversed Attention", NAACL 2025.

    Example:
        >>> maps = reversed_attention(model, "I visited the city of", " Florence")  # doctest: +SKIP
        >>> maps.map(30, 8).shape  # doctest: +SKIP
        torch.Size([5, 5])
    """
    check_mode()
    objective = as_objective(objective)
    batch = batch_of(model, prompts, objective, prepend_bos, attention_mask)
    run, passed = passes(model, batch, objective, layers)
    taking = Taking(heads)
    taking.expect(run, passed)
    run.gradients(*lowest(passed))
    return taking.taken(model, batch)


def passes(
    model: Any, batch: Batch, objective: Any, layers: Layers
) -> tuple[Run, dict[int, Attended]]:
    """As `attended`; where an objective reads the answers alone, they alone are unembedded."""
    if not isinstance(objective, NLL | LogitDifference):
        return attended(model, batch, objective, layers)
    positions, alone = batch.answers()
    return attended(
        model, batch, lambda logits, _: objective(logits, alone), layers, positions=positions
    )


class Taking:
    """R and A of heads out of a pass that somebody else runs (`bwlens.gradient.capturing`)."""

    def __init__(self, heads: Heads = None) -> None:
        self._heads = heads
        self._reversed: dict[int, Tensor] = {}

    def expect(self, run: Run, passed: dict[int, Attended]) -> None:
        """A backward pass is about to come by, as far down as `lowest`."""
        self._run, self._passed = run, passed
        self._numbers = {layer: chosen(one, self._heads) for layer, one in passed.items()}
        expect(run, passed, self._keep)

    def _keep(self, one: Attended, gradient: Tensor) -> None:
        self._reversed[one.layer] = gradient[:, self._numbers[one.layer]].clone()

    def taken(self, model: Any, batch: Batch) -> ReversedAttention:
        """What came.

        Raises:
            ValueError: The loss does not depend on the scores of a layer.
        """
        check_all_came(self._passed, self._reversed)
        maps: dict[Kind, dict[int, Tensor]] = {"reversed": {}, "forward": {}}
        for layer, one in self._passed.items():
            pattern = one.by_head(one.pattern.detach())[:, self._numbers[layer]]
            real = batch.mask[:, None, :, None].to(pattern.device)
            maps["reversed"][layer] = self._reversed[layer]
            maps["forward"][layer] = torch.where(real, pattern, 0.0)
        tokens = [
            token_texts(model.tokenizer, row[:n])
            for row, n in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
        ]
        losses = self._run.losses.detach()
        del self._run, self._passed  # and with them the pass's graph
        return ReversedAttention(losses, batch, tokens, self._numbers, len(model.blocks), maps)


def expect(
    run: Run,
    passed: dict[int, Attended],
    arrived: Callable[[Attended, Tensor], None],
    pattern_arrived: Callable[[Attended, Tensor], None] | None = None,
) -> None:
    """In a backward pass each layer's R will come by, before it the pattern's gradient.

    Nothing need be kept of a map, as each is shown when the backward pass gets there.
    """

    def arrive(one: Attended, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise ValueError(
                f"the gradient of layer {one.layer}'s scores is not finite; the model overflows in"
                f" {gradient.dtype}, load it in float32 or bfloat16"
            )
        arrived(one, wide(gradient) / run.scale)

    for one in passed.values():
        one.arrived = partial(arrive, one)
        one.pattern_arrived = pattern_arrived and partial(pattern_arrived, one)


def check_all_came(passed: Collection[int], came: Collection[int]) -> None:
    """Refuse a loss that does not depend on the scores of a layer."""
    if missing := sorted({*passed} - {*came}):
        raise ValueError(
            f"the loss does not depend on the scores of layer {missing[0]}, so they have no"
            f" gradient; ask for other layers, or use an objective that reads the logits"
        )


def chosen(one: Attended, heads: Heads) -> list[int]:
    """The numbers of the heads asked for in a layer.

    Raises:
        ValueError: One is out of range or no whole number, or none is named.
    """
    n_heads = one.by_head(one.product).shape[1]
    if heads is None:
        return list(range(n_heads))
    if isinstance(heads, slice):
        given: Sequence[Any] = range(n_heads)[heads]
    else:
        given = list(heads) if isinstance(heads, Iterable) else [heads]
    if not given:
        raise ValueError("an empty list of heads asked for; name some, or None for all")
    for head in given:
        whole_number = hasattr(head, "__index__") and not isinstance(head, bool)
        if not whole_number or not -n_heads <= head < n_heads:
            raise ValueError(
                f"head {head!r} asked for, but layer {one.layer} has heads 0 to {n_heads - 1} (or"
                f" -{n_heads} to -1 from the last)"
            )
    return sorted({head.__index__() % n_heads for head in given})


def batch_of(
    model: Any, prompts: Prompts, objective: Any, prepend_bos: bool | None, mask: Mask | None
) -> Batch:
    """The prompts with what the objective asks about."""
    return make_batch(
        model, prompts, getattr(objective, "target", None), getattr(objective, "other", None),
        prepend_bos=prepend_bos, attention_mask=mask,
    )  # fmt: skip
