"""Both sides of a change's directions as vectors of the residual stream, which readings can read.

A matrix has one side that is as wide as the stream (`READ_THROUGH`). The other is a vector of
neurons or of heads, and says nothing in words until it goes on to where those lead: what W_in
raises, W_out writes; what W_out answers to, W_in takes in. A query is read as the keys that it
meets and a key as the queries that meet it, rotary embeddings left out.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves functions untyped.)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from bwlens.gradient.matrix import LowRankMatrix
from bwlens.lens.rows import READ_THROUGH
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site
from bwlens.model.weights import weights_among

PARTNERS = {
    "W_in": "W_out",
    "W_gate": "W_out",
    "W_out": "W_in",
    "W_V": "W_O",
    "W_O": "W_V",
    "W_Q": "W_K",
    "W_K": "W_Q",
}
"""Where the side that is not as wide as the stream leads, or comes from."""


def partners_of(
    model: LensModel, change: Mapping[Site, LowRankMatrix]
) -> dict[Site, Float[Tensor, "d_model width"] | None]:
    """Each matrix' partner, its stream side first; None where the model keeps no such matrix.

    With grouped queries the key and value heads are repeated, or summed, as the queries use them.
    """
    partner = {site: replace(site, matrix=PARTNERS[site.matrix]) for site in change}
    there = weights_among(model, partner.values())
    return {
        site: _paired(site, change[site].shape, weight.live.reshape(weight.shape), model)
        if (weight := there.get(partner[site]))
        else None
        for site in change
    }


def _paired(
    site: Site, shape: tuple[int, int], rows: Float[Tensor, "_ _"], model: LensModel
) -> Float[Tensor, "d_model width"] | None:
    stream_first = READ_THROUGH[PARTNERS[site.matrix]] == "x"
    table = rows if stream_first else rows.T
    width = shape[0] if READ_THROUGH[site.matrix] == "delta" else shape[1]
    if width == table.shape[1]:
        return table
    d_head = getattr(model.cfg, "d_head", None)
    if not d_head or max(width, table.shape[1]) % d_head or min(width, table.shape[1]) % d_head:
        return None
    groups, rest = divmod(max(width, table.shape[1]), min(width, table.shape[1]))
    if rest:
        return None
    heads = table.unflatten(1, (-1, d_head))
    if width > table.shape[1]:
        return heads.repeat_interleave(groups, 1).flatten(1)
    return heads.unflatten(1, (-1, groups)).sum(2).flatten(1)


def stream_side(
    site: Site,
    side: Literal["x", "delta"],
    rows: Float[Tensor, "n width"],
    partner: Float[Tensor, "d_model width2"] | None,
) -> Float[Tensor, "n d_model"] | None:
    """One side of some directions in the stream: as it is, or carried there by the partner.

    On the device and in the dtype of the rows, wherever the partner lies.
    """
    if READ_THROUGH[site.matrix] == side:
        return rows
    if partner is None:
        return None
    return (rows.to(partner.device) @ partner.to(rows.dtype).T).to(rows.device)
