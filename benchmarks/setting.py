"""What every benchmark is given: the model, the prompt, how often to repeat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from benchmarks.model import SMALL, Shape, bridge, random_tokens


@dataclass(frozen=True)
class Setting:
    """One run's conditions; the model is built when first asked for."""

    shape: Shape = SMALL
    repeats: int = 7
    seed: int = 0
    peer: str | None = None
    """An interpreter whose TransformerLens still has its own `BackwardLens`."""
    cpu_time: bool = False
    """One thread's CPU seconds are counted, in the peer too."""

    @cached_property
    def model(self) -> Any:
        """The random bridge."""
        return bridge(self.shape, self.seed)

    @cached_property
    def tokens(self) -> Tensor:
        """The prompt, [n_tokens]."""
        return random_tokens(self.shape, self.shape.n_tokens, self.seed)
