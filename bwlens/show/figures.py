"""Static figures of a lens for papers (matplotlib): a lens, perhaps an `ax`, in; a `Figure` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from bwlens.show import drawing, picking
from bwlens.show.colors import css, ink, limit, shade
from bwlens.show.drawing import COLUMN, LINES, SCALE, STYLES, TARGET, drawable
from bwlens.show.words import headings, quoted, target_words, visible

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens


def table(
    lens: BackwardLens,
    matrix: str = "W_out",
    which: Literal["promoted", "suppressed"] = "promoted",
    ax: Axes | None = None,
    width: float = COLUMN,
    *,
    positions: Any = None,
    layers: Any = None,
    cmap: Any = SCALE,
    title: str | None = None,
    log: bool = False,
    vmax: float | None = None,
) -> Figure:
    """The paper's table: layers by tokens, the first word of each cell, delta's norm as shade.

    Cells that say the target (the first of its tokens) have a frame; cells without gradient are
    left empty. The target stands above, in quotation marks: `" Paris"` and `"Paris"` differ.

    Args:
        lens: The lens.
        matrix: Which matrix.
        which: The words promoted or suppressed.
        ax: Axes to draw into; a new figure otherwise.
        width: In inches.
        positions: As for `backward_lens`; None for all or, where their words would not fit, for
            those of the subject, the first, the last and the strongest: the axis says so.
        layers: One, several or a slice; None for all.
        cmap: Colours of matplotlib.
        title: Stands above in place of the target.
        log: Shade by the logarithm.
        vmax: The norm of the deepest shade; by default the largest, or where that dwarfs the rest
            the largest of the rest (`colors.limit`): norms beyond it are underlined.

    Source: Backward Lens, figures 4 and 11-15.
    """
    rows, columns = _chosen(lens, matrix, positions, layers, max(6, int((width - 0.7) / 0.34)))
    values = lens.norms(matrix).double().cpu().numpy()
    norm, beyond = _norm(values, log, vmax)
    low, top = norm.vmin or 0.0, norm.vmax or 1.0
    words = lens.words(which, matrix)
    figure, ax = drawing.axes(ax, (width, max(1.0, 0.17 * len(rows) + 0.75)))
    colors = mpl.colormaps[cmap] if isinstance(cmap, str) else cmap
    target = lens.target_tokens[0] if lens.target_tokens else None
    texts = []
    for y, at in enumerate(rows):
        for x, pos in enumerate(columns):
            if not words[at][pos]:
                continue
            back = colors(float(norm(max(values[at, pos], low))))[:3]
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=back, lw=0))
            red, green, blue = (round(255 * part) for part in back)
            style: dict[str, Any] = {
                "color": css(ink((red, green, blue))),
                "ha": "center",
                "va": "center_baseline",
            }
            word = drawable(visible(words[at][pos][0]))
            size = drawing.points(6.0)
            texts.append(ax.text(x, y, word, fontsize=size, clip_on=True, **style))
            drawing.literal(texts[-1])
            if values[at, pos] > top * 1.0001:
                ax.plot([x - 0.4, x + 0.4], [y - 0.38] * 2, color=style["color"], lw=0.8)
            if words[at][pos][0] == target:
                box = (x - 0.47, y - 0.45), 0.94, 0.9
                ax.add_patch(Rectangle(*box, fill=False, lw=1.0, edgecolor=TARGET))
    if lens.target or title:
        above = title or drawing.label(f"\u200e→ {target_words(lens)}", 40)
        place = "center" if title else "right"
        drawing.literal(ax.set_title(above, fontsize=drawing.points(7.0), loc=place))
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(rows) - 0.5), ylabel="layer")
    _tokens_below(ax, lens, columns, dict(enumerate(columns)), positions)
    ax.set_yticks(*drawing.few([lens.layers[at] for at in rows], 12))
    drawing.plain(ax)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    drawing.scale_bar(figure, ax, norm, f"norm of $\\delta$, {matrix}{beyond}", cmap=cmap)
    _fit(figure, ax, texts, len(columns))
    return figure


def norms(
    lens: BackwardLens,
    matrix: str = "W_out",
    of: Literal["x", "delta"] = "delta",
    ax: Axes | None = None,
    width: float = COLUMN,
    *,
    positions: Any = None,
    layers: Any = None,
    cmap: Any = SCALE,
    title: str | None = None,
    log: bool = False,
    vmax: float | None = None,
) -> Figure:
    """L2 norms of delta (or x) by layer and token; options as for `table`.

    Source: Backward Lens, figures 5 and 16-17.
    """
    rows, columns = _chosen(lens, matrix, positions, layers, len(lens.tokens))
    values = lens.norms(matrix, of).double().cpu().numpy()
    norm, beyond = _norm(values, log, vmax)
    figure, ax = drawing.axes(ax, (width, 2.2))
    shown = values[np.ix_(rows, columns)]
    shown = np.where(shown > 0, shown, np.nan) if log else shown
    ax.imshow(shown, origin="lower", aspect="auto", cmap=cmap, norm=norm)
    _tokens_below(ax, lens, columns, _named(lens, columns, width), positions)
    ax.set_yticks(*drawing.few([lens.layers[at] for at in rows]))
    ax.set_ylabel("layer")
    drawing.plain(ax)
    ax.grid(False)
    if title:
        drawing.literal(ax.set_title(title, fontsize=drawing.points(7.0)))
    name = "\\delta" if of == "delta" else "x"
    drawing.scale_bar(figure, ax, norm, f"norm of ${name}$, {matrix}{beyond}", cmap=cmap)
    return figure


def change(
    lens: BackwardLens,
    values: Any,
    name: str,
    ax: Axes | None = None,
    width: float = COLUMN,
    *,
    positions: Sequence[int] | None = None,
) -> Figure:
    """Signed changes [layer, column] of a lens' cells, brown below zero and teal above.

    The middle is zero; nan is left empty; columns are those of `positions`, None for the first
    ones. `Comparison.figure` draws it.
    """
    values = np.asarray(values, float)
    top = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    figure, ax = drawing.axes(ax, (width, 2.2))
    style = {"origin": "lower", "aspect": "auto", "cmap": drawing.SIGNED}
    ax.imshow(values, vmin=-top, vmax=top, **style)
    columns = list(range(values.shape[1]) if positions is None else positions)
    _tokens_below(ax, lens, columns, _named(lens, columns, width), columns)
    ax.set_yticks(*drawing.few(lens.layers))
    ax.set_ylabel("layer")
    drawing.plain(ax)
    ax.grid(False)
    drawing.scale_bar(figure, ax, Normalize(-top, top), name, cmap=drawing.SIGNED)
    return figure


def target_ranks(
    lens: BackwardLens,
    matrix: str = "W_out",
    ax: Axes | None = None,
    width: float = COLUMN,
    *,
    positions: Any = None,
) -> Figure:
    """Rank of the target's first token in each cell's reading by layer, a line for each token.

    In delta of W_out a rank near the bottom means that the cell's reading promotes the target:
    at the top of many models, not in every layer. Cells without gradient are left out. Of more than
    ten tokens, lines are drawn for those that `table` would choose, unless `positions` are named.

    Source: Backward Lens, figures 6 and 18.
    """
    ranks = lens.target_ranks(matrix).double().cpu().numpy()
    target = quoted(lens.target_tokens[0])
    ranks = np.where(ranks < 0, np.nan, ranks)
    figure, ax = drawing.axes(ax, (width, 2.3))
    _, columns = _chosen(lens, matrix, positions, None, 10)
    names = headings(lens)
    for pos in columns:
        last = pos == lens.n_prompt - 1
        ax.plot(
            lens.layers,
            ranks[:, pos],
            color=mpl.rcParams["text.color"] if last else LINES[pos % len(LINES)],
            linestyle="-" if last else STYLES[pos // len(LINES) % len(STYLES)],
            linewidth=1.6 if last else 0.9,
            marker="o",
            markersize=2.2,
            label=drawing.label(f"{pos} {visible(names[pos])}"),
            zorder=3 if last else 2,
        )
    some = "" if len(columns) == len(lens.tokens) else _some(lens, columns, positions)
    ax.set(xlabel=f"layer{some}", ylabel=f"rank of {drawing.label(target, 24)}, {matrix}")
    drawing.literal(ax.yaxis.label)
    # The rank's own order: the most probable word stands at the top.
    ax.set_ylim(lens.d_vocab * 1.04, -lens.d_vocab * 0.04)
    ax.set_xticks([int(layer) for layer in drawing.few(lens.layers)[1]])
    drawing.plain(ax)
    drawing.legend(ax)
    return figure


def spectrum(
    lens: BackwardLens, matrix: str = "W_out", ax: Axes | None = None, width: float = COLUMN
) -> Figure:
    """Singular values of each layer's gradient, relative to the largest; ranks in the legend.

    In a mixture those of all experts' matrices together: of a gradient with them as its blocks.

    Source: Backward Lens, Lemma 4.1 and figure 3.
    """
    figure, ax = drawing.axes(ax, (width, 2.3))
    n_layers = len(lens.layers)
    for at, layer in enumerate(lens.layers):
        parts = lens.gradients_of(matrix, layer).values()
        values = np.concatenate([part.singular_values().cpu().numpy() for part in parts])
        values = np.sort(values)[::-1]
        kept = values[values > 1e-9 * values.max()] if len(values) and values.max() > 0 else []
        if not len(kept):
            continue
        ax.semilogy(
            range(1, len(kept) + 1),
            kept / kept[0],
            color=css(shade(0.25 + 0.75 * at / max(1, n_layers - 1))),
            marker="o",
            markersize=2.5,
            linewidth=1,
            label=f"{layer} (rank {sum(part.rank() for part in parts)})",
        )
    ax.set(xlabel=f"singular value of {matrix}'s gradient", ylabel="relative to the largest")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawing.plain(ax)
    drawing.legend(ax, title="layer")
    return figure


def _chosen(
    lens: BackwardLens, matrix: str, positions: Any, layers: Any, most: int
) -> tuple[list[int], list[int]]:
    """Places of the layers and positions to draw."""
    from bwlens.lens.reading import resolve_positions

    rows = [lens.layers.index(layer) for layer in lens.resolve_layers(layers)]
    n_pos = len(lens.tokens)
    columns = resolve_positions(positions, n_pos, lens.subject, lens.n_prompt - 1)
    if columns is None:
        columns = range(n_pos) if n_pos <= most else picking.columns(lens, matrix, most)
    return rows, list(columns)


def _named(lens: BackwardLens, columns: Sequence[int], width: float) -> dict[int, int]:
    """Which columns have a name, place to position: all, or of many those that say most."""
    room = int(width / 0.12)
    if len(columns) <= room:
        return dict(enumerate(columns))
    apart, named = len(columns) / room, dict[int, int]()
    wanted = {*picking.columns(lens, lens.matrices[-1], room // 2)}
    for place, pos in reversed(list(enumerate(columns))):
        if pos in wanted and all(other - place >= apart for other in named):
            named[place] = pos
    return dict(reversed(named.items()))


def _some(lens: BackwardLens, columns: Sequence[int], positions: Any) -> str:
    which = "" if positions is not None else ": subject, first, last, strongest"
    return f"\n{len(columns)} of {len(lens.tokens)} tokens{which}"


def _norm(values: Any, log: bool, vmax: float | None) -> tuple[Normalize, str]:
    """The scale of norms, and what is said of norms beyond it."""
    high = float(values.max())
    top = vmax or (high if log else limit(values)) or 1.0
    alive = values[values > 0]
    beyond = "" if high <= top * 1.0001 else f" (up to {high:.3g})"
    if log and len(alive):
        return LogNorm(max(float(alive.min()), top / 1e4), top, clip=True), beyond
    return Normalize(0.0, top, clip=True), beyond


def _tokens_below(
    ax: Axes, lens: BackwardLens, columns: Sequence[int], named: dict[int, int], positions: Any
) -> None:
    """Names of the columns at `named`, place to position; how many are drawn, if not all."""
    tokens = headings(lens)
    labels = [drawing.label(visible(tokens[pos])) for pos in named.values()]
    room = ax.get_window_extent().width / ax.figure.dpi / max(1, len(columns))
    widest = max((drawing.length(label, drawing.points(6.0)) for label in labels), default=0)
    long = len(labels) > 8 or widest > room
    places = {"rotation": 60 if long else 0, "ha": "right" if long else "center"}
    ax.set_xticks(list(named), labels, **places)
    for pos, label in zip(named.values(), ax.get_xticklabels(), strict=True):
        drawing.literal(label)
        if long:
            label.set_rotation_mode("anchor")
        if pos in lens.subject:
            label.set_fontweight("bold")
    if len(columns) < len(lens.tokens):
        ax.set_xlabel(_some(lens, columns, positions).strip(), fontsize=drawing.points(6.0))


def _fit(figure: Figure, ax: Axes, texts: list[Any], n_pos: int) -> None:
    """Shrink each word to its cell (to 4 pt), then shorten what is still too wide."""
    dpi = figure.get_dpi()
    figure.set_dpi(600)  # at a screen's few dots letters are narrower than in print
    figure.draw_without_rendering()
    room = ax.get_window_extent().width / n_pos * 0.92
    fitted: dict[str, tuple[float, str]] = {}  # few words are many cells
    for text in texts:
        word = text.get_text()
        if word not in fitted:
            if (taken := text.get_window_extent().width) > room:
                text.set_fontsize(max(4.0, text.get_fontsize() * room / taken))
            if (taken := text.get_window_extent().width) > room:
                keep = max(1, int(len(word) * room / taken))
                text.set_text(word[:keep] + "…")
                while text.get_window_extent().width > room and keep > 1:
                    keep -= 1
                    text.set_text(word[:keep] + "…")
            fitted[word] = text.get_fontsize(), text.get_text()
        text.set_fontsize(fitted[word][0])
        text.set_text(fitted[word][1])
    figure.set_dpi(dpi)
