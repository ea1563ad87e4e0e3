"""A change of weights in words: text for a terminal, a fragment for Jupyter, a page, figures."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (pandas and matplotlib leave some of their functions untyped.)

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from bwlens.model.sites import MATRICES
from bwlens.show.colors import css, ink, shade, themed
from bwlens.show.drawing import COLUMN, SCALE, axes, few, label, literal, scale_bar
from bwlens.show.sheet import definitions, document, grid, svg
from bwlens.show.words import exact, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bwlens.changes.lens import ChangeLens

_STYLE = """
.bwc mark{border-radius:4px;padding:.05rem .35rem;margin:.1rem .15rem .1rem 0;display:inline-block}
.bwc .dim{opacity:.62}.bwc td{vertical-align:top}.bwc table{border-collapse:collapse}
.bwc td,.bwc th{padding:.15rem .6rem;text-align:left}
.bwc td.number,.bwc th.number{text-align:right}
"""
_SCRIPT = """
<script>(()=>{const box=document.getElementById('find'),rows=[...document.querySelectorAll(
'#directions tbody tr')],n=document.getElementById('count');const look=()=>{const w=box.value
.toLowerCase();let k=0;for(const r of rows){const s=r.textContent.toLowerCase().includes(w);
r.hidden=!s;k+=s}n.textContent=k+' of '+rows.length};box.addEventListener('input',look);look()})()
</script>
"""
_LEGEND = (
    ("direction", "A singular vector pair of one matrix' change: where the input goes along one"
     " side, the other is added to the output."),
    ("answers to", "The input side in words: what sets the direction off."),
    ("promotes, suppresses", "Both ends of the output side. A change is added, so the most probable"
     " words are those promoted."),
    ("nats", "How far a word stands out of the vocabulary beyond what the best of as many random"
     " numbers would, summed over directions, each weighed by its size. Chance: the first word of a"
     " change of the same singular values in random directions."),
    ("p", "Share of random directions of that matrix that are at least as legible."),
    ("writes", "What a direction adds to its matrix' output on the prompts, RMS over tokens."),
    ("effect", "The next words of the prompts with the change and without, measured: the divergence"
     " in nats, and the words that make most of it."),
)  # fmt: skip
_MOST = 400  # Rows of a page's table of directions; `to_frame` has all.


def text(lens: ChangeLens) -> str:
    """A summary for a terminal."""
    lines = [_heading(lens)]
    for which, said in _SIDES:
        table = lens._table(which, 10, None)  # pyright: ignore[reportPrivateUsage]
        words = [visible(word) for word in table["word"][table["nats"] > table["chance"]]]
        lines.append(f"{said}: {', '.join(words) or 'nothing beyond chance'}")
    if lens.effect is not None:
        raised = ", ".join(map(visible, lens.effect_words()))
        lines.append(
            f"raises after {len(lens.effect.prompts)} prompts: {raised}"
            f" ({lens.effect.divergence:.3g} nats; a random change {lens.effect.random:.3g})"
        )
    lines += [f"note: {remark}" for remark in lens.remarks]
    return "\n".join(lines)


_SIDES = (
    ("promoted", "mostly writes"),
    ("suppressed", "writes away from"),
    ("answers_to", "answers to"),
)


def _heading(lens: ChangeLens) -> str:
    matrices = [m for m in MATRICES if any(site.matrix == m for site in lens.norms)]
    norm = math.sqrt(sum(n**2 for n in lens.norms.values()))
    layers = lens.layers
    first, last = min(layers), max(layers)
    where = f"layers {first}-{last}" if first < last else f"layer {first}"
    return (
        f"A change of {lens.model}: {', '.join(matrices)} of {where}; norm {norm:.3g},"
        f" {len(lens.sites)} directions, read by {lens.reading}"
    )


def fragment(lens: ChangeLens) -> str:
    """What Jupyter shows: the summary by side and layer, without scripts."""
    return f'<div class="bwc"><style>{_STYLE}</style>{_summary(lens)}{_by_layer(lens)}</div>'


def page(lens: ChangeLens) -> str:
    """One page to send to somebody: words, layers, effect, every direction with a search."""
    figures = "".join(
        f'<figure class="sheet">{svg(figure(lens, kind, None))}<figcaption>{caption}</figcaption>'
        "</figure>"
        for kind, caption in (
            ("words", "The first words that each layer writes, shaded by nats beyond chance."),
            ("norms", "How much of the change lies where: Frobenius norms."),
        )
    )
    remarks = "".join(f"<p>{escape(remark)}</p>" for remark in lens.remarks)
    return document(
        "A change of weights in words",
        f'<div class="bwc"><h1>{escape(_heading(lens))}</h1>{remarks}{_summary(lens)}'
        f"<h2>By layer</h2>{_by_layer(lens)}{_effects(lens)}"
        f'<h2>Figures</h2><div class="figures">{figures}</div>'
        f"<h2>Directions</h2>{_directions(lens)}"
        f"<h2>How to read it</h2>{definitions(_LEGEND)}</div>{_SCRIPT}",
        _STYLE,
    )


def _summary(lens: ChangeLens) -> str:
    rows = []
    for which, said in _SIDES:
        table = lens._table(which, 12, None)  # pyright: ignore[reportPrivateUsage]
        first = max([*table["nats"], 1e-9])
        marks = "".join(
            _mark(word, nats / first, f"{nats:.3g} nats", nats <= chance)
            for word, nats, chance in zip(
                table["word"], table["nats"], table["chance"], strict=True
            )
        )
        chance = f"{table['chance'].max():.3g}" if len(table) else "0"
        top = f"{table['nats'].max():.3g}" if len(table) else "0"
        rows.append(
            f"<tr><th>{said}</th><td>{marks or 'nothing beyond chance'}</td>"
            f'<td class="number">{top}</td><td class="number">{chance}</td></tr>'
        )
    if lens.effect is not None:
        marks = "".join(_mark(word, 0.3, "", False) for word in lens.effect_words())
        rows.append(
            f"<tr><th>raises (measured)</th><td>{marks}</td>"
            f'<td class="number">{lens.effect.divergence:.3g}</td>'
            f'<td class="number">{lens.effect.random:.3g}</td></tr>'
        )
    return grid(("", "words", "nats", "chance"), rows, numbers=(2, 3))


def _mark(word: str, value: float, title: str, dim: bool) -> str:
    share = min(value, 1.0) * 0.8
    style = themed(shade(share), shade(share, dark=True))
    kind = ' class="dim"' if dim else ""
    return f'<mark{kind} style="{style}" title="{escape(title)}">{escape(exact(word))}</mark>'


def _by_layer(lens: ChangeLens) -> str:
    frame = lens.by_layer(6)
    top = frame["norm"].max()
    rows = [
        f'<tr><td class="number">{row["layer"]}</td>'
        f'<td class="number">{_shaded(row["norm"], top)}</td>'
        f"{''.join(f'<td>{_listed(row[which])}</td>' for which, _ in _SIDES)}</tr>"
        for row in reversed(frame.to_dict("records"))
    ]
    heads = ("layer", "norm", *(said for _, said in _SIDES))
    return grid(heads, rows, numbers=(0, 1))


def _shaded(value: float, top: float) -> str:
    style = themed(shade(value / top), shade(value / top, dark=True))
    return f'<mark style="{style}">{value:.3g}</mark>'


def _listed(words: Iterable[str]) -> str:
    return ", ".join(escape(exact(word)) for word in words)


def _effects(lens: ChangeLens) -> str:
    if lens.effect is None:
        return ""
    rows = [
        f"<tr><td>{escape(row['prompt'])}</td><td>{escape(exact(row['before']))}</td>"
        f"<td>{escape(exact(row['after']))}</td>"
        f'<td class="number">{row["divergence"]:.3g}</td></tr>'
        for row in lens.effects().to_dict("records")
    ]
    lowered = _listed(lens.effect_words("lowered"))
    heads = ("prompt", "next word before", "after", "nats")
    return (
        f"<h2>What it does</h2>{grid(heads, rows, numbers=(3,))}"
        f"<p>Lowered most: {lowered}. A random change of the same singular values moves the next"
        f" words by {lens.effect.random:.3g} nats.</p>"
    )


def _directions(lens: ChangeLens) -> str:
    frame = lens.to_frame()
    rows = []
    for row in frame.head(_MOST).to_dict("records"):
        numbers = (f"{row['size']:.3g}", f"{row['share']:.0%}", f"{row['writes']:.3g}")
        cells = "".join(f'<td class="number">{n}</td>' for n in numbers)
        words = "".join(
            f"<td{_faint(row[p])}>{_listed(row[side][:6])}</td>"
            for side, p in (
                ("answers_to", "chance_x"), ("promotes", "chance_delta"),
                ("suppresses", "chance_delta"),
            )
        )  # fmt: skip
        chances = "".join(f'<td class="number">{_p(row[p])}</td>' for p in _P)
        rows.append(
            f'<tr><td class="number">{row["layer"]}</td><td>{row["matrix"]}</td>{cells}{words}'
            f"{chances}</tr>"
        )
    more = f"<p>The first {_MOST} of {len(frame)}.</p>" if len(frame) > _MOST else ""
    heads = (
        "layer", "matrix", "size", "share", "writes", "answers to", "promotes", "suppresses",
        "p (answers to)", "p (writes)",
    )  # fmt: skip
    search = (
        '<p><label>Find a word, a matrix: <input id="find" type="search"></label>'
        ' <span id="count"></span></p>'
    )
    return f"{search}{grid(heads, rows, numbers=(0, 2, 3, 4, 8, 9), name='directions')}{more}"


_P = ("chance_x", "chance_delta")


def _faint(p: float) -> str:
    return ' class="dim"' if not p <= 0.05 else ""


def _p(p: float) -> str:
    return "" if p != p else f"{p:.2g}"


def figure(lens: ChangeLens, kind: Literal["norms", "words"] | str, ax: Any = None) -> Figure:
    """Norms by layer and matrix, or the first words that each layer writes.

    Raises:
        ValueError: Another kind.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.colors import Normalize

    if kind not in ("norms", "words"):
        raise ValueError(f"there is no figure {kind!r}; there are 'norms' and 'words'")
    layers = lens.layers
    height = 0.9 + 0.17 * len(layers)
    with mpl.rc_context({"font.size": 7}):
        drawn, ax = axes(ax, (COLUMN * (1 if kind == "norms" else 1.4), height))
        if kind == "norms":
            names = [m for m in MATRICES if any(site.matrix == m for site in lens.norms)]
            values = np.zeros((len(layers), len(names)))
            for site, norm in lens.norms.items():
                values[layers.index(site.layer), names.index(site.matrix)] += norm**2
            values = np.sqrt(values)
            ax.set_xticks(range(len(names)), names)
        else:
            tables = [lens.promoted(4, layer=layer) for layer in layers]
            tables = [table[table["nats"] > table["chance"]] for table in tables]
            values = np.zeros((len(layers), 4))
            for row, table in enumerate(tables):
                values[row, : len(table)] = table["nats"]
            ax.set_xticks(range(4), ["first word", "second", "third", "fourth"])
        norm = Normalize(0, float(values.max()) or 1.0)
        ax.imshow(values, cmap=SCALE, norm=norm, aspect="auto", origin="lower")
        if kind == "words":
            for row, table in enumerate(tables):  # pyright: ignore[reportPossiblyUnboundVariable]
                for column, word in enumerate(table["word"]):
                    color = css(ink(shade(float(norm(values[row, column])))))
                    said = label(visible(word))
                    style = {"ha": "center", "va": "center", "fontsize": 6, "color": color}
                    literal(ax.text(column, row, said, **style))
        ax.set_yticks(*few(layers, 10))
        ax.set_ylabel("layer")
        unit = "Frobenius norm" if kind == "norms" else "nats beyond chance"
        scale_bar(drawn, ax, norm, unit)
    return drawn
