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

from bwlens.model.passes import Addition, run, wide
from bwlens.model.places import Point
from bwlens.model.protocol import LensModel


class Replay:
    """One prompt's forward pass, to be run again under changes.

    Args:
        model: A TransformerBridge or HookedTransformer.
        tokens: Token ids [pos] of one prompt.
        positions: The positions whose logits are wanted.

    Attributes:
        logits: Those logits [position, d_vocab] without any change, float32 at least.
    """

    def __init__(
        self, model: LensModel, tokens: Int[Tensor, " pos"], positions: Sequence[int]
    ) -> None:
        self._model, self._tokens = model, tokens
        self._positions = torch.tensor(list(positions), device=tokens.device)
        passed = run(model, tokens[None], positions=self._positions, keeping=list(model.blocks))
        self._left = [passed.left[block] for block in model.blocks]
        self.logits: Float[Tensor, "position d_vocab"] = wide(passed.logits)[0]

    def __call__(
        self, additions: Mapping[tuple[Point, ...], Float[Tensor, "rows pos width"]], layer: int = 0
    ) -> Float[Tensor, "rows position d_vocab"]:
        """The logits of each row, with its own additions.

        Args:
            additions: What is added where z passes, for each row: at the first of the points that
                fires.
            layer: No addition is in a block below this one.
        """
        n_rows = len(next(iter(additions.values())))
        left = _expanded(self._left[layer - 1], n_rows) if layer else None
        passed = run(
            self._model,
            repeat(self._tokens, "pos -> rows pos", rows=n_rows),
            additions=[Addition(points, added) for points, added in additions.items()],
            positions=self._positions,
            giving=dict.fromkeys(self._model.blocks[:layer], left),
        )
        return wide(passed.logits)

    def reading(self, places: Sequence[int]) -> Replay:
        """The same with only some of its positions, as places among them; no pass is run."""
        other = copy(self)
        other.logits = self.logits[list(places)]
        other._positions = self._positions[list(places)]
        return other


def _expanded(left: Any, n_rows: int) -> Any:
    """What left a block for one row, for several."""
    if isinstance(left, tuple):
        return tuple(_expanded(part, n_rows) for part in left)
    if not isinstance(left, Tensor) or left.ndim < 2:
        return left
    return left.expand(n_rows, *left.shape[1:])
