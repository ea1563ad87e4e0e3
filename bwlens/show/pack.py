"""A lens as data for the table's script: compressed as browsers themselves can unpack it.

A cell has twenty words and a table thousands of cells: several megabytes, some hundred kilobytes
when compressed.
"""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bwlens.lens.neurons import WITH_NEURONS, Moved
from bwlens.show import picking, trusting
from bwlens.show.colors import limit
from bwlens.show.words import about, headings, probability_of, spaced

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

ENDS = ("promoted", "suppressed")

NEURONS, NEURON_CELLS = 3, 2_000
"""Neurons of a cell in a page, and up to how many cells they are shown where none was read."""

WORDS = 1_000_000
"""How many words a page holds at most; of a larger lens each cell has fewer."""


def compressed(data: Any) -> str:
    """Data as JSON, then the bytes of its arrays; gzip and base64, which mean nothing to HTML.

    An array of whole numbers is `{"$": [start, length, bytes each]}` in the JSON: of numbers of two
    or four bytes all first bytes come first, then all second ones, which packs better. Level 4
    takes a quarter of the time of level 6 for 3 % more bytes.
    """
    parts: list[bytes] = []

    def lay(array: np.ndarray) -> Any:
        low, high = int(array.min(initial=0)), int(array.max(initial=0))
        size = next(
            (n for n in (1, 2, 4) if -(2 ** (8 * n - 1)) <= low <= high < 2 ** (8 * n - 1)), 0
        )
        if not size:  # beyond 32 bits
            return array.tolist()
        start = sum(map(len, parts))
        parts.append(array.astype(f"<i{size}").view("u1").reshape(-1, size).T.tobytes())
        return {"$": [start, len(array), size]}

    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=lay)
    raw = b"\0".join([text.encode(), b"".join(parts)])
    return b64encode(gzip.compress(raw, 4, mtime=0)).decode()


def pack(
    lens: BackwardLens,
    matrices: Sequence[str] | None = None,
    readings: Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What the table's script reads, in flat lists by cell (layer index times width plus column).

    `at` are the columns' positions; `words` are those that occur, after "" for none; `ids` are
    places among them, k to a cell. Scores are in hundredths, as shown, each less the one before it
    in its cell; norms have five digits; `top` has the deepest shade.
    Ranks are -1 without gradient, `faint` the percents of a doubtful vector that the norm's epsilon
    leaves, -1 without doubt. What two matrices or readings share is in `readings` once.

    Of the lens' `matrices`, `readings` (as in `BackwardLens.readings`) and `positions`, None
    takes all.
    """
    matrices = lens.matrices if matrices is None else matrices
    views = {n: lens.as_reading(n) for n in (lens.readings if readings is None else readings)}
    keep = list(range(len(lens.tokens)) if positions is None else positions)
    width = len(keep)
    cells = len(lens.layers) * width * len(matrices) * len(views)
    has = lens.side("promoted", matrices[0])[0].shape[-1]
    k = min(has, max(1, WORDS // (2 * cells)))
    sides = {
        (reading, matrix, end): [_flat(part[:, keep, :k]) for part in view.side(end, matrix)]
        for reading, view in views.items()
        for matrix in matrices
        for end in ENDS
    }
    # As the lens itself finds it: the softmax may merge what the logits tell apart.
    answer = int(lens.gradients.next_logits[0].float().softmax(-1).argmax())
    vocabulary = lens.vocabulary
    used = np.unique(np.concatenate([ids for ids, _ in sides.values()]))
    more = [*lens.target_ids[:1], answer, *lens.follow_ids]
    moved = _moved(lens, matrices, keep) if lens.has_neurons or cells <= NEURON_CELLS else {}
    more += [lens.neuron_id(each) for part in moved.values() for cell in part for each in cell]
    used = np.union1d(used, more)
    used = used[used >= 0]

    place = np.zeros(int(used[-1]) + 2, int)  # of each id among the words; -1 is the last, 0
    place[used] = 1 + np.arange(len(used))

    def places(ids: Any) -> Any:
        return place[ids]

    many = width > picking.DRAWN
    chosen = picking.columns(lens, matrices[-1]) if many else keep
    columns = [at for at, pos in enumerate(keep) if pos in chosen]
    entries: list[dict[str, Any]] = []
    by_matrix: dict[str, Any] = {}
    for matrix in matrices:
        at: dict[str, int] = {}
        for reading, view in views.items():
            read = view.readout(matrix)
            left = (100 * _flat(read.shrinkage[:, keep])).round().astype(int)
            entry: dict[str, Any] = {
                "through": view.through(matrix),
                "unit": view.unit(matrix),
                "answer": _flat(view.answer_ranks(matrix)[:, keep]),
                "faint": np.where(_flat(read.eps_regime[:, keep]), left, -1),
            }
            if lens.target_ids:
                entry["target"] = _flat(view.target_ranks(matrix)[:, keep])
            if lens.follow_ids:
                entry["follow"] = [
                    _flat(each[:, keep]) for each in view.followed_places(matrix).values()
                ]
            for end in ENDS:
                ids, scores = sides[reading, matrix, end]
                hundredths = (100 * np.nan_to_num(scores.astype("f8")).clip(-1e12, 1e12)).round()
                steps = np.diff(hundredths.astype("i8").reshape(-1, k), axis=1, prepend=0)
                entry[end] = {"ids": places(ids), "scores": steps.ravel()}
            same = (i for i, other in enumerate(entries) if _equal(other, entry))
            at[reading] = next(same, len(entries))
            entries += [entry] * (at[reading] == len(entries))
        by_matrix[matrix] = {
            "delta": _digits(lens.norms(matrix, "delta")[:, keep]),
            "x": _digits(lens.norms(matrix, "x")[:, keep]),
            "top": limit(lens.norms(matrix)[:, keep][:, columns]),
            "readings": at,
        }
        if matrix in moved:
            by_matrix[matrix]["neurons"] = [
                [[each.name, float(f"{each.value:.3g}"), int(places(lens.neuron_id(each)))]
                 for each in cell]
                for cell in moved[matrix]
            ]  # fmt: skip
    names = headings(lens)
    return {
        "k": k,
        "of": has,
        "about": about(lens),
        "columns": columns,
        "at": keep,
        "subject": [at for at, pos in enumerate(keep) if pos in lens.subject],
        "vocab": lens.d_vocab,
        "layers": list(lens.layers),
        "tokens": [names[pos] for pos in keep],
        "given": sum(pos < lens.n_prompt for pos in keep),
        "words": ["", *(spaced(vocabulary[i]) for i in used.tolist())],
        "target": int(places(lens.target_ids[0])) if lens.target_ids else 0,
        "answer": int(places(answer)),
        "follow": places(np.array(lens.follow_ids, int)).tolist(),
        "said": probability_of(lens),
        "matrices": by_matrix,
        "readings": entries,
        "trust": {n: trusting.packed(view) for n, view in views.items()}
        if lens.has_trust
        else None,
    }


def _moved(
    lens: BackwardLens, matrices: Sequence[str], keep: Sequence[int]
) -> dict[str, list[list[Moved]]]:
    """The neurons moved most, by matrix and cell."""
    return {
        matrix: [
            cells[pos]
            for cells in (lens.moved_neurons(matrix, layer, NEURONS) for layer in lens.layers)
            for pos in keep
        ]
        for matrix in matrices
        if matrix in WITH_NEURONS
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return all(map(_equal, one, other))
    return bool(np.array_equal(one, other))


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().flatten().cpu().numpy()


def _digits(norms: Tensor) -> list[float]:
    return [float(f"{norm:.5g}") for norm in norms.double().flatten().tolist()]
