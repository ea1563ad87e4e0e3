"""A preference loss in words: what its step would write for the chosen and the rejected answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwlens.gradient.preferences import (
    Half,
    Preference,
    PreferenceGradients,
    capture_preference,
)
from bwlens.lens.backward import BackwardLens
from bwlens.lens.making import backward_lens
from bwlens.model.prompts import one_prompt

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class PreferenceLens:
    """The lenses of both halves of one pair's gradient, and how entangled they are.

    Attributes:
        chosen: The lens of the chosen answer's half, whose step raises it.
        rejected: The lens of the rejected answer's half, whose step lowers it.
        gradients: The whole gradient, its halves, the loss.
    """

    chosen: BackwardLens
    rejected: BackwardLens
    gradients: PreferenceGradients

    def entanglement(self) -> pd.DataFrame:
        """By layer and matrix, see `PreferenceGradients.entanglement`."""
        return self.gradients.entanglement()

    def __repr__(self) -> str:
        answers = f"chosen {self.chosen.target!r}, rejected {self.rejected.target!r}"
        return f"PreferenceLens({answers}; loss {float(self.gradients.losses[0]):.4g})"

    def _repr_html_(self) -> str:
        return self._compared()._repr_html_()

    def save(self, path: str | Path) -> Path:
        """Write both tables side by side as a page (.html)."""
        return self._compared().save(path)

    def _compared(self) -> Any:
        from bwlens.show.comparison import compare

        return compare(self.chosen, self.rejected, ("chosen", "rejected"))


def preference_lens(
    model: Any, prompt: Any, objective: Preference, **options: Any
) -> PreferenceLens:
    """The Backward Lens of a preference loss on one prompt, for both halves.

    Args:
        model: The model.
        prompt: One prompt.
        objective: `DPO`, `IPO`, `KTO` or `SimPO` with one chosen and one rejected answer.
        **options: As `backward_lens` has them.

    Raises:
        ValueError: Several prompts, and as `backward_lens` does.

    Example:
        >>> loss = DPO([" Paris"], [" Rome"])
        >>> preference_lens(model, "The capital of France is", loss)  # doctest: +SKIP
    """
    prompt = one_prompt(prompt)
    common = {k: v for k, v in options.items() if k in ("matrices", "layers", "prepend_bos")}
    gradients = capture_preference(model, prompt, objective, **common)
    (chosen, rejected), weights = objective.target, gradients.weights[:, 0].tolist()
    lenses = [
        backward_lens(model, prompt, Half(answer, weight), **options)
        for answer, weight in zip((chosen, rejected), weights, strict=True)
    ]
    return PreferenceLens(lenses[0], lenses[1], gradients)
