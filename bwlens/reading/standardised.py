"""Readings of delta that undo the unembedding rather than apply it again: dual and cosine.

At the top of a model delta = M g with g = p - onehot(target) and M = diag(gain) W_U, one column a
token. The logit lens multiplies by M^T, which tells tokens with long or common columns before those
that were meant. Here each token is asked how well it explains delta:

- **dual**: the cosine of m_v and delta in the metric A^-1, A = M M^T + ridge * tr(M M^T)/d * I:
  what the step *asks for*, whatever the lengths of delta and of tokens in that metric.
- **cosine**: delta . (u_v - mean u) / ||u_v - mean u||, the gain left alone.

Neither knows of a final norm's statistics or bias, so no epsilon and no bias is read.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.model.head import Head, head_of

RIDGE = 0.1
"""Chosen on tuning records of SmolLM2: 0 to 1 differ little, and it holds for extreme gains."""
_TILE = 4096

_kept: WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[Tensor, ...]]] = WeakKeyDictionary()
"""What was worked out of an unembedding, for as long as its memory lives."""


def dual_head(head: Head, ridge: float = RIDGE) -> Head:
    """A head that reads vectors by the dual; one factorisation [d_model, d_model], kept.

    Args:
        head: The model's own.
        ridge: What is added to A's diagonal, as a share of its mean.

    Raises:
        ValueError: A ridge below 0, or a singular A without one.
    """
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}; expected a share of the mean diagonal, 0 or more")
    gain = gain_of(head)
    factor, lengths = _once(head, ("dual", ridge), lambda: _factorised(head, gain, ridge))

    def undone(rows: Tensor) -> Tensor:
        flat = rows.flatten(0, -2).to(gain)
        solved = torch.cholesky_solve(flat.T, factor).T
        length = (flat * solved).sum(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny).sqrt()
        return (solved * gain / length).view(rows.shape).to(lengths)

    return _head(head, undone, lengths)


def cosine_head(head: Head) -> Head:
    """A head that reads vectors by their angle to each token's centred unembedding."""
    centre, lengths = _once(head, ("cosine",), lambda: _centred(head))

    def unit(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)

    return _head(head, unit, lengths, centre)


def _head(
    head: Head, norm: Callable[[Tensor], Tensor], lengths: Tensor, centre: Tensor | None = None
) -> Head:
    plain = replace(head, b_U=None, soft_cap=None, scale=1.0, eps=0.0, centred=False)
    return replace(plain, norm=norm, lengths=lengths, centre=centre)


def _once(
    head: Head, name: tuple[Any, ...], work: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What was worked out of these very numbers, or is now."""
    W_U = head.W_U
    mine = _kept.setdefault(W_U.untyped_storage(), {})
    key = (*name, W_U.data_ptr(), tuple(W_U.shape), W_U.stride(), W_U.dtype, W_U._version)
    if key not in mine:
        mine[key] = work()
    return mine[key]


def _factorised(head: Head, gain: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    outer = gain.new_zeros(len(gain), len(gain))
    for tile in head.W_U.split(_TILE, 1):
        columns = gain[:, None] * tile.to(gain)
        outer += columns @ columns.T
    outer.diagonal().add_(ridge * outer.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(outer)
    if int(failed):
        raise ValueError(
            "the unembedding does not span the stream, so the dual reading needs a ridge above 0"
        )
    lengths = [
        torch.linalg.solve_triangular(factor, gain[:, None] * tile.to(gain), upper=False).norm(
            dim=0
        )
        for tile in head.W_U.split(_TILE, 1)
    ]
    return factor, _safe(torch.cat(lengths)).to(_precise(head))


def _centred(head: Head) -> tuple[Tensor, Tensor]:
    dtype, tiles = _precise(head), head.W_U.split(_TILE, 1)
    total = torch.stack([tile.double().sum(1) for tile in tiles]).sum(0)
    centre = (total / head.W_U.shape[1]).to(dtype)
    lengths = [(tile.to(dtype) - centre[:, None]).norm(dim=0) for tile in tiles]
    return centre, _safe(torch.cat(lengths))


def _precise(head: Head) -> torch.dtype:
    return torch.promote_types(head.W_U.dtype, torch.float32)


def head_by(model: Any, reading: str, bias: bool = True) -> Head:
    """The head that reads a vector by a reading's name.

    "dual" and "cosine" know of no bias; all others are the model's own head, with or without it.
    """
    head = head_of(model)
    if reading in ("dual", "cosine"):
        return {"dual": dual_head, "cosine": cosine_head}[reading](head)
    return head if bias else without_bias(head)


def without_bias(head: Head) -> Head:
    """The plain reading without a final LayerNorm's bias (and the unembedding's), which is odd."""

    def norm(rows: Tensor) -> Tensor:
        out = head.norm(rows)
        return out - head.norm(torch.zeros_like(rows[:1])).to(out)

    return replace(head, norm=norm, b_U=None)


def gain_of(head: Head) -> Float[Tensor, " d_model"]:
    """The final norm's gain, in float64: what it makes of a vector of +1 and -1, without its bias.

    Such a vector has mean 0 and mean square 1, so LayerNorm and RMSNorm leave it but for the gain
    (and an epsilon, taken out here).
    """
    d_model = head.W_U.shape[0]
    signs = torch.ones(d_model, dtype=head.W_U.dtype, device=head.W_U.device)
    signs[1::2] = -1
    with torch.no_grad():
        up, down = (head.norm(s * signs[None, None])[0, 0].double() for s in (1, -1))
    return (up - down) / 2 * signs.double() * (1 + head.eps) ** 0.5


def _safe(lengths: Tensor) -> Tensor:
    """Tokens whose column is zero (padding of the vocabulary) have no direction: they score 0."""
    return torch.where(lengths > 0, lengths, torch.full_like(lengths, float("inf")))
