"""Which vector in the residual stream stands for a token, and how W_out has to write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bwlens.model.head import head_of
from bwlens.model.passes import wide
from bwlens.model.protocol import LensModel

Direction = Literal["unembedding", "embedding", "folded"]
"""A token's vector: its column of W_U, its row of W_E, or its column of W_U behind the final norm's
gain."""


def token_directions(
    model: LensModel, ids: Sequence[int], direction: Direction = "unembedding"
) -> Float[Tensor, "n d_model"]:
    """The vectors that stand for tokens in the residual stream, one row each.

    - "unembedding": `W_U[:, t]`, the paper's raw row (GPT-2 ties it to the embedding).
    - "embedding": `W_E[t]`; only in tied models does writing it raise the token's logit dependably.
    - "folded": `g * W_U[:, t]` with the final norm's gain g, less its mean where that norm
      subtracts the mean: the direction in which the token's logit grows fastest.

    Raises:
        ValueError: No such direction, or an id outside the vocabulary.
    """
    check_direction(direction)
    head = head_of(model)
    d_vocab = head.W_U.shape[1]
    if bad := [i for i in ids if not 0 <= i < d_vocab]:
        raise ValueError(f"token id {bad[0]} is outside the vocabulary of {d_vocab}")
    index = torch.tensor(list(ids), dtype=torch.long, device=head.W_U.device)
    if direction == "embedding":
        table = model.embed.W_E.detach()
        return wide(table[index.to(table.device)])
    rows = wide(head.W_U[:, index].T)
    if direction == "unembedding":
        return rows.contiguous()
    rows = rows * norm_gain(head.norm, rows)
    return rows - rows.mean(-1, keepdim=True) if head.centred else rows


def check_direction(direction: str) -> None:
    """Refuse what is no `Direction`.

    Raises:
        ValueError: No such direction.
    """
    if direction not in ("unembedding", "embedding", "folded"):
        raise ValueError(
            f"direction must be 'unembedding', 'embedding' or 'folded', found {direction!r}"
        )


def before_norm(
    norm: Callable[[Tensor], Tensor] | None, directions: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_model"]:
    """What to write before a norm for its output to move along the directions: `v / g`.

    A norm that follows the MLP (Gemma 2, OLMo 2) multiplies by its gain g. Coordinates that it all
    but removes (|g| below a thousandth of the largest) are left out.
    """
    if norm is None:
        return directions
    gain = norm_gain(norm, directions)
    reached = gain.abs() > 1e-3 * gain.abs().max()
    return torch.where(reached, directions / torch.where(reached, gain, 1.0), 0.0)


def in_its_dtype(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm that takes any dtype, computed in that of its own weights."""
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    return lambda v: norm(v.to(dtype))


def norm_gain(
    norm: Callable[[Tensor], Tensor], like: Float[Tensor, "n d_model"]
) -> Float[Tensor, " d_model"]:
    """The gain of a LayerNorm or RMSNorm, `norm(v) = g * (v - mean) / std + b`, measured on it.

    Half the difference of `norm(v)` and `norm(-v)` is rid of b; a constant vector tells whether the
    mean is subtracted.
    """
    d_model = like.shape[-1]
    flat = torch.full((d_model,), 8.0, device=like.device)
    uneven = flat.clone()
    uneven[::2] *= 2

    def odd(v: Tensor) -> Tensor:
        with torch.no_grad():
            plus, minus = norm(torch.stack([v, -v])[:, None])[:, 0]
        return wide(plus - minus).to(like.device) / 2

    measured = odd(uneven)
    if odd(flat).abs().max() < 1e-2 * measured.abs().max():
        uneven = uneven - uneven.mean()
    return measured * uneven.square().mean().sqrt() / uneven
