"""Singular values of every prompt's gradient at once, by one batched QR and one batched SVD.

One prompt after another would be overhead, as the matrices are tiny, and on a GPU a wait for each.
Prompts are padded with zero rows, which add nothing to x^T delta.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from bwlens.gradient.arithmetic import effective_ranks, triangle
from bwlens.gradient.low_rank import LowRankGradient


@dataclass(frozen=True, eq=False)
class Spectra:
    """What `spectra` returns, a row for each prompt that has rows in the gradient.

    Attributes:
        prompts: The prompts' numbers, ascending.
        n: Number of rows of x and delta.
        active: Number of rows whose x and delta are both non-zero: the most that the rank can be.
        singular_values: In descending order, zeros after the last.
        ranks: As `LowRankGradient.rank` with its default tolerance.
    """

    prompts: list[int]
    n: Int[Tensor, " prompts"]
    active: Int[Tensor, " prompts"]
    singular_values: Float64[Tensor, "prompts r"]
    ranks: Int[Tensor, " prompts"]

    @property
    def effective_ranks(self) -> Float64[Tensor, " prompts"]:
        """exp of the entropy of the singular values over their sum; 0 for a zero gradient."""
        return effective_ranks(self.singular_values)


def spectra(gradient: LowRankGradient) -> Spectra:
    """Rank and singular values of each prompt's part of a gradient.

    Equal to those of `gradient.split()`, one by one.

    Raises:
        ValueError: The rows' prompts were not kept, or a row is not finite.

    Example:
        >>> g = LowRankGradient(torch.ones(3, 8), torch.ones(3, 7), prompt=torch.tensor([0, 0, 4]))
        >>> spectra(g).prompts, spectra(g).ranks
        ([0, 4], tensor([1, 1]))
    """
    prompts = gradient.prompts
    assert gradient.prompt is not None
    x, delta = gradient.x.double(), gradient.delta.double()
    if not (x.isfinite().all() and delta.isfinite().all()):
        raise ValueError("a row of the gradient is nan or inf; singular values need finite rows")
    _, row, n = gradient.prompt.unique(return_inverse=True, return_counts=True)
    one, other = (triangle(rows) for rows in by_prompt(gradient.prompt, x, delta)[1])
    values = torch.linalg.svdvals(one @ other.mT)
    norms = x.norm(dim=1) * delta.norm(dim=1)
    squares = norms.new_zeros(len(prompts)).index_add(0, row, norms.square())
    sums = norms.new_zeros(len(prompts)).index_add(0, row, norms)
    eps = torch.finfo(torch.float64).eps
    threshold = torch.finfo(gradient.dtype).eps * squares.sqrt() + 4 * eps * sums
    active = torch.zeros_like(n).index_add(0, row, (norms > 0).long())
    return Spectra(prompts, n, active, values, (values > threshold[:, None]).sum(1))


def by_prompt(prompt: Int[Tensor, " n"], *columns: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The prompts' numbers, ascending, and rows [n, ...] as tables [prompt, row, ...].

    As long as the prompt with most rows has; zeros where another has fewer.

    >>> by_prompt(torch.tensor([3, 0, 3]), torch.tensor([1.0, 2.0, 4.0]))
    (tensor([0, 3]), [tensor([[2., 0.],
            [1., 4.]])])
    """
    numbers, row, n = prompt.unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    place = torch.arange(len(row), device=row.device) - (n.cumsum(0) - n)[row[order]]
    tables: list[Tensor] = []
    for rows in columns:
        table = rows.new_zeros(len(n), int(n.max()), *rows.shape[1:])
        table[row[order], place] = rows[order]
        tables.append(table)
    return numbers, tables
