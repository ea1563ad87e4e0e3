"""Singular values of every prompt's gradient at once.

`LowRankGradient.singular_values` of one prompt after another spends its time on overhead: the
matrices are tiny. Here the rows of all prompts are padded with zero rows, which add nothing to
x^T delta, and go through one batched QR and one batched SVD.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

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
        total = self.singular_values.sum(1, keepdim=True)
        entropy = torch.special.entr(self.singular_values / total).sum(1)
        return torch.where(total[:, 0] > 0, entropy.exp(), 0.0)


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
    numbers = torch.tensor(prompts, device=x.device)
    row = torch.searchsorted(numbers, gradient.prompt.contiguous())
    n = torch.bincount(row, minlength=len(prompts))
    most = int(n.max())
    order = torch.argsort(row, stable=True)
    start = n.cumsum(0) - n
    place = torch.arange(len(row), device=x.device) - start[row[order]]
    tables = []
    for rows in (x, delta):
        padded = rows.new_zeros(len(prompts), most, rows.shape[1])
        padded[row[order], place] = rows[order]
        # Rows that fill the space need no QR.
        wide = most >= rows.shape[1]
        tables.append(padded.mT if wide else torch.linalg.qr(padded.mT, mode="r").R)
    values = torch.linalg.svdvals(tables[0] @ tables[1].mT)
    norms = x.norm(dim=1) * delta.norm(dim=1)
    squares = norms.new_zeros(len(prompts)).index_add(0, row, norms.square())
    sums = norms.new_zeros(len(prompts)).index_add(0, row, norms)
    eps = torch.finfo(torch.float64).eps
    threshold = torch.finfo(gradient.dtype).eps * squares.sqrt() + 4 * eps * sums
    active = torch.zeros_like(n).index_add(0, row, (norms > 0).long())
    return Spectra(prompts, n, active, values, (values > threshold[:, None]).sum(1))
