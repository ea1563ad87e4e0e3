"""A change on text: what enters its matrices, and how it moves the words that follow."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves functions untyped.)

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.model.flows import as_rows
from bwlens.model.locking import alone_with
from bwlens.model.losses import last_logits
from bwlens.model.passes import Addition, run
from bwlens.model.places import Tap
from bwlens.model.prompts import Batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site, find_taps

PROMPTS = (
    "The weather today is cold and", "When he was a child he lived in",
    "The results of the study show that", "She has been working as a", "Two plus two is",
    "My favourite book is about",
)  # fmt: skip
"""Beginnings that have nothing to do with most changes."""


@dataclass(frozen=True, eq=False)
class ChangeEffect:
    """What a change does to the words that follow some prompts.

    A word's share is p_after log(p_after / p_before), in nats; over the vocabulary these sum to the
    divergence KL(after || before).

    Attributes:
        prompts: The prompts as text, or their token ids.
        divergences: KL of each prompt's next words, nats [prompt].
        before: The likeliest next word of each prompt, by id.
        after: The same with the change.
        shares: Each word's mean share over the prompts [d_vocab].
        raised: Ids of the words with the largest mean share, first one first.
        lowered: Ids of the words that lost most, by p_before log(p_before / p_after).
        random: Mean divergence for a change of the same singular values in random directions.
    """

    prompts: tuple[str, ...]
    divergences: Float[Tensor, " prompt"]
    before: Int[Tensor, " prompt"]
    after: Int[Tensor, " prompt"]
    shares: Float[Tensor, " d_vocab"]
    raised: Int[Tensor, " k"]
    lowered: Int[Tensor, " k"]
    random: float

    @property
    def divergence(self) -> float:
        """The mean over the prompts, nats."""
        return float(self.divergences.mean())


def inputs_of(
    model: LensModel, batch: Batch, sites: Iterable[Site]
) -> tuple[dict[Site, Tensor], Float[Tensor, "batch d_vocab"]]:
    """What enters each matrix, padding left out: x [n, d_in] by site; and the next words' log p."""
    wanted = set(sites)
    taps = find_taps(model, list({s.matrix for s in wanted}), {s.layer for s in wanted})
    keep = batch.mask.flatten()
    inputs: dict[Site, Tensor] = {}
    passed = run(model, batch.tokens, taps=taps)
    for flow in passed.flows:
        rows = as_rows(flow.x)
        here = keep if flow.tokens is None else keep[flow.tokens.to(keep.device)]
        for site, _ in flow.parts:
            if site in wanted:
                inputs[site] = rows[here.to(rows.device)]
    return inputs, last_logits(passed.logits.float(), batch).log_softmax(-1)


def effect_of(
    model: LensModel,
    batch: Batch,
    prompts: tuple[str, ...],
    change: WeightChange,
    random: WeightChange,
    old: Float[Tensor, "batch d_vocab"],
    top_k: int,
) -> ChangeEffect:
    """Measured with the change in effect, and with a random one of the same spectrum.

    `old` are the next words' log-probabilities as the model is.
    """
    with alone_with(model):
        new = _log_probs(model, batch, change)
        control = _log_probs(model, batch, random)
    shares, losses = new.exp() * (new - old), old.exp() * (old - new)
    return ChangeEffect(
        prompts,
        shares.sum(1),
        old.argmax(1),
        new.argmax(1),
        shares.mean(0),
        shares.mean(0).topk(top_k).indices,
        losses.mean(0).topk(top_k).indices,
        float((control.exp() * (control - old)).sum(1).mean()),
    )


def _log_probs(
    model: LensModel, batch: Batch, change: WeightChange
) -> Float[Tensor, "batch d_vocab"]:
    """After each prompt, with the change added to what leaves its matrices; weights stay."""
    sites = list(change)
    taps = (
        find_taps(model, list({s.matrix for s in sites}), {s.layer for s in sites}) if sites else []
    )
    plain = {t.site: t for t in taps if isinstance(t, Tap) and t.routing is None}
    if any(site not in plain or plain[site].gated_heads for site in sites):
        with change.applied(model):
            return _log_probs(model, batch, WeightChange())
    additions = [
        Addition(plain[s].z, partial(_through, part), plain[s].x, str(s))
        for s, part in change.items()
    ]
    logits = run(model, batch.tokens, additions=additions).logits
    return last_logits(logits.float(), batch).log_softmax(-1)


def _through(part: Any, x: Tensor) -> Tensor:
    rows = x.reshape(-1, part.d_in)
    return (rows @ part.x.to(rows).T) @ part.delta.to(rows)
