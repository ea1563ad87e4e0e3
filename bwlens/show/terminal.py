"""The lens as a text table: layers by tokens, the promoted word in each cell, norms as shade.

Each cell has the target's place from the promoted end behind its word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from bwlens.show import trusting
from bwlens.show.colors import css, ink, shade
from bwlens.show.words import probability_of, quoted, spaced, target_words, visible

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

_WIDEST = 10  # letters of a word, so that five tokens and their ranks stand in 80 columns
DOUBT = "~"
"""Stands before the word of a vector so short that the final norm's epsilon outweighs it."""


class TextTable:
    """A lens for rich: columns that do not fit beside each other go below."""

    def __init__(self, lens: BackwardLens, matrix: str | None = None) -> None:
        self._lens = lens
        self._matrix = matrix or ("W_out" if "W_out" in lens.matrices else lens.matrices[0])

    def __rich_console__(self, console: Console, options: Any) -> Any:
        lens, matrix = self._lens, self._matrix
        norms = lens.norms(matrix)
        top = float(norms.max()) or 1.0
        cells = _Cells(lens, matrix)
        widths = [
            max([cells.width(pos), min(_WIDEST + 2, len(visible(token)))])
            for pos, token in enumerate(lens.tokens)
        ]
        trust = trusting.trust_of(lens, matrix)
        yield heading(lens, matrix)
        for columns in _blocks(widths, options.max_width - (16 if trust else 6)):
            table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
            table.add_column("layer", justify="right", style="dim", no_wrap=True)
            if trust:
                table.add_column("trust", style="dim", no_wrap=True)
            for pos in columns:
                table.add_column(
                    _token(lens, pos), width=widths[pos], no_wrap=True, overflow="ellipsis"
                )
            for at in reversed(range(len(lens.layers))):
                shares = (float(norms[at, pos]) / top for pos in columns)
                row = [
                    cells.text(at, pos, share, widths[pos])
                    for pos, share in zip(columns, shares, strict=True)
                ]
                told = [trusting.short(trust, at)] if trust else []
                pale = "dim" if trusting.pale(trust, at) else None
                table.add_row(str(lens.layers[at]), *told, *row, style=pale)
            yield table
        yield _legend(lens, top, cells)
        if trust:
            yield Text(f"trust: {trusting.key(lens)}; none: {trusting.PALE}", "dim")


class _Cells:
    """What stands in the cells: a mark of doubt, the word promoted most, the target's place."""

    def __init__(self, lens: BackwardLens, matrix: str) -> None:
        found = lens.words("promoted", matrix)
        doubtful = lens.readout(matrix).eps_regime.tolist()
        places = lens.target_places(matrix).tolist() if lens.target_ids else None
        self.ranked = places is not None
        self.doubtful = any(map(any, doubtful))
        self._words = [
            [
                _short((DOUBT if doubt else "") + visible(cell[0])) if cell else ""
                for cell, doubt in zip(row, doubts, strict=True)
            ]
            for row, doubts in zip(found, doubtful, strict=True)
        ]
        self._places = [
            [_place(places[at][pos]) if places and word else "" for pos, word in enumerate(row)]
            for at, row in enumerate(self._words)
        ]

    def width(self, pos: int) -> int:
        """Of the column, in letters: its longest word, and its longest rank behind a space."""
        return self._wide(self._words, pos) + (
            1 + self._wide(self._places, pos) if self.ranked else 0
        )

    def text(self, at: int, pos: int, share: float, width: int) -> Text:
        """One cell, shaded."""
        word, place = self._words[at][pos], self._places[at][pos]
        if not word:  # a zero gradient writes nothing
            return Text("·", "dim")
        back = shade(share)
        gap = " " * max(1, width - cell_len(word) - cell_len(place)) if place else ""
        style = Style(color=css(ink(back)), bgcolor=css(back))
        return Text.assemble((word, Style(bold=place == "#1")), gap, place, style=style)

    @staticmethod
    def _wide(texts: list[list[str]], pos: int) -> int:
        return max(cell_len(row[pos]) for row in texts)


def text_table(lens: BackwardLens, matrix: str | None = None) -> TextTable:
    """The lens of one matrix (W_out if it was read) as something rich can print."""
    return TextTable(lens, matrix)


def plain_text(lens: BackwardLens, width: int = 80) -> str:
    """The lens as text without colour."""
    console = Console(width=width, no_color=True, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(text_table(lens))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def heading(lens: BackwardLens, matrix: str) -> Group:
    """The prompt with its subject underlined, the target, the model's answer, what is shown."""
    line = Text()
    for pos, token in enumerate(lens.tokens[: lens.n_prompt]):
        line.append(spaced(token), Style(underline=pos in lens.subject, bold=pos in lens.subject))
    if lens.target:
        line.append(" → ", "dim")
        line.append(target_words(lens), "bold green")
    answer = Text.assemble(
        "The model's answer before: ",
        (quoted(lens.answer), "bold"),
        f" (p = {lens.answer_probability:.3f})",
    )
    if lens.target_probability is not None:
        answer.append(f"; {probability_of(lens)} has p = {lens.target_probability:.2g}")
    answer.append(f"; {lens.loss_is} {lens.loss:.3f}")
    shown = {
        "delta": "the word it promotes most",
        "x": "the word it stamps in",
        "effect": "the word whose probability it raises most, measured",
    }[lens.through(matrix)]
    how = f" ({lens.reading} reading)" if lens.reading in ("dual", "cosine") else ""
    what = f"What one gradient step on {matrix} would write, layer by token: {shown}{how}"
    return Group(line, answer, Text(), Text(what))


def _blocks(widths: list[int], room: int) -> list[list[int]]:
    """Columns in groups that fit the room, at least one to a group, about as many to each."""
    blocks: list[list[int]] = [[]]
    used = 0
    for pos, width in enumerate(widths):
        if blocks[-1] and used + width + 1 > room:
            blocks.append([])
            used = 0
        blocks[-1].append(pos)
        used += width + 1
    return blocks


def _short(word: str) -> str:
    """A word cut to its column, with an ellipsis."""
    if cell_len(word) <= _WIDEST:
        return word
    return set_cell_size(word, _WIDEST - 1).rstrip() + "…"


def _place(place: int) -> str:
    """A rank in at most five letters: #1, #999, #1.2k, #49k."""
    if place < 1000:
        return f"#{place}"
    thousands = place / 1000
    return f"#{thousands:.1f}k" if thousands < 9.95 else f"#{thousands:.0f}k"


def _token(lens: BackwardLens, pos: int) -> Text:
    return Text(visible(lens.tokens[pos]), Style(bold=True, underline=pos in lens.subject))


def _legend(lens: BackwardLens, top: float, cells: _Cells) -> Text:
    line = Text("Shade: norm of delta, 0 ", "dim")
    for step in range(9):
        line.append("  ", Style(bgcolor=css(shade(step / 8))))
    line.append(f" {top:.3g}\n· no gradient here: a step writes nothing", "dim")
    if cells.ranked:
        line.append(
            f"\n#n place of {probability_of(lens)} among {lens.d_vocab:,} words, #1 the most"
            f" promoted",
            "dim",
        )
    if cells.doubtful:
        why = (
            "steps of different sizes disagree: not to be relied on"
            if lens.reading == "effect"
            else "vector so short that the final norm's epsilon outweighs it: the word may be the"
            " norm's bias"
        )
        line.append(f"\n{DOUBT} {why}", "dim")
    return line
