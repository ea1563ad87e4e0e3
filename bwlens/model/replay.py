"""A prompt run again and again, each time with something added where a weight's z passes.

The rows of a batch are the same prompt, and differ in what is added to them. The blocks below the
lowest change give what they gave before, and only the positions wanted pass the unembedding.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from bwlens.model.earlier import Earlier, detach, empty
from bwlens.model.fitting import rounding_of
from bwlens.model.passes import Addition, Passed, run, wide
from bwlens.model.places import Point
from bwlens.model.protocol import LensModel


def keeping(model: LensModel) -> dict[str, Any]:
    """What a pass must be told for it to be run again."""
    return {"keeping": list(model.blocks), "kept": empty(model)}


class Replay:
    """One prompt's forward pass, to be run again under changes.

    Args:
        model: A TransformerBridge or HookedTransformer.
        tokens: Token ids [pos] of one prompt.
        positions: The positions whose logits are wanted.
        passed: Their pass, if it was run already, with `keeping(model)`.

    Attributes:
        logits: Those logits [position, d_vocab] without any change, float32 at least.
    """

    def __init__(
        self,
        model: LensModel,
        tokens: Int[Tensor, " pos"],
        positions: Sequence[int],
        passed: Passed | None = None,
    ) -> None:
        self._model, self._tokens = model, tokens
        self._positions = torch.tensor(list(positions), device=tokens.device)
        if passed is None:
            passed = run(model, tokens[None], positions=self._positions, **keeping(model))
            logits = passed.logits[0]
        else:
            logits = passed.logits.detach()[0, self._positions]
        self._kept = passed.kept
        if self._kept is not None:
            detach(self._kept)
        self._left = [_expanded(passed.left[block], 1, 0) for block in model.blocks]
        self.logits: Float[Tensor, "position d_vocab"] = wide(logits)

    @property
    def takes_earlier(self) -> bool:
        """Whether later positions can be run alone, as far as is known."""
        return self._kept is not None

    def __call__(
        self,
        additions: Mapping[tuple[Point, ...], Float[Tensor, "rows pos width"]],
        layer: int = 0,
        since: int = 0,
    ) -> tuple[Float[Tensor, "rows position d_vocab"], Float[Tensor, "position d_vocab"]]:
        """The logits of each row, with its own additions, and those without any to compare with.

        Args:
            additions: What is added where z passes, for each row: at the first of the points that
                fires.
            layer: No addition is in a block below this one.
            since: Nor at a position before this one, so that those after it are run alone, where
                the model can.
        """
        if since and self.takes_earlier:
            # A row without a change says whether they can be.
            more = {points: torch.cat([a, a[:1] * 0]) for points, a in additions.items()}
            *_, before = rows = self._run(more, layer, since)
            if _same(before, self.logits, self._model):
                return rows[:-1], before
            self._kept = None
        return self._run(additions, layer, 0), self.logits

    def _run(
        self, additions: Mapping[tuple[Point, ...], Tensor], layer: int, since: int
    ) -> Float[Tensor, "rows position d_vocab"]:
        n_rows = len(next(iter(additions.values())))
        left = _expanded(self._left[layer - 1], n_rows, since) if layer else None
        later = self._positions >= since
        logits = wide(
            run(
                self._model,
                repeat(self._tokens[since:], "pos -> rows pos", rows=n_rows),
                additions=[Addition(at, added[:, since:]) for at, added in additions.items()],
                positions=self._positions[later] - since,
                giving=dict.fromkeys(self._model.blocks[:layer], left),
                kept=Earlier(self._kept, since) if since and self._kept is not None else None,
            ).logits
        )
        if bool(later.all()):
            return logits
        every = self.logits.expand(n_rows, -1, -1).to(logits).clone()
        every[:, later] = logits
        return every

    def reading(self, places: Sequence[int]) -> Replay:
        """The same with only some of its positions, as places among them; no pass is run."""
        other = copy(self)
        other.logits = self.logits[list(places)]
        other._positions = self._positions[list(places)]
        return other


def _same(one: Tensor, other: Tensor, model: LensModel) -> bool:
    """Whether logits differ by rounding alone."""
    dtype = model.cfg.dtype
    spread = (other - other.mean(1, keepdim=True)).norm(dim=1)
    return bool(((one - other).norm(dim=1) <= 3 * rounding_of(other, dtype) * spread).all())


def _expanded(left: Any, n_rows: int, since: int) -> Any:
    """What left a block for one row, for several, from a position on."""
    if isinstance(left, tuple | list):
        return type(left)(_expanded(part, n_rows, since) for part in left)
    if not isinstance(left, Tensor) or left.ndim < 2:
        return left
    return left.detach()[:, since:].expand(n_rows, *[-1] * (left.ndim - 1))
