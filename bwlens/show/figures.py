"""Static figures of a lens for papers (matplotlib): a lens, perhaps an `ax`, in; a `Figure` out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from bwlens.show import drawing
from bwlens.show.colors import css, ink, shade
from bwlens.show.drawing import COLUMN, LINES, SCALE, STYLES, TARGET, drawable
from bwlens.show.words import quoted, target_words, visible

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens


def table(
    lens: BackwardLens,
    matrix: str = "W_out",
    which: Literal["promoted", "suppressed"] = "promoted",
    ax: Axes | None = None,
    width: float = COLUMN,
) -> Figure:
    """The paper's table: layers by tokens, the first word of each cell, delta's norm as shade.

    Cells that say the target (the first of its tokens) have a frame; cells without gradient are
    left empty. The target stands above, in quotation marks: `" Paris"` and `"Paris"` differ.

    Source: Backward Lens, figures 4 and 11-15.
    """
    words = lens.words(which, matrix)
    norms = lens.norms(matrix).double().numpy()
    n_layers, n_pos = norms.shape
    figure, ax = drawing.axes(ax, (width, max(1.0, 0.17 * n_layers + 0.75)))
    top = norms.max() or 1.0
    target = lens.target_tokens[0] if lens.target_tokens else None
    texts = []
    for at in range(n_layers):
        for pos in range(n_pos):
            if not words[at][pos]:
                continue
            back = shade(norms[at, pos] / top)
            ax.add_patch(Rectangle((pos - 0.5, at - 0.5), 1, 1, color=css(back), lw=0))
            word = drawable(visible(words[at][pos][0]))
            style: dict[str, Any] = {
                "color": css(ink(back)),
                "ha": "center",
                "va": "center_baseline",
            }
            text = ax.text(pos, at, word, fontsize=6, parse_math=False, clip_on=True, **style)
            texts.append(text)
            if words[at][pos][0] == target:
                box = (pos - 0.47, at - 0.45), 0.94, 0.9
                ax.add_patch(Rectangle(*box, fill=False, lw=1.0, edgecolor=TARGET))
    if lens.target:
        above = ax.set_title(drawing.label(f"→ {target_words(lens)}", 40), fontsize=7, loc="right")
        above.set_parse_math(False)
    ax.set(xlim=(-0.5, n_pos - 0.5), ylim=(-0.5, n_layers - 0.5), ylabel="layer")
    _tokens_below(ax, lens)
    ax.set_yticks(*drawing.few(lens.layers, 12))
    drawing.plain(ax)
    for side in ax.spines.values():
        side.set_visible(False)
    drawing.scale_bar(figure, ax, top, f"norm of $\\delta$, {matrix}")
    _fit(figure, ax, texts, n_pos)
    return figure


def norms(
    lens: BackwardLens,
    matrix: str = "W_out",
    of: Literal["x", "delta"] = "delta",
    ax: Axes | None = None,
    width: float = COLUMN,
) -> Figure:
    """L2 norms of delta (or x) by layer and token.

    Source: Backward Lens, figures 5 and 16-17.
    """
    values = lens.norms(matrix, of).double().numpy()
    figure, ax = drawing.axes(ax, (width, 2.2))
    ax.imshow(values, origin="lower", aspect="auto", cmap=SCALE, vmin=0, vmax=values.max() or 1.0)
    _tokens_below(ax, lens)
    ax.set_yticks(*drawing.few(lens.layers))
    ax.set_ylabel("layer")
    drawing.plain(ax)
    name = "\\delta" if of == "delta" else "x"
    drawing.scale_bar(figure, ax, values.max() or 1.0, f"norm of ${name}$, {matrix}")
    return figure


def change(
    lens: BackwardLens,
    values: Any,
    name: str,
    ax: Axes | None = None,
    width: float = COLUMN,
) -> Figure:
    """Signed changes [layer, pos] of a lens' cells, brown below zero and teal above.

    The middle is zero; nan is left empty. `Comparison.figure` draws it.
    """
    values = np.asarray(values, float)
    top = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    figure, ax = drawing.axes(ax, (width, 2.2))
    style = {"origin": "lower", "aspect": "auto", "cmap": drawing.SIGNED}
    ax.imshow(values, vmin=-top, vmax=top, **style)
    _tokens_below(ax, lens, values.shape[1])
    ax.set_yticks(*drawing.few(lens.layers))
    ax.set_ylabel("layer")
    drawing.plain(ax)
    drawing.scale_bar(figure, ax, top, name, low=-top, cmap=drawing.SIGNED)
    return figure


def target_ranks(
    lens: BackwardLens, matrix: str = "W_out", ax: Axes | None = None, width: float = COLUMN
) -> Figure:
    """Rank of the target's first token in each cell's reading by layer, a line for each token.

    In delta of W_out a rank near the bottom means that the cell's reading promotes the target:
    at the top of many models, not in every layer. Cells without gradient are left out.

    Source: Backward Lens, figures 6 and 18.
    """
    ranks = lens.target_ranks(matrix).double().numpy()
    target = quoted(lens.target_tokens[0])
    ranks = np.where(ranks < 0, np.nan, ranks)
    figure, ax = drawing.axes(ax, (width, 2.3))
    for pos, token in enumerate(lens.tokens):
        last = pos == lens.n_prompt - 1
        ax.plot(
            lens.layers,
            ranks[:, pos],
            color="black" if last else LINES[pos % len(LINES)],
            linestyle="-" if last else STYLES[pos // len(LINES) % len(STYLES)],
            linewidth=1.6 if last else 0.9,
            marker="o",
            markersize=2.2,
            label=drawing.label(f"{pos} {visible(token)}"),
            zorder=3 if last else 2,
        )
    ax.set(xlabel="layer", ylabel=f"rank of {drawing.label(target, 24)}, {matrix}")
    ax.yaxis.label.set_parse_math(False)
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
        values = np.concatenate([part.singular_values().numpy() for part in parts])
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


def _tokens_below(ax: Axes, lens: BackwardLens, n_pos: int | None = None) -> None:
    labels = [drawing.label(visible(token)) for token in lens.tokens[:n_pos]]
    long = sum(map(len, labels)) > 42 or len(labels) > 8
    ax.set_xticks(
        range(len(labels)), labels, rotation=60 if long else 0, ha="right" if long else "center"
    )
    for pos, label in enumerate(ax.get_xticklabels()):
        label.set_parse_math(False)
        if long:
            label.set_rotation_mode("anchor")
        if pos in lens.subject:
            label.set_fontweight("bold")


def _fit(figure: Figure, ax: Axes, texts: list[Any], n_pos: int) -> None:
    """Shrink each word to its cell (to 4 pt), then shorten what is still too wide."""
    figure.draw_without_rendering()
    room = ax.get_window_extent().width / n_pos * 0.92
    for text in texts:
        taken = text.get_window_extent().width
        if taken > room:
            text.set_fontsize(max(4.0, 6.0 * room / taken))
        while text.get_window_extent().width > room and len(text.get_text()) > 2:
            text.set_text(text.get_text().rstrip("…")[:-1] + "…")
