"""Pictures of a store: the rows that give an answer, their cumulative share, one neuron's page.

Of a `Neurons`' public attributes; colours and pages are those of every picture here.
"""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from bwlens.show import drawing
from bwlens.show.colors import painted
from bwlens.show.sheet import document, svg
from bwlens.show.words import quoted, spaced, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = 6
"""Layers that have a line of their own: those that give most."""

_STYLE = (
    "border-spacing:2px;border-collapse:separate;font:12px/1.35 system-ui,sans-serif;"
    "font-variant-numeric:tabular-nums"
)


def table(found: Any, columns: int = 8) -> str:
    """Layers by rows, the largest shares first: the word that each raises most, share as shade.

    Teal gives the answer's logit, brown takes from it. It needs no style sheet and no script; a
    cell's title has its neuron, weight, share, and words at both ends.
    """
    top = max((abs(row.share) for row in found.rows), default=0.0) or 1.0
    lines = []
    for (layer, expert), rows in groupby(found.rows, lambda row: (row.neuron[0], row.neuron[2])):
        name = f"{layer}" if expert is None else f"{layer}, expert {expert}"
        given = float(found.mlps[found.layers.index(layer)])
        cells = "".join(_cell(row, found, top) for row in list(rows)[:columns])
        lines.append(
            f'<tr><th scope="row" style="text-align:right;font-weight:600">{escape(name)}</th>'
            f'<td style="text-align:right;padding-right:.6em">{given:+.2f}</td>{cells}</tr>'
        )
    heads = "".join(f"<th>{n + 1}</th>" for n in range(columns))
    return (
        f'<div class="bw-neurons" style="overflow-x:auto">'
        f'<p style="margin:.3em 0">'
        f"<b>{escape(visible(found.prompt, trim=False))} → {escape(quoted(found.target))}</b>, p"
        f" {found.probability:.2f}. Its logit is {found.logit:.2f} above the mean of all words;"
        f" feed-forward parts give {float(found.mlps.sum()):.2f} of it. A cell is a row of W_out:"
        f" the word that it raises most, as it is weighted; teal gives to the answer's logit, brown"
        f' takes.</p><table style="{_STYLE}"><thead><tr><th>layer</th><th>gives</th>{heads}</tr>'
        f"</thead><tbody>{''.join(reversed(lines))}</tbody></table></div>"
    )


def _cell(row: Any, found: Any, top: float) -> str:
    word = row.promoted[0] if row.promoted else ""
    says = [f"neuron {row.neuron}", f"weight {row.weight:.3g}, share {row.share:+.3f}"]
    says += [f"{100 * row.share / found.logit:.1f} % of the logit, log p {row.log_prob:+.3f}"]
    says += [f"raises {' '.join(map(spaced, row.promoted))}"]
    says += [f"lowers {' '.join(map(spaced, row.suppressed))}"]
    mark = ";outline:2px solid #c9400a;outline-offset:-2px" if word == found.target else ""
    return (
        f'<td title="{escape(chr(10).join(says))}" style="{painted(row.share / top)};'
        f'padding:.1em .5em;text-align:center{mark}">'
        f"{escape(visible(word)) if word else ''}"
        f'<br><span style="font-size:10px">{row.share:+.2f}</span></td>'
    )


def cumulative_figure(found: Any, layers: Any = None) -> Figure:
    """Left: what the first m neurons give, layer by layer; right: what each layer gives in all.

    Black: all stores together. Dashed: neurons drawn at random, whose sum is m times the mean.
    """
    figure = drawing.Drawing(figsize=(6.6, 2.5), layout="constrained")
    ax, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    chosen = found.layers if layers is None else found.resolve_layers(layers)
    strong = sorted(chosen, key=lambda layer: -abs(float(found.mlps[found.layers.index(layer)])))
    for number, layer in enumerate(sorted(strong[:_LINES])):
        curve = found.cumulative(layer)
        ax.semilogx(
            np.arange(1, len(curve) + 1), curve, drawing.line_style(number), lw=1,
            color=drawing.line_color(number), label=f"layer {layer}",
        )  # fmt: skip
    curve = found.cumulative(list(chosen))
    m = np.arange(1, len(curve) + 1)
    ax.semilogx(m, curve, color=drawing.line_color(0, "last"), lw=1.6, label="all together")
    ax.semilogx(m, curve[-1] * m / len(m), ":", color="#888", lw=1, label="at random")
    ax.axhline(found.logit, color=drawing.TARGET, lw=0.8)
    ax.annotate(
        "the logit", (len(curve), found.logit), xytext=(-2, 2), textcoords="offset points",
        fontsize=6, color=drawing.TARGET, ha="right",
    )  # fmt: skip
    ax.set(xlabel="neurons, the largest share first", ylabel="share of the logit")
    given = [float(found.mlps[found.layers.index(layer)]) for layer in chosen]
    colors = [drawing.LINES[2] if value >= 0 else drawing.LINES[1] for value in given]
    bars.bar(list(chosen), given, color=colors)
    bars.axhline(0, color="#888", lw=0.5)
    bars.set(xlabel="layer", ylabel="the layer's share")
    bars.xaxis.set_major_locator(MaxNLocator(integer=True))
    for one in (ax, bars):
        drawing.plain(one)
    ax.legend(fontsize=5, frameon=False)
    title = drawing.label(f"{found.prompt} → {quoted(found.target)}", 70)
    drawing.literal(figure.suptitle(title, fontsize=7))
    return figure


def page(found: Any) -> str:
    """A `Neurons` as a page."""
    title = f"{found.prompt} → {quoted(found.target)}"
    agreement = found.agreement().to_html(index=False, float_format="%.2f", na_rep="")
    return document(
        title,
        f"<h1>Which rows give the answer</h1>{table(found)}<h2>How many it takes</h2>"
        f'<div class="sheet">{svg(found.figure())}</div>'
        "<h2>And are they the rows that a step would move?</h2>"
        "<p>r: rank correlation of the size of a row's share with how far a gradient step moves it;"
        " control: the same with gains dealt out anew, what strong weights alone make alike.</p>"
        f'<div class="scroll">{agreement}</div>',
    )


def neuron(one: Any) -> str:
    """A `NeuronPage` as an element: words at both ends, and where it is strongest."""
    ends = "".join(
        f"<p><b>{name}</b> {escape(' · '.join(map(spaced, words)))}</p>"
        for name, words in (("raises", one.promoted), ("lowers", one.suppressed))
    )
    top = max((abs(context.weight) for context in one.contexts), default=0.0) or 1.0
    lines = "".join(
        f'<tr><td style="text-align:right">{context.weight:.3g}</td><td>{_marked(context, top)}'
        f"</td></tr>"
        for context in one.contexts
    )
    return (
        f'<div class="bw-neuron">'
        f"<h3>neuron {escape(str(one.neuron))}</h3>{ends}"
        f"<p>Where its weight is largest, of {one.n_tokens} tokens:</p>"
        f'<table style="{_STYLE}">{lines}</table></div>'
    )


def _marked(context: Any, top: float) -> str:
    """The context, its strongest token marked."""
    before, token, after = (
        escape("".join(spaced(t) for t in part))
        for part in (context.before, [context.token], context.after)
    )
    style = painted(context.weight / top)
    return f'{before}<mark style="{style}">{token}</mark>{after}'


def neuron_page(one: Any) -> str:
    """The same as a page."""
    return document(f"neuron {one.neuron}", neuron(one))


def ablation_figure(summary: Any, sets: Any, prompts: Any) -> Figure:
    """What is lost without n neurons, a panel for each kind of prompt, a line for each choice."""
    shown = [name for name in prompts if name in set(summary["prompt"])]
    rows = [summary[summary["prompt"] == name] for name in shown]
    figure, every = drawing.panels(
        summary, shown, rows, "neurons", sets, "change of log p", x="size", size=(2.4, 2.0),
        share_y=True,
    )  # fmt: skip
    for ax in every:
        ax.set_xscale("log")
        ax.axhline(0, color="#888", lw=0.5)
    return figure
