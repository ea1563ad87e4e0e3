"""Two lenses side by side: two targets, two models, before and after an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bwlens.lens.backward import BackwardLens
from bwlens.runs.paths import writable
from bwlens.show.colors import limit
from bwlens.show.pack import pack
from bwlens.show.table import assets, element, first_matrix, part, tables, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Two lenses of the same layers, column by column; made by `compare`.

    Attributes:
        lenses: The two.
        names: What they are called on the page.
        matrices: The matrices that both have read.
        readings: The readings that both hold, as in `BackwardLens.readings`.
        positions: The positions compared, of the first lens and of the second: the same, or where
            the prompts differ those that stand for each other.
    """

    lenses: tuple[BackwardLens, BackwardLens]
    names: tuple[str, str]
    matrices: tuple[str, ...]
    readings: tuple[str, ...]
    positions: tuple[tuple[int, ...], tuple[int, ...]]

    def differing(self, matrix: str | None = None) -> list[tuple[int, int]]:
        """Cells (layer, position in the first) whose most promoted word is not the same in both.

        A cell that is without gradient in one of the two only differs as well.
        """
        matrix = self._known(matrix)
        a, b = (lens.words("promoted", matrix) for lens in self._views())
        return [
            (layer, pos)
            for at, layer in enumerate(self.lenses[0].layers)
            for pos, other in zip(*self.positions, strict=True)
            if a[at][pos][:1] != b[at][other][:1]
        ]

    def changes(self, matrix: str | None = None, of: str = "norm") -> DataFrame:
        """How much each cell changed from the first lens to the second, the largest change first.

        Columns: layer, pos and token (the first lens'), before, after, change (after - before);
        where the prompts differ also other_pos and other_token. `of` is the "norm" of
        delta, or the "place" of the target's first token from the promoted end (a word that the
        first lens follows may be named instead); cells without gradient in either are left out.

        Raises:
            ValueError: A matrix that is not compared, or lenses without that word.
        """
        import pandas as pd

        matrix = self._known(matrix)
        a, b = self._values(matrix, of)
        first, second = self.lenses
        rows = [
            (layer, pos, first.tokens[pos], at, second.tokens[at], one, other, other - one)
            for layer, ones, others in zip(first.layers, a, b, strict=True)
            for pos, at, one, other in zip(*self.positions, ones, others, strict=True)
            if one and other
        ]
        names = ["layer", "pos", "token", "other_pos", "other_token", "before", "after", "change"]
        frame = pd.DataFrame(rows, columns=names)
        if self.positions[0] == self.positions[1]:
            frame = frame.drop(columns=["other_pos", "other_token"])
        return frame.sort_values(
            "change", key=abs, ascending=False, ignore_index=True, kind="stable"
        )

    def figure(self, matrix: str | None = None, of: str = "norm", **options: Any) -> Figure:
        """A heat map of the changes, layers by tokens: brown is less, teal is more.

        Of places, positive is up: the logarithm of how many times nearer to #1 a word has come.
        """
        from bwlens.show import figures

        matrix = self._known(matrix)
        a, b = (np.array(values, float) for values in self._values(matrix, of))
        if of == "norm":
            change, name = b - a, f"change of the norm of $\\delta$, {matrix}"
        else:
            both = (a > 0) & (b > 0)
            change = np.where(both, np.log(np.maximum(a, 1) / np.maximum(b, 1)), np.nan)
            name = "log of how many times nearer to #1"
        lens = self.lenses[0]
        title = f"{name}: {self.names[1]}"
        return figures.change(lens, change, title, positions=self.positions[0], **options)

    def _values(self, matrix: str, of: str) -> list[list[list[Any]]]:
        """Of each lens, values [layer][column]."""
        both = []
        for lens, positions in zip(self._views(), self.positions, strict=True):
            if of == "norm":
                values = lens.norms(matrix)
            elif of == "place":
                values = lens.target_places(matrix)
            elif of in (known := lens.followed_places(matrix)):
                values = known[of]
            else:
                raise ValueError(
                    f"of={of!r} is neither 'norm' nor 'place' nor a word that both lenses follow;"
                    f" make them with backward_lens(..., follow=[{of!r}])"
                )
            both.append(values[:, list(positions)].tolist())
        return both

    def _known(self, matrix: str | None) -> str:
        matrix = matrix or first_matrix(self.matrices)
        if matrix not in self.matrices:
            raise ValueError(f"{matrix!r} is not compared; there are {', '.join(self.matrices)}")
        return matrix

    def save(self, path: str | Path) -> Path:
        """Write the comparison as a page (.html).

        Raises:
            ValueError: Another ending, or a folder that is not there.
        """
        path = writable(path, (".html",))
        title = " / ".join(
            f"{name}: {titled(lens)}" for name, lens in zip(self.names, self.lenses, strict=True)
        )
        path.write_text(tables(title, self._element()), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        n, of = len(self.differing()), len(self.lenses[0].layers) * len(self.positions[0])
        return (
            f"Comparison({self.names[0]!r}, {self.names[1]!r}: the word promoted most by"
            f" {first_matrix(self.matrices)} differs in {n} of {of} cells)"
        )

    def _repr_html_(self) -> str:
        return self._element() + assets()

    def _views(self) -> list[BackwardLens]:
        return [lens.as_reading(self.readings[0]) for lens in self.lenses]

    def _element(self) -> str:
        matrix, layers = first_matrix(self.matrices), self.lenses[0].layers
        marked = frozenset((layers.index(layer), pos) for layer, pos in self.differing(matrix))
        if len(marked) > len(layers) * len(self.positions[0]) / 2:
            marked = frozenset()  # where almost every cell differs, to mark those says nothing
        theirs = dict(zip(*self.positions, strict=True))
        marks = (marked, frozenset((layer, theirs[pos]) for layer, pos in marked))
        both = [*zip(self._views(), self.positions, strict=True)]
        top = max(limit(lens.norms(matrix)[:, list(where)]) for lens, where in both)
        parts = [
            part(lens, name, matrix, where, top, mark)
            for (lens, where), name, mark in zip(both, self.names, marks, strict=True)
        ]
        packed = [pack(lens, self.matrices, self.readings, where) for lens, where in both]
        return element(parts, *packed)


def compare(
    lens_a: BackwardLens, lens_b: BackwardLens, names: Sequence[str] = ("A", "B")
) -> Comparison:
    """Lay two lenses side by side, the cells that differ marked, shades on one scale.

    The same layers must have been read. Where targets of several tokens differ, the tokens of the
    targets themselves are left out. Different prompts are laid side by side by their parts, where
    both have a subject: what is before it, the subject, what follows, and the last token. Of two
    parts the tokens nearest their ends stand for each other, and what the longer one has more is
    left out. `names` are what the two are called, such as ("before", "after").

    Raises:
        ValueError: The layers differ, the tokens differ and no subject is named, or no matrix or
            reading is in both; the message says what differs.

    Example:
        >>> compare(lens, lens_after_the_edit, ("before", "after"))  # doctest: +SKIP
    """
    if len(names) != 2:
        raise ValueError(f"names must be two, one for each lens; found {list(names)}")
    if lens_a.layers != lens_b.layers:
        raise ValueError(
            f"the lenses read other layers: {_ranges(lens_a.layers)} and {_ranges(lens_b.layers)};"
            " read the same with backward_lens(..., layers=[...])"
        )
    prompts = [lens.tokens[: lens.n_prompt] for lens in (lens_a, lens_b)]
    if prompts[0] != prompts[1] and not (lens_a.subject and lens_b.subject):
        raise ValueError(
            f"the prompts consist of other tokens: {_first_difference(*prompts)}; to lay them side"
            f" by side by their parts, make both with backward_lens(..., subject=...)"
        )
    matrices = tuple(m for m in lens_a.matrices if m in lens_b.matrices)
    if not matrices:
        raise ValueError(
            f"no matrix was read in both: {', '.join(lens_a.matrices)} in one,"
            f" {', '.join(lens_b.matrices)} in the other"
        )
    readings = tuple(reading for reading in lens_a.readings if reading in lens_b.readings)
    if not readings:
        raise ValueError(
            f"no reading in both: {', '.join(lens_a.readings)} in one,"
            f" {', '.join(lens_b.readings)} in the other; make them with the same reading="
        )
    if prompts[0] == prompts[1]:
        same = lens_a.tokens == lens_b.tokens
        every = tuple(range(len(lens_a.tokens) if same else lens_a.n_prompt))
        positions = every, every
    else:
        positions = _aligned(lens_a, lens_b)
    return Comparison((lens_a, lens_b), (names[0], names[1]), matrices, readings, positions)


def _aligned(a: BackwardLens, b: BackwardLens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions that stand for each other, by the parts of both prompts."""
    pairs = [
        pair
        for one, other in zip(_parts(a), _parts(b), strict=True)
        for pair in zip(one[::-1], other[::-1], strict=False)
    ]
    return tuple(at for at, _ in sorted(pairs)), tuple(at for _, at in sorted(pairs))


def _parts(lens: BackwardLens) -> list[list[int]]:
    """Positions before the subject, of it, after it, and the last one, which is in no other."""
    last, first = lens.n_prompt - 1, lens.subject[0]
    subject = [pos for pos in lens.subject if pos < last]
    after = [pos for pos in range(first, last) if pos not in lens.subject]
    return [list(range(min(first, last))), subject, after, [last]]


def _ranges(layers: Sequence[int]) -> str:
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _first_difference(a: Sequence[str], b: Sequence[str]) -> str:
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} of them ({''.join(a)!r} and {''.join(b)!r})"
    at = next(at for at, (one, other) in enumerate(zip(a, b, strict=True)) if one != other)
    return f"at position {at}, {a[at]!r} and {b[at]!r}"
