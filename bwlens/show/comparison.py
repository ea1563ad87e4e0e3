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
    """Two lenses of the same tokens and layers; made by `compare`.

    Attributes:
        lenses: The two.
        names: What they are called on the page.
        matrices: The matrices that both have read.
        readings: The readings that both hold, as in `BackwardLens.readings`.
        n_pos: The number of columns compared.
    """

    lenses: tuple[BackwardLens, BackwardLens]
    names: tuple[str, str]
    matrices: tuple[str, ...]
    readings: tuple[str, ...]
    n_pos: int

    def differing(self, matrix: str | None = None) -> list[tuple[int, int]]:
        """Cells (layer, position) whose most promoted word is not the same in both.

        A cell that is without gradient in one of the two only differs as well.
        """
        matrix = self._known(matrix)
        a, b = (lens.words("promoted", matrix) for lens in self._views())
        return [
            (layer, pos)
            for at, layer in enumerate(self.lenses[0].layers)
            for pos in range(self.n_pos)
            if a[at][pos][:1] != b[at][pos][:1]
        ]

    def changes(self, matrix: str | None = None, of: str = "norm") -> DataFrame:
        """How much each cell changed from the first lens to the second, the largest change first.

        Columns: layer, pos, token, before, after, change (after - before). `of` is the "norm" of
        delta, or the "place" of the target's first token from the promoted end (a word that the
        first lens follows may be named instead); cells without gradient in either are left out.

        Raises:
            ValueError: A matrix that is not compared, or lenses without that word.
        """
        import pandas as pd

        matrix = self._known(matrix)
        a, b = (self._values(lens, matrix, of) for lens in self._views())
        lens = self.lenses[0]
        rows = [
            (layer, pos, lens.tokens[pos], one, other, other - one)
            for layer, ones, others in zip(lens.layers, a, b, strict=True)
            for pos, (one, other) in enumerate(zip(ones, others, strict=True))
            if one and other
        ]
        columns = ["layer", "pos", "token", "before", "after", "change"]
        return pd.DataFrame(rows, columns=columns).sort_values(
            "change", key=abs, ascending=False, ignore_index=True, kind="stable"
        )

    def figure(self, matrix: str | None = None, of: str = "norm", **options: Any) -> Figure:
        """A heat map of the changes, layers by tokens: brown is less, teal is more.

        Of places, positive is up: the logarithm of how many times nearer to #1 a word has come.
        """
        from bwlens.show import figures

        matrix = self._known(matrix)
        a, b = (np.array(self._values(lens, matrix, of), float) for lens in self._views())
        if of == "norm":
            change, name = b - a, f"change of the norm of $\\delta$, {matrix}"
        else:
            both = (a > 0) & (b > 0)
            change = np.where(both, np.log(np.maximum(a, 1) / np.maximum(b, 1)), np.nan)
            name = "log of how many times nearer to #1"
        return figures.change(self.lenses[0], change, f"{name}: {self.names[1]}", **options)

    def _values(self, lens: BackwardLens, matrix: str, of: str) -> list[list[Any]]:
        if of == "norm":
            values = lens.norms(matrix)
        elif of == "place":
            values = lens.target_places(matrix)
        elif of in (known := lens.followed_places(matrix)):
            values = known[of]
        else:
            raise ValueError(
                f"of={of!r} is neither 'norm' nor 'place' nor a word that both lenses follow; make"
                f" them with backward_lens(..., follow=[{of!r}])"
            )
        return values[:, : self.n_pos].tolist()

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
        n, of = len(self.differing()), len(self.lenses[0].layers) * self.n_pos
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
        if len(marked) > len(layers) * self.n_pos / 2:
            marked = frozenset()  # where almost every cell differs, to mark those says nothing
        top = max(limit(lens.norms(matrix)[:, : self.n_pos]) for lens in self.lenses)
        parts = [
            part(lens, name, matrix, self.n_pos, top, marked)
            for lens, name in zip(self._views(), self.names, strict=True)
        ]
        packed = (pack(lens, self.matrices, self.readings, self.n_pos) for lens in self.lenses)
        return element(parts, *packed)


def compare(
    lens_a: BackwardLens, lens_b: BackwardLens, names: Sequence[str] = ("A", "B")
) -> Comparison:
    """Lay two lenses side by side, the cells that differ marked, shades on one scale.

    The prompts must consist of the same tokens, and the same layers must have been read. Where
    targets of several tokens differ, the tokens of the targets themselves are left out. `names` are
    what the two are called, such as ("before", "after").

    Raises:
        ValueError: The tokens or layers differ, or no matrix or reading is in both; the
            message says what differs.

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
    if prompts[0] != prompts[1]:
        raise ValueError(f"the prompts consist of other tokens: {_first_difference(*prompts)}")
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
    same = lens_a.tokens == lens_b.tokens
    n_pos = len(lens_a.tokens) if same else lens_a.n_prompt
    return Comparison((lens_a, lens_b), (names[0], names[1]), matrices, readings, n_pos)


def _ranges(layers: Sequence[int]) -> str:
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _first_difference(a: Sequence[str], b: Sequence[str]) -> str:
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} of them ({''.join(a)!r} and {''.join(b)!r})"
    at = next(at for at, (one, other) in enumerate(zip(a, b, strict=True)) if one != other)
    return f"at position {at}, {a[at]!r} and {b[at]!r}"
