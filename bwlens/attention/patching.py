"""Attention patching: what a loss asks of heads, put into their patterns; and leaving heads out."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bwlens.attention.maps import Kind, ReversedAttention
from bwlens.model.attention import changed_patterns

Place = tuple[int, int]
"""A head: its layer and its number."""


@contextmanager
def attention_patching(
    model: Any,
    maps: ReversedAttention,
    alpha: float,
    *,
    kind: Kind = "reversed",
    heads: Iterable[Place] | None = None,
    segments: Sequence[Sequence[Hashable]] | None = None,
    onto: Sequence[Hashable] | None = None,
) -> Generator[None, None, None]:
    """Heads attend with A + alpha * (mean of R over prompts) meanwhile, rows not normalised.

    A negative alpha descends the loss that R was taken of. It holds for every run of the model,
    with prompts of the same length; on leaving, the model is as it was.

    Args:
        model: A TransformerBridge or HookedTransformer.
        maps: What `reversed_attention` gave for prompts of one length, or of any with `segments`.
        alpha: How much is added.
        kind: "forward" adds the mean of A instead, the control.
        heads: Which (layer, head); None is all of `maps`.
        segments: A name for every token of each prompt of `maps`: the mean is then taken of all
            pairs of tokens (query, key) with the same two names.
        onto: With `segments`, the names of the tokens of the prompt that is patched; pairs of names
            that no prompt had are left alone.

    Raises:
        ValueError: Prompts of unequal length without segments, names that do not fit the tokens, a
            head that is not in `maps`, an alpha that is no number; in a pass, another length.

    Source: Katz and Wolf, "Reversed Attention", NAACL 2025.

    Example:
        >>> with attention_patching(model, maps, -20.0):  # doctest: +SKIP
        ...     logits = model(prompt)
    """
    if not isinstance(alpha, int | float) or not abs(alpha) < float("inf"):
        raise ValueError(f"alpha is {alpha!r}; expected a number")
    places = every_place(maps) if heads is None else list(heads)
    means = {place: alpha * _mean(maps, place, kind, segments, onto).float() for place in places}
    with _changed(model, means):
        yield


@contextmanager
def without_heads(
    model: Any, heads: Iterable[Place] | Sequence[Iterable[Place]]
) -> Generator[None, None, None]:
    """These heads hand nothing to W_O meanwhile: their patterns are 0.

    With a list of several heads for each prompt of a batch, each prompt loses its own.
    """
    given = [*heads]
    rows: list[Any] = given if given and isinstance(given[0], list | set | frozenset) else [given]
    layers = sorted({layer for row in rows for layer, _ in row})

    def change(layer: int) -> Any:
        def leave_out(pattern: Tensor) -> Tensor:
            if len(rows) not in (1, len(pattern)):
                raise ValueError(
                    f"heads to leave out of {len(rows)} prompts given, but {len(pattern)} pass"
                )
            kept = torch.ones(len(rows), pattern.shape[1], device=pattern.device)
            for row, places in enumerate(rows):
                for _, head in (place for place in places if place[0] == layer):
                    _check_head(layer, head, pattern)
                    kept[row, head] = 0
            return pattern * kept[:, :, None, None].to(pattern)

        return leave_out

    if not layers:
        yield
        return
    with changed_patterns(model, {layer: change(layer) for layer in layers}):
        yield


def every_place(maps: ReversedAttention) -> list[Place]:
    """Every (layer, head) that has maps."""
    return [(layer, head) for layer, heads in maps.heads.items() for head in heads]


def of_other_heads(maps: ReversedAttention, seed: int = 0) -> ReversedAttention:
    """Each head with the maps of another, drawn by chance: a control of the same sizes.

    Raises:
        ValueError: There is but one head, or layers have different numbers of heads.
    """
    places = every_place(maps)
    if len(places) < 2:
        raise ValueError("one head has no other; take the maps of several")
    chance = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    source = torch.empty_like(chance)
    source[chance] = chance.roll(1)  # one ring, so that none keeps its own
    given: dict[Kind, dict[int, Tensor]] = {}
    kinds: tuple[Kind, ...] = ("reversed", "forward")
    for kind in kinds:
        every = getattr(maps, kind)
        others = every.flatten(1, 2)[:, source.to(every.device)].unflatten(1, every.shape[1:3])
        given[kind] = {layer: others[:, at] for at, layer in enumerate(maps.layers)}
    return replace(maps, _maps=given)


@contextmanager
def _changed(model: Any, means: dict[Place, Tensor]) -> Generator[None, None, None]:
    """The pattern of each head, with its own map added."""

    def change(layer: int) -> Any:
        added = {head: mean for (at, head), mean in means.items() if at == layer}

        def add(pattern: Tensor) -> Tensor:
            pattern = pattern.clone()
            for head, mean in added.items():
                _check_head(layer, head, pattern)
                if pattern.shape[-2:] != mean.shape:
                    raise ValueError(
                        f"the prompt has {tuple(pattern.shape[-2:])} queries and keys, but the maps"
                        f" to be added {tuple(mean.shape)}; patch prompts of that length, or align"
                        f" them with segments= and onto="
                    )
                pattern[:, head] += mean.to(pattern)
            return pattern

        return add

    with changed_patterns(model, {layer: change(layer) for layer, _ in means}):
        yield


def _check_head(layer: int, head: int, pattern: Tensor) -> None:
    if not 0 <= head < pattern.shape[1]:
        raise ValueError(f"layer {layer} has heads 0 to {pattern.shape[1] - 1}, not {head}")


def _mean(
    maps: ReversedAttention,
    place: Place,
    kind: Kind,
    segments: Sequence[Sequence[Hashable]] | None,
    onto: Sequence[Hashable] | None,
) -> Float[Tensor, "query key"]:
    several = [maps.map(*place, kind=kind, prompt=i) for i in range(len(maps.batch))]
    lengths = [len(one) for one in several]
    if segments is None or onto is None:
        if (segments is None) != (onto is None):
            raise ValueError("segments and onto go together: names of both sides' tokens")
        if len({*lengths}) > 1:
            raise ValueError(
                f"the prompts have {min(lengths)} to {max(lengths)} tokens; a mean needs one length"
                f" (take prompts of one length), or names that align them: segments= and onto="
            )
        return torch.stack(several).mean(0)
    if [len(names) for names in segments] != lengths:
        raise ValueError(
            f"segments names {[len(names) for names in segments]} tokens, but the prompts have"
            f" {lengths}"
        )
    total = torch.zeros(len(onto), len(onto))
    count = torch.zeros(len(onto), len(onto))
    for one, names in zip(several, segments, strict=True):
        pairs = _same(onto, names).to(one)
        causal = torch.ones_like(one).tril()
        total = total.to(one) + pairs @ one @ pairs.T
        count = count.to(one) + pairs @ causal @ pairs.T
    return (total / count.clamp(min=1)).tril()


def _same(names: Sequence[Hashable], others: Sequence[Hashable]) -> Bool[Tensor, "name other"]:
    return torch.tensor([[name == other for other in others] for name in names])
