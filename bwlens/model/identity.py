"""Which model is this: its name, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch

from bwlens.demo import MODEL_DIR

_SAMPLED = 2**20


def model_label(model: Any) -> str:
    """What a model is called: its name on the hub, its folder, or "demo"."""
    name = str(getattr(model.cfg, "model_name", type(model).__name__))
    return "demo" if Path(name) == MODEL_DIR else name


def fingerprint(model: Any) -> str:
    """Sixteen hexadecimal digits that tell a model's weights from any others.

    A hash of every parameter's name, shape, dtype and bytes; of more than a million numbers, as
    many or fewer are taken, at equal steps that meet every row and column. The device plays no part.

    Example:
        >>> fingerprint(load_model("demo")) == fingerprint(load_model("demo"))
        True
    """
    held = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        held.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        # Without a factor in common with any side, steps walk over all rows and all columns.
        step = max(1, -(-flat.numel() // _SAMPLED))
        while math.gcd(step, flat.numel()) > 1:
            step += 1
        held.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return held.hexdigest()[:16]
