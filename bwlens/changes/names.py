"""Where a model's matrices stand in files: the parameters' names, as Hugging Face writes them.

A bridge shows the parameters of the model inside it. A site's weight is found there by its memory,
and where the bridge keeps a copy of its own (queries out of one fused matrix) by its values.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.changes.export import find_rows
from bwlens.model.places import Tap
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site, available_matrices, find_taps
from bwlens.model.weights import Weight, weights_among, weights_of

WRAPPED = "_original_component."


@dataclass(frozen=True, eq=False)
class Place:
    """Where a site's weight stands in a parameter [out, in], or [in, out] as Conv1D has it.

    Attributes:
        site: Which weight.
        outputs: Which of the parameter's outputs are its own; None for all.
        d_in_first: Whether the parameter is [in, out].
    """

    site: Site
    outputs: Tensor | None
    d_in_first: bool

    def of(self, parameter: Float[Tensor, "a b"]) -> Float[Tensor, "d_in d_out"]:
        """The site's part of such a parameter, as x multiplies it."""
        rows = parameter if self.d_in_first else parameter.T
        return rows if self.outputs is None else rows[:, self.outputs]


def parameters_of(model: LensModel) -> dict[str, Tensor]:
    """The parameters of the Hugging Face model inside, by the names that files have.

    Raises:
        NotImplementedError: There is none inside.
    """
    inner = getattr(model, "original_model", model if hasattr(model, "save_pretrained") else None)
    if inner is None or getattr(model, "compatibility_mode", False):
        raise NotImplementedError(
            f"a {type(model).__name__} (or one with processed weights) does not keep its weights"
            f" as files do, so a file's tensors cannot be matched with them; load the model raw, as"
            f" a bridge (bwlens.load_model), or give a bwlens.WeightChange"
        )
    shown = {name.replace(WRAPPED, ""): tensor for name, tensor in inner.state_dict().items()}
    if not hasattr(model, "original_model"):
        return shown
    config = copy.deepcopy(inner.config)
    with torch.random.fork_rng(), torch.device("meta"):  # its names alone: a bridge adds others
        made: Any = type(inner)
        names = made(config).state_dict()
    return {name: shown[name] for name in names if name in shown}


def places_of(model: LensModel) -> dict[str, list[Place]]:
    """Every parameter that holds matrices of the blocks, and where they stand in it.

    Raises:
        NotImplementedError: The model is no bridge, or no matrix was found in its parameters.
    """
    shown = parameters_of(model)
    by_memory: dict[int, str] = {}
    for name, tensor in shown.items():
        by_memory.setdefault(tensor.data_ptr(), name)
    places: dict[str, list[Place]] = {}
    for site, weight in weights_there(model).items():
        name = by_memory.get(weight.live.data_ptr())
        if name is not None and shown[name].numel() == weight.live.numel():
            outputs, d_in_first = None, _d_in_first(weight, shown[name])
        else:
            here = {n: t for n, t in shown.items() if f".{site.layer}." in n}
            try:
                name, outputs, d_in_first = find_rows(site, weight.read().T, here)
            except NotImplementedError:
                continue
        places.setdefault(name, []).append(Place(site, outputs, d_in_first))
    if not places:
        refused_like(model)
        raise NotImplementedError(
            f"none of the matrices of this {type(model).__name__} stands in a parameter of the"
            f" model inside as it is, so a file's tensors cannot be matched with them"
        )
    return places


def refused_like(model: LensModel) -> None:
    """Raise what stands in the way of the first layer's weights: packed, not in memory, adapted."""
    taps = find_taps(model, available_matrices(model), 0)
    weights_of(model, [tap.site for tap in taps if isinstance(tap, Tap)])


def weights_there(model: LensModel) -> dict[Site, Weight]:
    """The weights of all matrices that can be changed alone; not experts of one 3-D parameter."""
    taps = [t for matrix in available_matrices(model) for t in find_taps(model, matrix)]
    return weights_among(model, [tap.site for tap in taps if isinstance(tap, Tap)])


def _d_in_first(weight: Weight, parameter: Tensor) -> bool:
    if tuple(parameter.shape) != weight.shape:
        return False
    if weight.shape[0] != weight.shape[1]:
        return True
    return weight.live.stride() == parameter.stride()


def match(name: str, known: Mapping[str, Any]) -> str | None:
    """The model's own name of a file's tensor: the same, or the one that ends in it or it in that.

    Files leave out, or add, what a model is wrapped in ("model.", "base_model.model.").
    """
    if name in known:
        return name
    close = [k for k in known if k.endswith(f".{name}") or name.endswith(f".{k}")]
    return close[0] if len(close) == 1 else None


def low_rank(
    matrix: Float[Tensor, "d_in d_out"], rank: int, seed: int = 0
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "r d_out"], float]:
    """The best rows of a rank for a matrix, and the share of its squared norm that they keep.

    Exact where the rank reaches the matrix'; else a randomised SVD with two power iterations, whose
    share is measured, not estimated.

    Source: Halko, Martinsson and Tropp, SIAM Review 2011, algorithms 4.4 and 5.1.
    """
    wide = matrix.float()
    total = float(wide.double().square().sum())
    d_in, d_out = wide.shape
    if min(d_in, d_out) <= rank + 8:
        U, S, Vh = torch.linalg.svd(wide.double(), full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(d_out, rank + 8, generator=generator).to(wide)
        basis = torch.linalg.qr(wide @ draw).Q
        for _ in range(2):
            basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis).Q).Q
        U, S, Vh = torch.linalg.svd((basis.T @ wide).double(), full_matrices=False)
        U = basis.double() @ U
    keep = slice(0, min(rank, int((S[0] * 1e-7 < S).sum()) or 1))
    root = S[keep, None].sqrt()
    share = float(S[keep].square().sum()) / total if total else 1.0
    return (root * U.T[keep]).float(), (root * Vh[keep]).float(), min(share, 1.0)
