"""A lens as data: data frames for analysis, plain lists for JSON."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

from bwlens.lens.asking import whole_number
from bwlens.lens.reading import Positions, resolve_positions
from bwlens.model.sites import Layers

if TYPE_CHECKING:
    import pandas as pd

    from bwlens.lens.backward import BackwardLens

_SINGLE = (
    "prompt",
    "n_prompt",
    "target",
    "answer",
    "answer_probability",
    "target_probability",
    "loss",
    "loss_is",
    "normalized",
    "settings",
)
_LISTS = ("tokens", "token_ids", "subject", "target_ids", "target_tokens", "layers")


def cells(lens: BackwardLens) -> pd.DataFrame:
    """One row per matrix, layer and position: norms, ranks, words, and the marks of doubt."""
    import pandas as pd

    n_pos = len(lens.tokens)
    frames = [
        pd.DataFrame(
            {
                "matrix": matrix,
                "layer": [layer for layer in lens.layers for _ in range(n_pos)],
                "pos": list(range(n_pos)) * len(lens.layers),
                "token": lens.tokens * len(lens.layers),
                **{name: list(chain.from_iterable(v)) for name, v in _grids(lens, matrix).items()},
            }
        )
        for matrix in lens.matrices
    ]
    return pd.concat(frames, ignore_index=True)


def words(
    lens: BackwardLens, which: str, k: int, matrix: str, layers: Layers, positions: Positions
) -> pd.DataFrame:
    """A row for each layer, position and word of one end of a lens, strongest words first.

    Raises:
        ValueError: `k` is not between 1 and the number of words that the lens keeps; a layer that
            was not read; positions out of range.
    """
    import pandas as pd

    ids, scores = lens.side(which, matrix)
    k, kept = whole_number(k, "k"), ids.shape[-1]
    if k > kept:
        raise ValueError(
            f"k={k}, but this lens keeps {kept} words a cell: take 1 to {kept}, or make it again"
            f" with a larger top_k"
        )
    norms = lens.norms(matrix).tolist()
    n_pos = len(lens.tokens)
    chosen = resolve_positions(positions, n_pos, lens.subject, lens.n_prompt - 1)
    rows = [
        (layer, pos, lens.tokens[pos], norms[at][pos], place, lens.vocabulary[i], score)
        for layer in lens.resolve_layers(layers)
        for at in (lens.layers.index(layer),)
        for pos in (range(n_pos) if chosen is None else chosen)
        for place, (i, score) in enumerate(
            zip(ids[at, pos, :k].tolist(), scores[at, pos, :k].tolist(), strict=True)
        )
        if i >= 0
    ]
    return pd.DataFrame(rows, columns=["layer", "pos", "token", "norm", "place", "word", "score"])


def plain(lens: BackwardLens) -> dict[str, Any]:
    """Everything the lens shows, as plain lists and numbers.

    `target_probability` and `target_rank` are those of the first of `target_tokens`.
    """
    matrices: dict[str, Any] = {}
    for matrix in lens.matrices:
        grids = _grids(lens, matrix)
        if not lens.target_ids:
            grids["target_rank"] = None
        for which in ("promoted", "suppressed"):
            grids[f"{which}_scores"] = [
                [[] if cell and math.isnan(cell[0]) else cell for cell in row]
                for row in lens.side(which, matrix)[1].tolist()
            ]
        matrices[matrix] = {"read_through": lens.through(matrix), **grids}
    return {
        "format": "bwlens.BackwardLens",
        "version": 1,
        **{name: getattr(lens, name) for name in _SINGLE},
        **{name: list(getattr(lens, name)) for name in _LISTS},
        "matrices": matrices,
    }


def _grids(lens: BackwardLens, matrix: str) -> dict[str, Any]:
    """Each quantity of a matrix' cells as lists [layer][pos]."""
    none = [[None] * len(lens.tokens)] * len(lens.layers)
    return {
        "norm_x": lens.norms(matrix, "x").tolist(),
        "norm_delta": lens.norms(matrix, "delta").tolist(),
        "target_rank": lens.target_ranks(matrix).tolist() if lens.target_ids else none,
        "answer_rank": lens.answer_ranks(matrix).tolist(),
        "promoted": lens.words("promoted", matrix),
        "suppressed": lens.words("suppressed", matrix),
        "zero": lens.silent(matrix).tolist(),
        "eps_regime": lens.readout(matrix).eps_regime.tolist(),
    }
