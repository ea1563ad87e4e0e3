"""The lens as a piece of HTML: a table of layers by tokens, the words in it, norms as shade.

A plain table with inline colours stands by itself where a viewer strips styles and scripts; where
they run, the script takes it over and adds switches, legend and the panel of words. Tokens are
data: escaped here, set as text in the script. A page with several takes `assets()` once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwlens.show import picking, trusting
from bwlens.show.colors import CHANGES, STEPS, TARGET, changes, css, ink, limit, scale, themed
from bwlens.show.pack import compressed, pack
from bwlens.show.picking import DRAWN
from bwlens.show.sheet import document
from bwlens.show.words import (
    about,
    exact,
    headings,
    probability_of,
    prompt_pieces,
    quoted,
    target_words,
)

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

FORMAT = 5
"""Of the data that the script reads; a page may hold outputs of several versions."""

_SPECIAL = re.compile("[&<>\"'$\\\\]").search

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# Read on white and on black with a contrast of 4.5.
_PLAIN = "color:#767676"

_ROOM = "padding-inline:6px"

_INK = {(0, 0, 0): "#000", (255, 255, 255): "#fff"}

# The target's name where no style sheet holds: on white and on black.
_MARK = "#d2500f"

FOLDED = 300
"""Letters of a prompt from which on it folds."""

_PARTS = ("_data", "_grid", "_picture", "_panel", "_tools", "_overview", "")

# Typesetters of formulas skip elements of these classes.
_UNTYPESET = "tex2jax_ignore mathjax_ignore"


def table(lens: BackwardLens) -> str:
    """The lens as one self-contained HTML element, script included."""
    return widget(lens) + assets()


def widget(lens: BackwardLens) -> str:
    """The lens as an HTML element for a page that has `assets()` elsewhere."""
    return element([part(lens)], pack(lens))


@cache
def assets() -> str:
    """The style and the script of all tables of a page, once; more copies do no harm."""
    return f"<style>{_style()}</style>{_script()}"


def page(*lenses: BackwardLens) -> str:
    """Lenses as a whole HTML page."""
    return tables(titled(lenses[0]), "".join(map(widget, lenses)))


def titled(lens: BackwardLens) -> str:
    """A page's title: the prompt, the target, the model and the reading."""
    prompt = "".join(text for text, _ in prompt_pieces(lens))
    target = f" → {target_words(lens)}" if lens.target else ""
    return " · ".join((prompt + target, *about(lens)[:2]))


def tables(title: str, widgets: str) -> str:
    """The page around widgets, as wide as the window."""
    return document(
        title,
        # Where scripts run, the plain table need not be drawn first.
        "<script>document.documentElement.dataset.scripts=''</script>"
        f"<main>{widgets}</main>{_script()}",
        "body{max-width:none;margin:24px;padding:0}.bwlens+.bwlens{margin-top:40px}"
        f"[data-scripts] .bwlens:not([data-live]) table{{display:none}}{_style()}",
    )


def element(parts: Sequence[str], *packed: dict[str, Any]) -> str:
    """The element that the script takes over: static parts and the data of their lenses."""
    return (
        f'<div class="bwlens {_UNTYPESET}" dir="ltr" data-format="{FORMAT}">{"".join(parts)}'
        f'<script type="application/gzip">{compressed(packed)}</script></div>'
    )


def first_matrix(matrices: Sequence[str]) -> str:
    """The matrix that is shown first: W_out if there is one, as in the paper."""
    return "W_out" if "W_out" in matrices else matrices[0]


def part(
    lens: BackwardLens,
    name: str = "",
    matrix: str | None = None,
    positions: Sequence[int] | None = None,
    top: float | None = None,
    marked: frozenset[tuple[int, int]] = frozenset(),
) -> str:
    """Heading and plain table of one lens.

    Beside another it has a `name`, `marked` cells (layer index, position), the columns at
    `positions` and the norm `top` of the deepest shade in common.
    """
    matrix = matrix or first_matrix(lens.matrices)
    norms = lens.norms(matrix)
    every = list(range(norms.shape[1]) if positions is None else positions)
    columns, norms_drawn = every, norms[:, every]
    if len(every) > DRAWN:
        chosen = picking.columns(lens, matrix)
        columns = [pos for pos in every if pos in chosen]
    top = top or limit(norms_drawn)
    ids = lens.side("promoted", matrix)[0][..., 0].tolist()
    doubtful = lens.readout(matrix).eps_regime.tolist()
    styles = [f"background:{css(c)};color:{_INK[ink(c)]};{_ROOM}" for c in scale()]
    say = {i: _html(exact(lens.vocabulary[i])) for i in {i for row in ids for i in row} if i >= 0}
    target = lens.target_ids[0] if lens.target_ids else None
    trust = trusting.trust_of(lens, matrix)
    strips = f" Strip: {trusting.key(lens)}. Pale: {trusting.PALE}." if trust else ""
    rows = []
    for at, row in reversed(list(enumerate(norms.tolist()))):
        cells = []
        for pos in columns:
            best, norm = ids[at][pos], row[pos]
            if best < 0:
                cells.append(f'<td style="{_PLAIN};{_ROOM}">·')
                continue
            style, named = styles[round(min(norm / top, 1.0) * (STEPS - 1))], ""
            if norm > top:
                style += ";text-decoration:overline"
            if doubtful[at][pos]:
                style += ";font-style:italic"
            if best == target:
                style += f";border:2px solid {TARGET[0]};font-weight:700"
                named = f' aria-label="{say[best]}, the target"'
            if (at, pos) in marked:
                style += ";border-left:4px solid #d6336c"
            # Thousands of cells: quotes and end tags that HTML does not need are left out.
            style = f'"{style}"' if " " in style else style
            cells.append(f"<td style={style}{named}>{say[best]}")
        strip = trusting.strip(lens, matrix, at)
        rows.append(
            f"<tr{' style=opacity:.6' if trusting.pale(trust, at) else ''}>"
            f'<th scope="row" style="{_PLAIN};{_ROOM}">{lens.layers[at]}{strip}</th>'
            f"{''.join(cells)}</tr>"
        )
    beyond = "; beyond it overlined" if bool((norms_drawn > top).any()) else ""
    some = "" if len(columns) == norms.shape[1] else f" {len(columns)} of {norms.shape[1]} tokens."
    # Hosts that strip the style sheet keep what is written here: room between words, a scroll.
    return (
        f'<section class="bw-part">{_heading(lens, name)}'
        f'<p class="bw-caption">{_caption(lens, matrix)}{some}</p>'
        '<div style="overflow-x:auto"><table dir="ltr" style="border-collapse:separate;'
        'border-spacing:2px;white-space:nowrap;width:auto"><thead><tr><th scope="col">layer</th>'
        f"{_tokens(lens, columns)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="bw-note">Shade: norm of delta, from 0 to {top:.3g}{beyond}. Framed:'
        f" {_html(probability_of(lens)) if lens.target else 'the target'}."
        " · no gradient here, or not read. ␣ begins a word. Slanted: a vector so short that the"
        f" final norm's epsilon outweighs it.{_html(strips)}</p>"
        f'<p class="bw-about">{" · ".join(map(_html, about(lens)))}</p></section>'
    )


def _heading(lens: BackwardLens, name: str) -> str:
    pieces = prompt_pieces(lens)
    prompt = "".join(f"<u>{_html(text)}</u>" if own else _html(text) for text, own in pieces)
    size = sum(len(text) for text, _ in pieces)
    says = f"The model says <b>{_html(quoted(lens.answer))}</b>"
    facts = [f"{says}, p = {_number(lens.answer_probability)}"]
    target = ""
    if lens.target:
        words = _html(target_words(lens))
        target = f' → <b class="bw-target" style="color:{_MARK}">{words}</b>'
    if lens.target_probability is not None:
        facts.append(f"{_html(probability_of(lens))} has p = {_number(lens.target_probability)}")
    facts.append(f"{lens.loss_is} {_number(lens.loss)}")
    title = f'<p class="bw-name">{_html(name)}</p>' if name else ""
    line = f"<bdi>{prompt}</bdi>{target}"
    if size > FOLDED:  # a long prompt folds to its ends
        text = "".join(text for text, _ in pieces)
        ends = f"<bdi>{_html(text[:80])}</bdi> … <bdi>{_html(text[-160:])}</bdi>{target}"
        line = f"<details><summary>{ends}</summary>{line}</details>"
    long = " bw-long" if size > 160 else ""
    return (
        f'<div class="bw-head">{title}<div class="bw-prompt{long}">{line}</div>'
        f'<p class="bw-facts">{"; ".join(facts)}.</p></div>'
    )


def _tokens(lens: BackwardLens, columns: Sequence[int]) -> str:
    heads, names = [], headings(lens)
    for pos in columns:
        text = _html(names[pos].lstrip(" "))
        text = f"<u>{text}</u>" if pos in lens.subject else text
        heads.append(f'<th scope="col" style="{_ROOM}">{text}</th>')
    return "".join(heads)


def _caption(lens: BackwardLens, matrix: str) -> str:
    if lens.through(matrix) == "effect":
        return f"The word that one gradient step on {matrix} raises most, measured, layer by token."
    what = "promotes most" if lens.through(matrix) == "delta" else "stamps in most"
    return f"The word that one gradient step on {matrix} {what}, layer by token."


def _number(value: float) -> str:
    """A number of three digits; powers of ten as such, in one piece."""
    mantissa, _, power = f"{value:.3g}".partition("e")
    return mantissa + (f"×10{str(int(power)).translate(_RAISED)}" if power else "")


def _html(text: str) -> str:
    """Text as HTML in which no typesetter finds a formula: its delimiters stand apart."""
    if not _SPECIAL(text):
        return text
    return re.sub(r"[$\\]", r"<span>\g<0></span>", escape(text))


def _style() -> str:
    """The style sheet, with a rule for each shade and the ink on it, on light and dark pages."""
    rules = [f"--target:light-dark({TARGET[0]},{TARGET[1]});"]
    for name, shades in (("s", scale), ("d", changes)):
        for step, (light, dark) in enumerate(zip(shades(), shades(dark=True), strict=True)):
            rules.append(f".{name}{step}{{{themed(light, dark)}}}")
    return f"{_asset('_table.css')}:is(.bwlens, #bwlens){{{''.join(rules)}}}"


def _script() -> str:
    """The script, its parts in one scope of their own."""
    parts = "".join(map(_asset, [f"_table{name}.js" for name in _PARTS]))
    start = f'(() => {{\n"use strict";\nconst FORMAT = {FORMAT};\nconst STEPS = {STEPS};\n'
    start += f"const CHANGES = {CHANGES};\nconst DRAWN = {DRAWN};\n"
    return f"<script>{start}{parts}}})();</script>"


def _asset(name: str) -> str:
    """A file without indentation and lines of comment: each output of a notebook has a copy.

    No literal of these files spans lines, so that nothing else changes.
    """
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return re.sub(r"(?m)^ *//.*\n|^ +", "", text)
