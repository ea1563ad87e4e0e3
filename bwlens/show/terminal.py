"""The lens as a text table: layers by tokens, the promoted word in each cell, norms as shade.

Each cell has the target's place from the promoted end behind its word.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from bwlens.show import trusting
from bwlens.show.colors import css, ink, limit, shade
from bwlens.show.table import first_matrix
from bwlens.show.words import headings, probability_of, prompt_pieces, quoted, target_words, visible

if TYPE_CHECKING:
    from torch import Tensor

    from bwlens.lens.backward import BackwardLens

_WIDEST = 10  # letters of a word, so that five tokens and their ranks stand in 80 columns
DOUBT = "~"
"""Stands before the word of a vector so short that the final norm's epsilon outweighs it."""

HIT = "*"
"""Stands before the target."""

BEYOND = "▲"
"""Stands before the word of a cell whose norm is beyond the scale."""

_BARS = "▁▂▃▄▅▆▇█"  # the norm, where there are no colours


def dark_terminal() -> bool:
    """Whether the terminal's background is dark: what COLORFGBG says, else yes, as most are."""
    return os.environ.get("COLORFGBG", "").rpartition(";")[2] not in ("7", "15")


class TextTable:
    """The lens of one matrix (W_out if it was read) for rich; columns that do not fit go below."""

    def __init__(self, lens: BackwardLens, matrix: str | None = None) -> None:
        self._lens = lens
        self._matrix = matrix or first_matrix(lens.matrices)

    def __rich_console__(self, console: Console, options: Any) -> Any:
        lens, matrix = self._lens, self._matrix
        norms = lens.norms(matrix)
        top, dark = limit(norms), dark_terminal()
        plain = console.color_system is None or console.no_color
        words = _words(lens, matrix, norms, top, plain)
        places = _places(lens, matrix, words)
        names = [name.strip(" ") for name in headings(lens)]
        widths = [
            max(_widest(words, pos) + _widest(places, pos), min(_WIDEST + 2, len(name)))
            for pos, name in enumerate(names)
        ]
        trust = trusting.trust_of(lens, matrix)
        yield heading(lens, matrix)
        for columns in _blocks(widths, options.max_width - (16 if trust else 6)):
            table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
            table.add_column("layer", justify="right", style="dim", no_wrap=True)
            if trust:
                table.add_column("trust", style="dim", no_wrap=True)
            for pos in columns:
                name = Text(names[pos], Style(bold=True, underline=pos in lens.subject))
                table.add_column(name, width=widths[pos], no_wrap=True, overflow="ellipsis")
            for at in reversed(range(len(lens.layers))):
                told = [trusting.short(trust, at)] if trust else []
                cells = (
                    _cell(words[at][p], places[at][p], float(norms[at, p]) / top, widths[p], dark)
                    for p in columns
                )
                pale = "dim" if trusting.pale(trust, at) else None
                table.add_row(str(lens.layers[at]), *told, *cells, style=pale)
            yield table
        yield _legend(lens, matrix, top, float(norms.max()), dark, plain)
        if trust:
            yield Text(f"trust: {trusting.key(lens)}; none: {trusting.PALE}", "dim")


def _words(
    lens: BackwardLens, matrix: str, norms: Tensor, top: float, bars: bool
) -> list[list[str]]:
    """What cells say: marks and the word promoted most, cut; "" without gradient."""
    doubts = lens.readout(matrix).eps_regime.tolist()
    target = lens.target_tokens[:1]
    rows = []
    for row, row_doubts, row_norms in zip(
        lens.words("promoted", matrix), doubts, norms.tolist(), strict=True
    ):
        texts = []
        for cell, doubt, norm in zip(row, row_doubts, row_norms, strict=True):
            if not cell:
                texts.append("")
                continue
            marks = DOUBT * doubt + BEYOND * (norm > top) + HIT * (tuple(cell[:1]) == target)
            bar = _BARS[min(int(8 * norm / top), 7)] if bars else ""
            texts.append(bar + _short(marks + visible(cell[0])))
        rows.append(texts)
    return rows


def _places(lens: BackwardLens, matrix: str, words: list[list[str]]) -> list[list[str]]:
    """The target's place from the promoted end, behind a space; "" where there is none."""
    if not lens.target_ids:
        return [[""] * len(row) for row in words]
    return [
        [f" {_place(place)}" if word else "" for word, place in zip(*row, strict=True)]
        for row in zip(words, lens.target_places(matrix).tolist(), strict=True)
    ]


def _widest(texts: list[list[str]], pos: int) -> int:
    return max(cell_len(row[pos]) for row in texts)


def _cell(word: str, place: str, share: float, width: int, dark: bool) -> Text:
    """One cell, shaded, the place at its right edge."""
    if not word:  # a zero gradient writes nothing
        return Text("·", "dim")
    back = shade(share, dark)
    gap = " " * (width - cell_len(word) - cell_len(place)) if place else ""
    style = Style(color=css(ink(back)), bgcolor=css(back))
    return Text.assemble((word, Style(bold=place == " #1")), gap, place, style=style)


def plain_text(lens: BackwardLens, width: int = 80) -> str:
    """The lens as text without colour."""
    console = Console(width=width, no_color=True, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(TextTable(lens))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def heading(lens: BackwardLens, matrix: str) -> Group:
    """The prompt with its subject underlined, the target, the model's answer, what is shown."""
    line = Text()
    for text, own in prompt_pieces(lens):
        line.append(text, Style(underline=own, bold=own))
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


def _legend(
    lens: BackwardLens, matrix: str, top: float, high: float, dark: bool, plain: bool
) -> Text:
    line = Text("Bars: norm of delta, 0 " if plain else "Shade: norm of delta, 0 ", "dim")
    for step in range(0 if plain else 9):
        line.append("  ", Style(bgcolor=css(shade(step / 8, dark))))
    line.append(f"{_BARS if plain else ''} {top:.3g}", "dim")
    if high > top:
        line.append(f"\n{BEYOND} beyond the scale, up to {high:.3g}", "dim")
    line.append("\n· no gradient here, where a step writes nothing, or not read", "dim")
    if lens.target_ids:
        line.append(f"\n{HIT} {probability_of(lens)}", "dim")
    if lens.target_ids:
        line.append(
            f"\n#n place of {probability_of(lens)} among {lens.d_vocab:,} words, #1 the most"
            f" promoted",
            "dim",
        )
    if lens.readout(matrix).eps_regime.any():
        why = (
            "steps of different sizes disagree: not to be relied on"
            if lens.reading == "effect"
            else "vector so short that the final norm's epsilon outweighs it: the word may be the"
            " norm's bias"
        )
        line.append(f"\n{DOUBT} {why}", "dim")
    return line
