"""Pictures of heads: a table of layers and heads, their maps in it, and figures for papers.

Takes what `bwlens.reversed_attention` and `bwlens.head_scores` give; no script is needed.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from bwlens.show.colors import shade, signed, themed
from bwlens.show.sheet import document
from bwlens.show.words import quoted, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bwlens.attention.maps import ReversedAttention
    from bwlens.attention.scores import HeadScores
    from bwlens.show.circuits import OfflineHTML

_STYLE = """
.bwlens-heads{font:13px system-ui,sans-serif}
.bwlens-heads .both{position:relative;display:inline-block;min-height:190px;padding-right:280px}
.bwlens-heads table{border-collapse:separate;border-spacing:2px;width:auto}
.bwlens-heads th{font-weight:400;padding:0 4px;text-align:right;border:0}
.bwlens-heads td{width:2.6em;height:1.5em;padding:0;text-align:center;border:0;font-size:11px}
.bwlens-heads td:focus,.bwlens-heads td:hover{outline:2px solid light-dark(#c9400a,#ffa94d)}
.bwlens-heads .pop{display:none;position:absolute;right:0;top:4px;width:250px;padding:8px;
background:#fff;color:#111;border:1px solid #999;border-radius:6px;text-align:left}
@media(max-width:700px){.bwlens-heads .both{padding:0 0 200px}
.bwlens-heads .pop{right:auto;left:0;top:auto;bottom:0}}
.bwlens-heads td:hover .pop,.bwlens-heads td:focus .pop{display:block}
.bwlens-heads .pop img{width:110px;height:110px;image-rendering:pixelated;margin-right:6px;
border:1px solid #ccc}
"""


class HeadTable:
    """Layers by heads, coloured by a score; hovering (or tabbing to) a cell shows its two maps."""

    def __init__(
        self, cells: dict[tuple[int, int], float], name: str, pops: dict[Any, str]
    ) -> None:
        self._cells, self._name, self._pops = cells, name, pops

    def _repr_html_(self) -> str:
        high = max(self._cells.values(), default=1.0) or 1.0
        layers = sorted({layer for layer, _ in self._cells}, reverse=True)
        heads = sorted({head for _, head in self._cells})
        rows = [
            f"<tr><th>{layer}</th>"
            + "".join(self._cell((layer, head), high) for head in heads)
            + "</tr>"
            for layer in layers
        ]
        foot = "".join(f"<th>{head}</th>" for head in heads)
        return (
            f'<div class="bwlens-heads"><style>{_STYLE}</style><p>{escape(self._name)}, layer by'
            f' head; in hundredths of the largest, {high:.3g}</p><div class="both"><table>'
            f"{''.join(rows)}<tr><th></th>{foot}</tr></table></div></div>"
        )

    def _cell(self, place: tuple[int, int], high: float) -> str:
        if place not in self._cells:
            return "<td></td>"
        value = self._cells[place]
        style = themed(shade(value / high), shade(value / high, dark=True))
        title = f"L{place[0]} H{place[1]}: {value:.3g}"
        pop = f'<div class="pop">{title}<br>{self._pops.get(place, "")}</div>'
        return f'<td tabindex="0" style="{style}">{100 * value / high:.0f}{pop}</td>'

    def page(self, title: str = "bwlens: heads") -> str:
        """A page of its own, that loads nothing."""
        return document(title, self._repr_html_())


def head_table(found: ReversedAttention | HeadScores, score: Any = "reversed") -> HeadTable:
    """The layer x head picture of a score; of one prompt's maps, with both maps in small.

    Args:
        found: What `reversed_attention` or `head_scores` gave.
        score: "reversed", "forward" or, of scores, "warm".
    """
    pops: dict[tuple[int, int], str] = {}
    if hasattr(found, "map"):
        maps: Any = found
        places = [(layer, head) for layer, heads in maps.heads.items() for head in heads]
        cells = {p: float(maps.map(*p, kind=score).norm()) for p in places}
        high = max(float(maps.map(*p).abs().max()) for p in places) or 1.0
        tokens = maps.tokens[0]
        for place in places:
            r, a = (maps.map(*place, kind=kind) for kind in ("reversed", "forward"))
            query, key = divmod(int(r.abs().argmax()), len(r))
            pops[place] = (
                f"{_image(r / high, True)}{_image(a, False)}<br>reversed, forward; largest R"
                f" {float(r[query, key]):.2g}, from {escape(quoted(tokens[query]))} to"
                f" {escape(quoted(tokens[key]))}"
            )
    else:
        scores: Any = found
        means = scores.mean(score)
        cells = {
            (layer, head): float(means[i, j])
            for i, layer in enumerate(scores.layers)
            for j, head in enumerate(scores.heads)
        }
    return HeadTable(cells, f"norm of the {score} map", pops)


def head_maps(maps: ReversedAttention, *, top_k: int = 4, prompt: int = 0) -> OfflineHTML:
    """The strongest heads' two maps in circuitsvis, R above A, the strongest first."""
    import torch

    from bwlens.show.circuits import attention_maps, together

    places = maps.strongest(top_k)
    drawn: list[Any] = []
    kinds: tuple[tuple[Any, str], ...] = (("reversed", "Reversed"), ("forward", "Forward"))
    for kind, title in kinds:
        several = torch.stack([maps.map(*p, kind=kind, prompt=prompt) for p in places])
        labels = [f"L{layer} H{head}" for layer, head in places]
        drawn += [f"<h4>{title}</h4>", attention_maps(maps.tokens[prompt], several, labels)]
    return together(drawn)


def head_scores_figure(scores: HeadScores, score: Any = "reversed") -> Figure:
    """Layers by heads as a figure, for papers."""
    from matplotlib.colors import Normalize

    from bwlens.show.drawing import SCALE, axes, few, plain, scale_bar

    means = scores.mean(score).float().cpu().numpy()
    figure, ax = axes(None, (0.16 * means.shape[1] + 1.3, 0.11 * means.shape[0] + 0.7))
    norm = Normalize(0, float(means.max()) or 1.0)
    ax.imshow(means, origin="lower", aspect="auto", cmap=SCALE, norm=norm)
    ax.set_xticks(range(len(scores.heads)), [str(head) for head in scores.heads])
    ax.set_yticks(*few(scores.layers, 10))
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    plain(ax)
    scale_bar(figure, ax, norm, f"norm of the {score} map")
    return figure


def head_maps_figure(
    maps: ReversedAttention, heads: Sequence[tuple[int, int]] | int = 3, *, prompt: int = 0
) -> Figure:
    """R and A of heads, a column for each, one symmetric scale for all R."""
    from bwlens.show.drawing import Drawing, label, literal, plain

    places = maps.strongest(heads) if isinstance(heads, int) else list(heads)
    figure = Drawing(figsize=(1.7 * len(places) + 0.4, 3.6), layout="constrained")
    grid = figure.subplots(2, len(places), squeeze=False)
    both = [[maps.map(*p, kind=k, prompt=prompt).float().cpu().numpy() for p in places]
            for k in ("reversed", "forward")]  # fmt: skip
    high = max(float(np.abs(r).max()) for r in both[0]) or 1.0
    names = [label(visible(token)) for token in maps.tokens[prompt]]
    for row, several in enumerate(both):
        for ax, values, (layer, head) in zip(grid[row], several, places, strict=True):
            low = -high if row == 0 else 0.0
            ax.imshow(values, cmap="BrBG" if row == 0 else "Blues", vmin=low, vmax=-low or 1.0)
            ax.set_title(f"L{layer} H{head}, {'R' if row == 0 else 'A'}", fontsize=6)
            ax.set_xticks(range(len(names)), names, rotation=90)
            ax.set_yticks(range(len(names)), names if ax is grid[row][0] else [])
            literal(*ax.get_xticklabels(), *ax.get_yticklabels())
            plain(ax)
            ax.tick_params(labelsize=4)
    return figure


def _image(values: Any, with_sign: bool) -> str:
    """A map in small: teal is positive, brown negative, or shades of blue."""
    from matplotlib.image import imsave

    color = signed if with_sign else shade
    pixels = [[color(value) for value in row] for row in values.float().cpu().tolist()]
    out = io.BytesIO()
    imsave(out, np.array(pixels, dtype=np.uint8), format="png")
    return f'<img alt="" src="data:image/png;base64,{b64encode(out.getvalue()).decode()}">'
