"""How strongly a loss asks something of each head: a cheap rival of ablating each in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.attention.maps import Heads, batch_of, check_all_came, chosen, expect, passes
from bwlens.gradient.objectives import as_objective
from bwlens.model.attention import Attended, lowest
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.losses import check_mode
from bwlens.model.passes import wide
from bwlens.model.prompts import Batch, Mask, Prompts
from bwlens.model.sites import Layers

if TYPE_CHECKING:
    from pandas import DataFrame

Score = Literal["reversed", "warm", "forward"]


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Norms of each head's maps over prompts.

    Attributes:
        reversed: ||R||_F of each prompt [prompt, layer, head].
        warm: The same of R through a softmax of a higher temperature, which heads whose softmax is
            saturated keep as well; None if not asked for.
        forward: ||A||_F.
        losses: One loss per prompt.
        layers: The layers that have maps.
        heads: The heads, the same in each layer.
        temperature: That of `warm`.
    """

    reversed: Float[Tensor, "prompt layer head"]
    warm: Float[Tensor, "prompt layer head"] | None
    forward: Float[Tensor, "prompt layer head"]
    losses: Float[Tensor, " prompt"]
    layers: list[int]
    heads: list[int]
    temperature: float | None = None

    def of(self, score: Score = "reversed") -> Float[Tensor, "prompt layer head"]:
        """One of the scores by name.

        Raises:
            ValueError: No such score, or one that was not asked for.
        """
        if score not in ("reversed", "warm", "forward"):
            raise ValueError(f"score is {score!r}; expected 'reversed', 'warm' or 'forward'")
        if score == "warm" and self.warm is None:
            raise ValueError(
                "no warm score here; ask for it with head_scores(..., temperature=4.0)"
            )
        return getattr(self, score)

    def mean(self, score: Score = "reversed") -> Float[Tensor, "layer head"]:
        """A score's mean over prompts."""
        return self.of(score).mean(0)

    def order(self, score: Score = "reversed") -> list[tuple[int, int]]:
        """Every (layer, head), the highest mean first."""
        places = self.mean(score).flatten().argsort(descending=True, stable=True).tolist()
        n = len(self.heads)
        return [(self.layers[at // n], self.heads[at % n]) for at in places]

    def frame(self) -> DataFrame:
        """A row for each head: layer, head, and the mean of each score; strongest first."""
        from pandas import DataFrame

        rows = [(layer, head) for layer in self.layers for head in self.heads]
        scores: dict[str, Any] = {
            "layer": [layer for layer, _ in rows],
            "head": [head for _, head in rows],
        }
        for score in ("reversed", "warm", "forward"):
            if score != "warm" or self.warm is not None:
                scores[score] = self.mean(score).flatten().tolist()
        return DataFrame(scores).sort_values("reversed", ascending=False, ignore_index=True)

    def __repr__(self) -> str:
        strongest = ", ".join(f"L{layer}H{head}" for layer, head in self.order()[:5])
        return (
            f"HeadScores({len(self.layers)} layers of {len(self.heads)} heads, {len(self.losses)}"
            f" prompts; strongest {strongest})"
        )


@one_thread_at_a_time
def head_scores(
    model: Any,
    prompts: Prompts,
    objective: Any,
    *,
    layers: Layers = None,
    heads: Heads = None,
    temperature: float | None = None,
    batch_size: int = 32,
    prepend_bos: bool | None = None,
    attention_mask: Mask | None = None,
) -> HeadScores:
    """||R||_F of every head and prompt; no map is kept.

    Where a head's softmax is saturated its R vanishes whatever depends on the head. With a
    `temperature` T there is also the norm of R as it would be with A_T = softmax(S / T) in the
    softmax's slope alone: `A_T * (dA - rowsum(A_T * dA)) * scale`, dA = dL/dA of the true pass.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        prompts: As for `capture`; of any lengths.
        objective: As for `capture`. A function of your own gets all prompts at once.
        layers: Which.
        heads: Which heads of each layer.
        temperature: Above 1; None leaves the warm score out.
        batch_size: How many prompts pass at once, alike in length.
        prepend_bos: As for `capture`.
        attention_mask: As for `capture`.

    Raises:
        ValueError, NotImplementedError: As `reversed_attention`; layers that differ in their number
            of heads, unless the same are asked for of each.

    Source: Katz and Wolf, "Reversed Attention", NAACL 2025.

    Example:
        >>> scores = head_scores(model, prompts, targets)  # doctest: +SKIP
        >>> scores.order()[:2]  # doctest: +SKIP
        [(30, 8), (35, 19)]
    """
    _check_numbers(temperature, batch_size)
    check_mode()
    objective = as_objective(objective)
    batch = batch_of(model, prompts, objective, prepend_bos, attention_mask)
    rows = batch.lengths.argsort().tolist()
    if not batch.targets:
        rows, batch_size = list(range(len(batch))), len(batch)
    several = [batch.only(*rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]
    parts = [_of_batch(model, some, objective, layers, heads, temperature) for some in several]
    back = torch.tensor(rows).argsort()
    kinds = parts[0][0]
    scores = {kind: torch.cat([part[0][kind] for part in parts])[back] for kind in kinds}
    losses = torch.cat([part[1] for part in parts])[back]
    numbers = parts[0][2]
    return HeadScores(
        scores["reversed"], scores.get("warm"), scores["forward"], losses, list(numbers),
        next(iter(numbers.values())), temperature,
    )  # fmt: skip


def _of_batch(
    model: Any,
    batch: Batch,
    objective: Any,
    layers: Layers,
    heads: Heads,
    temperature: float | None,
) -> tuple[dict[str, Tensor], Tensor, dict[int, list[int]]]:
    """Each score [prompt, layer, head], the losses, and the heads of each layer."""
    run, passed = passes(model, batch, objective, layers)
    numbers = {layer: chosen(one, heads) for layer, one in passed.items()}
    if len({*map(tuple, numbers.values())}) > 1:
        counts = {layer: len(some) for layer, some in numbers.items()}
        raise ValueError(
            f"the layers differ in their number of heads ({counts}); ask for the same heads of each"
            f" (heads=) or for layers that have the same number (layers=)"
        )
    norms: dict[str, dict[int, Tensor]] = {"reversed": {}, "forward": {}}

    def keep(kind: str) -> Callable[[Attended, Tensor], None]:
        def norm(one: Attended, maps: Tensor) -> None:
            maps = wide(maps.detach())[:, numbers[one.layer]]
            norms.setdefault(kind, {})[one.layer] = maps.flatten(2).norm(dim=-1)

        return norm

    def warm(one: Attended, gradient: Tensor) -> None:
        with torch.no_grad():
            pattern = (one.scores.detach() / (temperature or 1.0)).softmax(-1).to(gradient)
            slope = pattern * (gradient - (pattern * gradient).sum(-1, keepdim=True))
        scale: Any = run.scale
        keep("warm")(one, one.through(slope) / scale)

    real = batch.mask[:, None, :, None]
    for one in passed.values():
        keep("forward")(one, one.by_head(one.pattern.detach()) * real.to(one.pattern.device))
    expect(run, passed, keep("reversed"), warm if temperature is not None else None)
    run.gradients(*lowest(passed))
    check_all_came(passed, norms["reversed"])
    device = run.losses.device
    stacked = {
        kind: torch.stack([of[layer].to(device) for layer in passed], dim=1)
        for kind, of in norms.items()
    }
    return stacked, run.losses.detach(), numbers


def _check_numbers(temperature: Any, batch_size: Any) -> None:
    if temperature is not None and not (
        isinstance(temperature, int | float) and 1 < temperature < float("inf")
    ):
        raise ValueError(
            f"temperature is {temperature!r}; expected a number above 1 (4.0, say), or None for no"
            f" warm score"
        )
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; expected a whole number from 1")
