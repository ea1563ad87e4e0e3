"""The lens as a text table: layers by tokens, the promoted word in each cell, norms as shade."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from bwlens.show.colors import css, ink, shade
from bwlens.show.words import spaced, visible

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

_WIDEST = 12


class TextTable:
    """A lens for rich: columns that do not fit beside each other go below."""

    def __init__(self, lens: BackwardLens, matrix: str | None = None) -> None:
        self._lens = lens
        self._matrix = matrix or ("W_out" if "W_out" in lens.matrices else lens.matrices[0])

    def __rich_console__(self, console: Console, options: Any) -> Any:
        lens = self._lens
        words = [
            [visible(cell[0]) if cell else "" for cell in row]
            for row in lens.words("promoted", self._matrix)
        ]
        norms = lens.norms(self._matrix)
        top = float(norms.max()) or 1.0
        widths = [
            min(_WIDEST, max(len(visible(token)), *(len(row[pos]) for row in words)))
            for pos, token in enumerate(lens.tokens)
        ]
        yield heading(lens, self._matrix)
        for columns in _blocks(widths, options.max_width - 8):
            table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
            table.add_column("layer", justify="right", style="dim", no_wrap=True)
            for pos in columns:
                table.add_column(
                    _token(lens, pos), width=widths[pos] + 2, no_wrap=True, overflow="ellipsis"
                )
            for at in reversed(range(len(lens.layers))):
                cells = [_cell(words[at][pos], float(norms[at, pos]) / top) for pos in columns]
                table.add_row(str(lens.layers[at]), *cells)
            yield table
        yield _legend(top, self._matrix)


def text_table(lens: BackwardLens, matrix: str | None = None) -> TextTable:
    """The lens of one matrix (W_out if it was read) as something rich can print."""
    return TextTable(lens, matrix)


def plain_text(lens: BackwardLens, width: int = 120) -> str:
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
        line.append(visible(lens.target), "bold green")
    answer = Text.assemble(
        "The model's answer before: ",
        (visible(lens.answer), "bold"),
        f" (p = {lens.answer_probability:.3f})",
    )
    if lens.target_probability is not None:
        answer.append(f"; of the target: p = {lens.target_probability:.2g}, loss {lens.loss:.3f}")
    what = f"What one gradient step on {matrix} would write, layer by token: " + (
        "the word it promotes most" if matrix in ("W_out", "W_O") else "the word it stamps in"
    )
    return Group(line, answer, Text(), Text(what))


def _blocks(widths: list[int], room: int) -> list[list[int]]:
    """Columns in groups that fit the room, at least one to a group."""
    blocks: list[list[int]] = [[]]
    used = 0
    for pos, width in enumerate(widths):
        if blocks[-1] and used + width + 3 > room:
            blocks.append([])
            used = 0
        blocks[-1].append(pos)
        used += width + 3
    return blocks


def _token(lens: BackwardLens, pos: int) -> Text:
    return Text(visible(lens.tokens[pos]), Style(bold=True, underline=pos in lens.subject))


def _cell(word: str, share: float) -> Text:
    if not word:  # a zero gradient writes nothing
        return Text("·", "dim")
    back = shade(share)
    return Text(f" {word} ", Style(color=css(ink(back)), bgcolor=css(back)))


def _legend(top: float, matrix: str) -> Text:
    line = Text("Shade: norm of delta, 0 ", "dim")
    for step in range(9):
        line.append("  ", Style(bgcolor=css(shade(step / 8))))
    line.append(f" {top:.3g}.  · = no gradient here", "dim")
    return line
