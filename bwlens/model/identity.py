"""Which model is this: its name, whether it is the demo model, a fingerprint of its weights."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

import hashlib
import math
from functools import cache

import torch
from safetensors import safe_open
from torch import Tensor

from bwlens.demo import MODEL_DIR
from bwlens.model.protocol import LensModel

_SAMPLED = 2**20
_SAME = 5e-3  # Share by which an embedding may differ: bfloat16 rounds by some 0.002.


def model_label(model: LensModel) -> str:
    """What a model is called: "demo" for the demo model, else its name on the hub or folder."""
    if is_demo(model):
        return "demo"
    return str(getattr(model.cfg, "model_name", type(model).__name__))


def is_demo(model: LensModel) -> bool:
    """Whether this is the demo model, told by its weights: the one place that decides it.

    The token embedding is compared with the shipped one, whatever the model's class, dtype, and the
    mean that TransformerLens' processing takes off. Training moves the embedding; edits write into
    the layers alone, so an edited demo model is the demo model still.
    """
    own = getattr(getattr(model, "embed", None), "W_E", None)
    if not isinstance(own, Tensor) or tuple(own.shape) != _demo_shape():
        return False
    shipped = _demo_embedding()
    difference = own.detach().float().cpu() - shipped
    difference = difference - difference.mean(-1, keepdim=True)
    return bool(difference.norm() <= _SAME * shipped.norm())


_EMBEDDING = "transformer.wte.weight"


@cache
def _demo_shape() -> tuple[int, ...]:
    with safe_open(MODEL_DIR / "model.safetensors", framework="pt") as file:
        return tuple(file.get_slice(_EMBEDDING).get_shape())


@cache
def _demo_embedding() -> Tensor:
    with safe_open(MODEL_DIR / "model.safetensors", framework="pt") as file:
        return file.get_tensor(_EMBEDDING).float()


def fingerprint(model: LensModel) -> str:
    """Sixteen hexadecimal digits that tell a model's weights from any others.

    A hash of every parameter's name, shape, dtype and bytes; of more than a million numbers, as
    many or fewer are taken, at equal steps that meet every row and column. The device plays no
    part.

    Example:
        >>> fingerprint(load_model("demo")) == fingerprint(load_model("demo"))
        True
    """
    mark = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        mark.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        # Without a factor in common with any side, steps walk over all rows and all columns.
        step = max(1, -(-flat.numel() // _SAMPLED))
        while math.gcd(step, flat.numel()) > 1:
            step += 1
        mark.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()[:16]
