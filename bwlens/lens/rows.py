"""The rows of a prompt's gradient by token, also where a token goes through several experts.

In a mixture a token has a row in each expert that it was sent to. The two factors then differ:

- What is as wide as the stream is one vector a token. Experts share the x of W_in. An expert's
  delta of W_out is the router's weight r_e times dL/d(what the experts add up to), so the sum of
  them is that gradient times the sum of the weights: the gradient itself where the weights are
  normalised (Mixtral), a share of it where they are not (Qwen2-MoE). Its direction, and with it the
  reading, is the same in both.
- What is as wide as an expert's neurons belongs to other neurons in each expert. These rows stand
  side by side and do not add up.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.gradient.capturing import Gradients
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.model.sites import Site

READ_THROUGH: dict[str, Literal["x", "delta"]] = {
    "W_in": "x",
    "W_gate": "x",
    "W_out": "delta",
    "W_Q": "x",
    "W_K": "x",
    "W_V": "x",
    "W_O": "delta",
}
"""The factor of each matrix' gradient that is as wide as the residual stream."""

Expert = int | Literal["shared"] | None
"""An expert of a mixture; None where there is none."""

_ONE_WAY = 0.99
"""Share of the experts' lengths that their sum must keep for them to be one vector, scaled."""


def parts_of(grads: Gradients, matrix: str, layer: int) -> dict[Site, LowRankGradient]:
    """The gradient of a matrix of a layer: one part, or one for each expert that took tokens."""
    return {s: grads[s] for s in grads if (s.matrix, s.layer) == (matrix, layer)}


def by_expert(grads: Gradients, matrix: str, layer: int) -> dict[Expert, LowRankGradient]:
    """The same parts by expert; under None where there are no experts."""
    return {site.expert: part for site, part in parts_of(grads, matrix, layer).items()}


def stream_rows(
    grads: Gradients, matrix: str, layer: int, factor: Literal["x", "delta"]
) -> Float[Tensor, "pos d_model"]:
    """The stream-wide factor's row for each position of the (one) prompt, see the module.

    Zeros in a layer without that matrix, as hybrids have them.

    Raises:
        NotImplementedError: A mixture whose experts do not share that vector, so that a token has
            no one row to be read.
    """
    parts = parts_of(grads, matrix, layer)
    if all(site.expert is None for site in parts) and len(parts) == 1:
        return getattr(next(iter(parts.values())), factor)
    n_pos = grads.batch.tokens.shape[1]
    if not parts:
        other = next(getattr(grads[site], factor) for site in grads if site.matrix == matrix)
        return other.new_zeros(n_pos, other.shape[1])
    rows, lengths = None, None
    for part in parts.values():
        values, pos = getattr(part, factor), _positions(part)
        if rows is None or lengths is None:
            rows = values.new_zeros(n_pos, values.shape[1])
            lengths = values.new_zeros(n_pos)
        if factor == "delta":
            rows = rows.index_add(0, pos, values)
            lengths = lengths.index_add(0, pos, values.norm(dim=1))
            continue
        there = lengths[pos] > 0
        if not torch.allclose(rows[pos][there], values[there], rtol=1e-3, atol=1e-6):
            raise _no_one_row(matrix, layer, "the experts of a token are given other x")
        rows, lengths = rows.index_copy(0, pos, values), lengths.index_fill(0, pos, 1.0)
    assert rows is not None
    assert lengths is not None
    if factor == "delta" and bool((rows.norm(dim=1) < _ONE_WAY * lengths).any()):
        raise _no_one_row(matrix, layer, "the deltas of a token's experts point different ways")
    return rows


def neuron_norms(
    grads: Gradients, matrix: str, layer: int, factor: Literal["x", "delta"]
) -> Float[Tensor, " pos"]:
    """Norms of the neuron-wide factor for each position, over all its experts' neurons."""
    parts = parts_of(grads, matrix, layer)
    if not parts:
        return grads.next_logits.new_zeros(grads.batch.tokens.shape[1])
    first = getattr(next(iter(parts.values())), factor)
    if all(site.expert is None for site in parts) and len(parts) == 1:
        return first.norm(dim=1)
    squares = first.new_zeros(grads.batch.tokens.shape[1], dtype=torch.float64)
    for part in parts.values():
        norms = getattr(part, factor).double().norm(dim=1)
        squares = squares.index_add(0, _positions(part), norms.square())
    return squares.sqrt().to(first.dtype)


def _positions(part: LowRankGradient) -> Tensor:
    assert part.pos is not None
    return part.pos


def _no_one_row(matrix: str, layer: int, why: str) -> NotImplementedError:
    return NotImplementedError(
        f"{matrix} of layer {layer}: {why} in this mixture, so a token has no one vector to read"
        f" there; bwlens.capture gives each expert's gradient, to read by itself"
    )
