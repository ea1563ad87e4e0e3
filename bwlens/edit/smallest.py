"""The smallest step that does something, found by trials."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def smallest_steps(
    works: Callable[[Float[Tensor, " n"]], Bool[Tensor, " n"]],
    first: Float[Tensor, " n"],
    *,
    within: float = 1.05,
    most: int = 24,
    factor: float = 2.0,
    searched: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """The smallest step of each of n that works, by trials that all of them share.

    Each is multiplied with or divided by `factor` until one that works and one that does not are
    known, and then halved between in the logarithm. More than the smallest is taken to work.

    Args:
        works: Which of some steps work; one that is not searched any more is tried at 0.
        first: Where each search begins, above 0.
        within: What is found is at most this many times a step that fails.
        most: Trials before giving up on finding both; where even the smallest tried works, it is
            what is found.
        factor: See above.
        searched: Which of them are searched; None for all.

    Returns:
        The steps; nan where none that was tried works, or none was searched.

    Example:
        >>> smallest_steps(lambda steps: steps > 5, torch.tensor([1.0]), within=1.1)
        tensor([5.1874])
    """
    searched = torch.ones_like(first, dtype=torch.bool) if searched is None else searched
    low, high = torch.zeros_like(first), torch.full_like(first, torch.inf)
    trial, going, trials = first.clone(), searched.clone(), 0
    while going.any():
        working = works(torch.where(going, trial, 0.0))
        high = torch.where(going & working, trial, high)
        low = torch.where(going & ~working, trial, low)
        trials += 1
        outside = (low == 0) | high.isinf()
        moved = torch.where(working, trial / factor, trial * factor)
        trial = torch.where(outside, moved, (low * high).sqrt())
        narrow = (high > within * low) & (trial > low) & (trial < high)
        going = searched & torch.where(outside, torch.tensor(trials < most), narrow)
    return torch.where(searched & high.isfinite(), high, torch.nan)
