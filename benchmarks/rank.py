"""Singular values of a gradient from its rows, beside those of the dense matrix."""

from __future__ import annotations

from typing import Any

import torch

import bwlens
from benchmarks.measure import Note, Row, race, timed
from benchmarks.model import TARGET
from benchmarks.setting import Setting


def rank(setting: Setting) -> list[Row | Note]:
    """`rank()` and `singular_values()` of W_in and W_out in the middle layer."""
    layer = setting.shape.n_layers // 2
    captured = bwlens.capture(setting.model, setting.tokens, TARGET, layers=[layer])
    gradients = list(captured.values())
    dense = [gradient.dense() for gradient in gradients]

    def ours() -> Any:
        return [(gradient.rank(), gradient.singular_values()) for gradient in gradients]

    def reference() -> Any:
        return [torch.linalg.svdvals(matrix) for matrix in dense]

    row = race(
        "rank and singular values / dense svdvals",
        timed(ours),
        timed(reference),
        setting.repeats,
        0.02,
    )
    found, exact = ours(), reference()
    apart = max(
        float((S - dense_S[: len(S)]).abs().max() / dense_S[0])
        for (_, S), dense_S in zip(found, exact, strict=True)
    )
    ranks = " and ".join(str(number) for number, _ in found)
    return [
        row,
        Note(
            f"rank: W_in and W_out of layer {layer}, ranks {ranks}; the largest difference from"
            f" dense float32 singular values is {apart:.1e} of the first"
        ),
    ]
