"""Singular values and products of x^T delta out of the rows of x and delta, in float64.

Householder QR rounds row i of x to within eps ||x_i||, so a long x_i with a tiny delta_i, as at a
first token, does not drown the rest; squares (x x^T) would.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor


class SVD(NamedTuple):
    """The singular value decomposition U diag(S) Vh, S descending, all in float64."""

    U: Float64[Tensor, "d_in r"]
    S: Float64[Tensor, " r"]
    Vh: Float64[Tensor, "r d_out"]


def svd(x: Float[Tensor, "n d_in"], delta: Float[Tensor, "n d_out"]) -> SVD:
    """Of x^T delta, by thin QR of x^T and delta^T and the SVD of the small R_x R_d^T."""
    x, delta = finite(x, delta)
    (q_x, r_x), (q_delta, r_delta) = torch.linalg.qr(x.T), torch.linalg.qr(delta.T)
    U, S, Vh = torch.linalg.svd(r_x @ r_delta.T, full_matrices=False)
    return SVD(q_x @ U, S, Vh @ q_delta.T)


def core(x: Float[Tensor, "n d_in"], delta: Float[Tensor, "n d_out"]) -> Float64[Tensor, "k l"]:
    """R_x R_d^T, which has the singular values of x^T delta."""
    x, delta = finite(x, delta)
    return triangle(x) @ triangle(delta).mT


def triangle(rows: Float64[Tensor, "*batch n d"]) -> Float64[Tensor, "*batch k n"]:
    """R of the QR of the rows' transpose; rows that fill the space need none."""
    wide = rows.shape[-2] >= rows.shape[-1]
    return rows.mT if wide else torch.linalg.qr(rows.mT, mode="r").R


def effective_ranks(S: Float64[Tensor, "*batch r"]) -> Float64[Tensor, "*batch"]:
    """exp(-sum_k p_k log p_k) with p = S / sum(S); 0 where all are zero."""
    total = S.sum(-1, keepdim=True)
    entropy = torch.special.entr(S / total).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0.0)


def finite(
    x: Float[Tensor, "n d_in"], delta: Float[Tensor, "n d_out"]
) -> tuple[Float64[Tensor, "n d_in"], Float64[Tensor, "n d_out"]]:
    """Both in float64.

    Raises:
        ValueError: A row is not finite.
    """
    x, delta = double(x), double(delta)
    norms = x.norm(dim=1) + delta.norm(dim=1)
    if not math.isfinite(float(norms.sum())):
        bad = torch.nonzero(~norms.isfinite()).flatten().tolist()
        raise ValueError(
            f"{len(bad)} of {len(x)} rows hold nan or inf, the first is row {bad[0]}; singular "
            "values need finite rows. Look for an overflow, or capture in a wider dtype."
        )
    return x, delta


def double(tensor: Tensor) -> Float64[Tensor, ...]:
    """In float64; that is on the CPU for Apple's GPUs, which have none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def contract(x: Float[Tensor, "n ..."], delta: Float[Tensor, "n ..."]) -> Float[Tensor, ...]:
    """The sum over n, in float32 at least and returned in the rows' dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.tensordot(x.to(wide).movedim(0, -1), delta.to(wide), dims=1).to(x.dtype)
