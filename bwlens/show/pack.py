"""A lens packed for a page: each word once, ids and scores as short arrays in base64.

A cell has twenty words and a table thousands of cells, so plain JSON would be several megabytes.
Ids point into the list of words and take as many bits as it needs, some twelve to fifteen; scores
take sixteen bits within their own range (an error of at most 1/131070 of it); readings that two
matrices share are stored once.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bwlens.show import trusting
from bwlens.show.words import probability_of, spaced

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

ENDS = ("promoted", "suppressed")
_SHARED = 15  # letters at most that a word takes from the one before
_PLAIN = re.compile(" ?[!-~]+").fullmatch  # what shows as it is; most words do
_STEPS = 2**16 - 1
READING = {False: "raw", True: "normalised"}


def pack(
    lens: BackwardLens,
    matrices: Sequence[str] | None = None,
    readings: Sequence[bool] | None = None,
    n_pos: int | None = None,
) -> dict[str, Any]:
    """What the table's script reads: a dictionary fit for JSON, arrays in base64.

    Args:
        lens: The lens.
        matrices: The matrices to take; None for all.
        readings: The readings to take, as in `BackwardLens.readings`; None for all.
        n_pos: The number of columns to take; None for all.
    """
    matrices = lens.matrices if matrices is None else matrices
    views = {n: lens.as_normalized(n) for n in (lens.readings if readings is None else readings)}
    keep = slice(n_pos)
    sides = {
        (normalized, matrix, end): tuple(part[:, keep] for part in view.side(end, matrix))
        for normalized, view in views.items()
        for matrix in matrices
        for end in ENDS
    }
    followed = [*lens.target_ids[:1], _answer_id(lens)]
    words = _Words([*(_numpy(ids) for ids, _ in sides.values()), np.array(followed)], lens)
    blobs = _Blobs()
    held: dict[str, Any] = {}
    for matrix in matrices:
        held[matrix] = {
            "through": lens.through(matrix),
            "delta": blobs.floats(lens.norms(matrix, "delta")[:, keep]),
            "x": blobs.floats(lens.norms(matrix, "x")[:, keep]),
            "readings": {},
        }
        for normalized, view in views.items():
            read = view.readout(matrix)
            faint = 1 + 254 * _numpy(read.shrinkage)[:, keep]
            entry: dict[str, Any] = {
                "answer": blobs.integers(1 + _numpy(view.answer_ranks(matrix))[:, keep]),
                # What the norm's epsilon leaves of a doubtful vector; 0 where there is no doubt.
                "faint": blobs.integers(np.where(_numpy(read.eps_regime)[:, keep], faint, 0)),
            }
            if lens.target_ids:
                entry["target"] = blobs.integers(1 + _numpy(view.target_ranks(matrix))[:, keep])
            for end in ENDS:
                ids, scores = sides[normalized, matrix, end]
                entry[end] = {
                    "ids": blobs.integers(words.places(_numpy(ids))),
                    **blobs.scores(_numpy(scores)),
                }
            held[matrix]["readings"][READING[normalized]] = entry
    marked = words.places(np.array(followed)).tolist()
    return {
        "k": next(iter(sides.values()))[0].shape[-1],
        "vocab": lens.d_vocab,
        "layers": list(lens.layers),
        "tokens": [spaced(token) for token in lens.tokens[keep]],
        "given": lens.n_prompt,
        "words": words.text,
        "target": marked[0] if lens.target_ids else 0,
        "answer": marked[-1],
        "said": probability_of(lens),
        "matrices": held,
        "blobs": blobs.held,
        "trust": trusting.packed(lens, READING[lens.normalized]),
    }


def script_json(data: Any) -> str:
    """Data as JSON that can stand in a script element: nothing in it can close the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _answer_id(lens: BackwardLens) -> int:
    # As the lens itself finds it: the softmax may merge what the logits tell apart.
    return int(lens.gradients.next_logits[0].float().softmax(-1).argmax())


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


class _Words:
    """The words that occur, sorted and front-coded: `text` has a line for each, which begins with
    the number of letters (one hexadecimal digit) that it shares with the one before."""

    def __init__(self, ids: Sequence[np.ndarray], lens: BackwardLens) -> None:
        held = np.unique(np.concatenate([part.ravel() for part in ids]))
        self._held = held[held >= 0]
        vocabulary = lens.vocabulary
        texts = [vocabulary[i] for i in self._held.tolist()]
        texts = [text if _PLAIN(text) else spaced(text) for text in texts]
        order = sorted(range(len(texts)), key=texts.__getitem__)
        self._place = np.empty(len(order), dtype=int)
        self._place[order] = np.arange(1, len(order) + 1)
        self.text = "\n".join(_front_coded([texts[at] for at in order]))

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Places of ids in the list, from 1; 0 for none."""
        return np.where(ids < 0, 0, self._place[np.searchsorted(self._held, ids.clip(0))])


def _front_coded(words: Sequence[str]) -> list[str]:
    letters = np.array([word[:_SHARED] for word in words], dtype=f"U{_SHARED}")
    codes = letters.view("u4").reshape(len(words), _SHARED)
    # A script counts a character past U+FFFF as two, and none is shared after the end of a word.
    same = (codes[1:] == codes[:-1]) & (codes[1:] > 0) & (codes[1:] <= 0xFFFF)
    shared = [0, *np.logical_and.accumulate(same, axis=1).sum(axis=1).tolist()]
    return [f"{n:x}{word[n:]}" for n, word in zip(shared, words, strict=True)]


class _Blobs:
    """Arrays as text, each stored once: `f4:base64` are floats, `u14:base64` 14-bit integers."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self._at: dict[str, int] = {}

    def integers(self, values: np.ndarray) -> int:
        """Each in as many bits as the largest needs, the highest bit first."""
        width = max(1, int(values.max(initial=0)).bit_length())
        whole = values.astype("u4").reshape(-1, 1)
        bits = (whole >> np.arange(width - 1, -1, -1, dtype="u4")) & 1
        return self._add(f"u{width}", np.packbits(bits.astype(bool)))

    def floats(self, values: Tensor) -> int:
        wide = _numpy(values).astype("f8")
        # A norm too short for four bytes must not turn into "no gradient".
        tiny = np.where(wide > 0, np.float64(np.finfo("f4").smallest_subnormal), 0.0)
        return self._add("f4", np.maximum(wide, tiny).clip(max=np.finfo("f4").max).astype("<f4"))

    def scores(self, values: np.ndarray) -> dict[str, Any]:
        finite = values[np.isfinite(values)].astype("f8")
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        steps = _STEPS / (high - low) if high > low else 0.0
        places = np.nan_to_num((values - low) * steps).clip(0, _STEPS).round()
        return {"scores": self.integers(places), "low": low, "step": (high - low) / _STEPS}

    def _add(self, kind: str, values: np.ndarray) -> int:
        text = f"{kind}:{b64encode(values.tobytes()).decode()}"
        if text not in self._at:
            self._at[text] = len(self.held)
            self.held.append(text)
        return self._at[text]
