"""What every static figure shares: sizes (in inches), colours, plain axes, text as text.

Text is never set as mathematics, and characters that the font lacks are written by their code
rather than as empty boxes.
"""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from bwlens.show.colors import shade, signed

if TYPE_CHECKING:
    import pandas as pd

COLUMN = 3.3
"""Width of one column of a two-column page, in inches."""

SCALE = LinearSegmentedColormap.from_list(
    "bwlens", np.array([shade(step / 64) for step in range(65)]) / 255
)
"""The sequential colours of every picture of bwlens."""

SIGNED = LinearSegmentedColormap.from_list(
    "bwlens_signed", np.array([signed(step / 32 - 1) for step in range(65)]) / 255
)
"""The colours of signed changes."""

LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Colours of the Okabe-Ito set, which colour-blind readers can tell apart."""

TARGET = "#d55e00"
"""The mark of the target."""

STYLES = ("-", "--", "-.", ":")
"""Line styles, for more lines than there are colours."""


@cache
def _charmap(family: str) -> Mapping[Any, Any]:
    return get_font(findfont(FontProperties(family=[family]))).get_charmap()


@cache
def _font_with(character: str) -> str | None:
    """An installed font that has a character; one warning for each kind of letter that none has."""
    for entry in fontManager.ttflist:
        try:
            if "last resort" in entry.name.lower():  # which has a box for every character
                continue
            if ord(character) in get_font(entry.fname).get_charmap():
                return entry.name
        except (OSError, RuntimeError, ValueError):
            continue
    kind = unicodedata.name(character, "UNKNOWN").split(" ")[0]
    _warn_of(kind)
    return None


@cache
def _warn_of(kind: str) -> None:
    warnings.warn(
        f"no installed font has the characters of {kind}: figures write them by their codes;"
        " install one (such as Noto) and make the figure again",
        stacklevel=2,
    )


def families(text: str) -> list[str]:
    """The fonts to draw a text with: those set, then installed ones that have what those lack."""
    usual = list(mpl.rcParams["font.family"])
    lacking = {c for c in text if not any(ord(c) in _charmap(name) for name in usual)}
    return [*usual, *sorted({font for c in lacking if (font := _font_with(c))})]


def drawable(text: str) -> str:
    """The text, with characters that no installed font has written by their code, as <65E5>."""
    charmaps = [_charmap(family) for family in families(text)]
    return "".join(
        c if any(ord(c) in charmap for charmap in charmaps) else f"<{ord(c):X}>" for c in text
    )


def points(size: float) -> float:
    """A size of type, of 10 in ordinary text, beside what rcParams say of that."""
    return size * mpl.rcParams["font.size"] / 10


class Drawing(Figure):
    """A figure that shows itself in a notebook, whether or not pyplot was ever imported."""

    def savefig(self, *args: Any, **options: Any) -> None:
        """As matplotlib's, with text as text: TrueType in PDF, letters in SVG."""
        text: dict[Any, Any] = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}
        with mpl.rc_context(text):
            super().savefig(*args, **options)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=220)
        width, height = (round(110 * inches) for inches in self.get_size_inches())
        return png.getvalue(), {"width": width, "height": height}


def axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """The axes given, or new ones in a figure that no global state keeps."""
    if ax is not None:
        figure = ax.figure
        assert isinstance(figure, Figure)
        return figure, ax
    figure = Drawing(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def label(text: str, longest: int = 16) -> str:
    """The text as a label: drawable, and shortened with an ellipsis."""
    text = drawable(text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def literal(*texts: Text) -> None:
    """Text of models as it stands: no mathematics, and fonts that have its characters."""
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily(families(text.get_text()))


def length(text: str, size: float) -> float:
    """Inches that a text of so many points takes, about."""
    wide = sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.62 for c in text)
    return wide * size / 72


def plain(ax: Axes) -> None:
    """Small type and thin lines, as a column of a paper wants them."""
    ax.tick_params(labelsize=points(6.0), length=2, width=0.5, pad=2)
    for name in (ax.xaxis.label, ax.yaxis.label):
        name.set_fontsize(points(7.0))
    for side in ax.spines.values():
        side.set_linewidth(0.5)


def scale_bar(figure: Figure, ax: Axes, norm: Normalize, name: str, cmap: Any = SCALE) -> None:
    """The colours' scale beside the axes."""
    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=ax, fraction=0.05, pad=0.02, aspect=24)
    bar.ax.tick_params(labelsize=points(5.0), length=1.5, width=0.4, pad=1)
    bar.set_label(name, fontsize=points(6.0))
    for side in bar.ax.spines.values():
        side.set_linewidth(0.4)


def legend(ax: Axes, title: str | None = None) -> None:
    """The lines' names, at the right of the axes."""
    names = ax.legend(
        title=title, fontsize=points(5.0), title_fontsize=points(5.0), frameon=False,
        ncols=1 + (len(ax.get_lines()) > 8),
        loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.4, columnspacing=0.8,
    )  # fmt: skip
    literal(*names.get_texts())


def few(items: Sequence[int], most: int = 8) -> tuple[list[int], list[str]]:
    """Ticks for so many places at most: where they are, and what stands there."""
    step = max(1, len(items) // most)
    return list(range(0, len(items), step)), [str(item) for item in items[::step]]


def panels(
    summary: pd.DataFrame,
    titles: Sequence[str],
    rows: Sequence[Any],
    line: str,
    order: Sequence[str],
    ylabel: str,
    x: str = "layer",
    size: tuple[float, float] = (2.1, 1.75),
    columns: int = 4,
    share_y: bool = False,
    share_x: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Means by layer, one panel for each of `rows`, a line with its interval for each `line`.

    Args:
        summary: All the rows, to give each line one colour throughout.
        titles: What stands above each panel.
        rows: The rows of each panel: columns `x`, `line`, `mean`, `low`, `high`.
        line: The column that makes lines.
        order: The lines' order.
        ylabel: What the first panel of a row says beside it.
        x: The column along the axis.
        size: Of one panel.
        columns: Panels in a row.
        share_y: Whether panels have one scale.
        share_x: Whether panels have one axis below.
    """
    columns = min(columns, len(rows))
    n_rows = -(-len(rows) // columns)
    figure = Drawing(figsize=(size[0] * columns + 1.0, size[1] * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, columns, squeeze=False, sharey=share_y, sharex=share_x)
    lines = [name for name in order if name in set(summary[line])]
    every = list(grid.flat)
    drawn: dict[str, Any] = {}  # panels need not show the same lines
    for at, (ax, title, its_rows) in enumerate(zip(every, titles, rows, strict=False)):
        for number, name in enumerate(lines):
            band = its_rows.query(f"`{line}` == @name").sort_values(x)
            if band.empty:
                continue
            where, mean, low, high = (
                band[column].to_numpy(dtype=float) for column in (x, "mean", "low", "high")
            )
            color, style = line_color(number, name), line_style(number, name)
            (drawn[name],) = ax.plot(
                where, mean, style, color=color, lw=1.1, marker="o", ms=2, label=name
            )
            ax.fill_between(where, low, high, color=color, alpha=0.18, lw=0)
        ax.set_title(title, fontsize=7, pad=3)
        if at % columns == 0:
            ax.set_ylabel(ylabel)
        if at + columns >= len(rows):
            ax.set_xlabel(x)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        ax.margins(y=0.08)
        plain(ax)
    for ax in every[len(rows) :]:
        ax.remove()
    if len(lines) > 1:
        shown = [name for name in lines if name in drawn]
        handles = [drawn[name] for name in shown]
        figure.legend(handles, shown, loc="outside right center", fontsize=6, frameon=False)
    return figure, every[: len(rows)]


def line_color(number: int, name: str = "") -> str:
    """The colour of the n-th line; the last prompt token is black in every figure."""
    return mpl.rcParams["text.color"] if name == "last" else LINES[number % len(LINES)]


def line_style(number: int, name: str = "") -> str:
    """The style of the n-th line: every other one is dashed, so that equal lines both show."""
    if name == "last":
        return "-"
    return STYLES[number % 2 + 2 * (number // len(LINES) % 2)]


def cosine_maps(maps: Mapping[str, tuple[Sequence[int], Any]]) -> Figure:
    """Maps of cosines from -1 to 1, layers by layers, side by side."""
    figure = Drawing(figsize=(2.6 * len(maps) + 0.5, 2.5), layout="constrained")
    grid = list(figure.subplots(1, len(maps), squeeze=False).flat)
    for ax, (title, (layers, values)) in zip(grid, maps.items(), strict=True):
        ax.imshow(values, origin="lower", cmap="RdBu", vmin=-1, vmax=1)
        ax.set_xticks(*few(layers))
        ax.set_yticks(*few(layers))
        ax.set(xlabel="layer", ylabel="layer")
        ax.set_title(title, fontsize=7, pad=3)
        plain(ax)
    scale_bar(figure, grid[-1], Normalize(-1.0, 1.0), "mean cosine", cmap="RdBu")
    return figure
