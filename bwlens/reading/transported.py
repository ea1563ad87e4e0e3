"""The transported reading: delta carried through the blocks above by a mean Jacobian.

A step changes what leaves a block by -delta; what that makes of the last block's stream is J of it,
with J the mean Jacobian that a `JacobianLens` of TransformerLens (from 4.3) has for each block's
output. The final norm and the unembedding then read it as they read the last stream.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def check_jacobian(
    model: Any, jacobian: Any, matrices: Sequence[str], layers: Sequence[int]
) -> None:
    """Refuse what could not be carried, before the work.

    Raises:
        ValueError: No JacobianLens, one of another model (it says itself what it takes), one
            without some of the layers, or W_O, which writes below the block's output.
        TypeError: A model that is no raw bridge.
    """
    if not hasattr(jacobian, "jacobians") or not hasattr(jacobian, "validate_model"):
        raise ValueError(
            f"reading='transported' needs jacobian=..., a JacobianLens, found {jacobian!r}; from"
            f" TransformerLens 4.3 on, transformer_lens.tools.analysis.JacobianLens.fit(model,"
            f" prompts, corpus=...) makes one; elsewhere take reading='effect'"
        )
    jacobian.validate_model(model)
    if "W_O" in matrices:
        raise ValueError(
            "a JacobianLens carries what leaves a block, and W_O writes below that: name other"
            " matrices, or another reading"
        )
    top = len(model.blocks) - 1
    missing = [layer for layer in layers if layer != top and layer not in jacobian.jacobians]
    if missing:
        raise ValueError(
            f"the JacobianLens has no Jacobian of layers {missing}; name layers= out of"
            f" {sorted(jacobian.jacobians)} and the last, {top}"
        )


def transported(
    jacobian: Any, layers: Sequence[int], rows: Float[Tensor, "layer *pos d_model"]
) -> Float[Tensor, "layer *pos d_model"]:
    """J_layer of each row; the last layer's, which has no Jacobian, as they are."""
    carried = []
    for layer, row in zip(layers, rows, strict=True):
        J = jacobian.jacobians.get(layer)
        carried.append(row if J is None else row.to(torch.float32) @ J.to(row.device).T)
    return torch.stack([row.to(rows) for row in carried])
