"""Reading vectors in the vocabulary, beside the one matrix product that cannot be avoided."""

from __future__ import annotations

import torch

import bwlens
from benchmarks.measure import Note, Row, race, timed
from benchmarks.model import TARGET
from benchmarks.setting import Setting


def readout(setting: Setting) -> list[Row | Note]:
    """Top 10, bottom 10 and two tokens' ranks of a vector for each layer, matrix and position."""
    shape = setting.shape
    generator = torch.Generator().manual_seed(setting.seed)
    vectors = torch.randn(
        2 * shape.n_layers, shape.n_tokens, shape.d_model, generator=generator
    ).contiguous()
    rows = vectors.flatten(0, 1)
    W_U = setting.model.unembed.W_U.detach()
    targets = [TARGET, shape.d_vocab - 1]
    return [
        race(
            f"readout of {len(rows)} vectors / matrix product",
            timed(lambda: bwlens.readout(setting.model, vectors, 10, targets)),
            timed(lambda: rows @ W_U),
            setting.repeats,
            1.5,
        )
    ]
