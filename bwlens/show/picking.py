"""Which columns of a long prompt are drawn at first, where not all can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

DRAWN = 160
"""Columns that a page draws at once; of a longer prompt so many are chosen or paged through."""

CHOSEN = 40
"""Columns chosen from a prompt of more than `DRAWN`."""


def columns(lens: BackwardLens, matrix: str, most: int = CHOSEN) -> list[int]:
    """The positions, ascending, that say most: subject, first and last, then the strongest.

    A position is as strong as its largest norm of delta.
    """
    strength = lens.norms(matrix).amax(0)
    n_pos = len(strength)
    first = [lens.n_prompt - 1, *range(lens.n_prompt, n_pos), 0, *lens.subject]
    order = dict.fromkeys([*first, *strength.argsort(descending=True).tolist()])
    return sorted(list(order)[:most])
