"""Differences of weights as changes: two checkpoints, or a file of differences, matrix by matrix.

Only one matrix of each is in memory at a time. A difference of full rank is kept in its `rank` best
rows, and the share of its squared norm that these hold is measured and said.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves functions untyped.)

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.changes.names import low_rank, match, parameters_of, places_of
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site


def difference(
    model: LensModel,
    before: Mapping[str, Tensor] | None,
    after: Mapping[str, Tensor],
    rank: int,
    what: str,
    seed: int = 0,
) -> WeightChange:
    """after - before, at the model's matrices.

    Args:
        model: Whose matrices they are.
        before: The tensors by name; None for the model's own.
        after: The same of what they became.
        rank: How many rows to keep of each matrix.
        what: What is compared, for messages.
        seed: For the randomised SVD.

    Raises:
        ValueError: Tensors of other shapes (other vocabularies, another model), none in common, or
            not finite.
    """
    own = parameters_of(model)
    before = own if before is None else before
    _check_vocabulary(model, before, after, what)

    def pairs() -> Iterator[tuple[str, Tensor]]:
        for name in after:
            if (old := match(name, before)) is None:
                continue
            new, was = after[name], before[old]
            if new.shape != was.shape:
                raise ValueError(
                    f"{what}: {name} is {list(was.shape)} in one and {list(new.shape)} in the"
                    f" other; they are of different models"
                )
            if new.is_floating_point() and was.is_floating_point():
                yield name, new.to("cpu", torch.float32) - was.to("cpu", torch.float32)
            elif match(name, own) and not torch.equal(new, was):
                yield name, new  # which is refused where it is a matrix that is packed

    return from_dense(model, pairs(), rank, what, seed)


def from_dense(model: LensModel, tensors: Any, rank: int, what: str, seed: int = 0) -> WeightChange:
    """A change out of (name, difference) pairs, each as the model's files hold that parameter.

    Raises:
        ValueError: None is one of the model's matrices, or one has another shape or is not finite.
        NotImplementedError: A quantised tensor.
    """
    places, own = places_of(model), parameters_of(model)
    parts: dict[Site, LowRankMatrix] = {}
    kept: dict[str, float] = {}
    others: list[str] = []
    some = None
    for name, dense in tensors:
        some = some or name
        if not dense.is_floating_point():
            raise NotImplementedError(
                f"{what}: {name} is {dense.dtype}, quantised; dequantise the checkpoint first"
            )
        if not torch.isfinite(dense).all():
            raise ValueError(f"{what}: {name} holds nan or inf; the file is broken")
        known = match(name, places)
        if not dense.any():
            continue
        if known is None:
            others.append(name)
            continue
        if dense.shape != own[known].shape:
            raise ValueError(
                f"{what}: {name} is {list(dense.shape)}, and this model's"
                f" {list(own[known].shape)}; it was made for another model"
            )
        for place in places[known]:
            if (matrix := place.of(dense.float())).any():
                x, delta, share = low_rank(matrix, rank, seed)
                parts[place.site] = LowRankMatrix(x, delta)
                kept[str(place.site)] = share
    if some is None or (not parts and others):
        raise ValueError(
            f"{what}: none of its tensors ({', '.join(others[:3]) or 'there are none'}) is one of"
            f" this model's matrices, which are called like {next(iter(places))!r}"
        )
    note = what if parts else f"{what}: no difference"
    if others:
        note += f"; changed too, and not read: {', '.join(others[:4])}"
        note += f" and {len(others) - 4} more" if len(others) > 4 else ""
    return WeightChange(parts, note, {"kept": kept, "left_out": others, "rank": rank})


def _check_vocabulary(model: LensModel, before: Any, after: Any, what: str) -> None:
    """Both must have the words by which they are read."""
    width = model.unembed.W_U.shape[0]
    names = [n for n in after if "embed" in n or n.endswith(("wte.weight", "lm_head.weight"))]
    for name in names:
        old = match(name, before)
        if old is None:
            continue
        one, other = tuple(before[old].shape), tuple(after[name].shape)
        if one != other and len(one) == len(other) == 2 and one[1] == other[1] == width:
            raise ValueError(
                f"{what}: their vocabularies differ, {name} has {one[0]} rows in one and"
                f" {other[0]} in the other; the words of one are not those of the other. Cut or"
                f" resize one (model.resize_token_embeddings) and save it again"
            )
