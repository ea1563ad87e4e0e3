"""The trust of each layer beside its row: a narrow strip, a sentence on it, pale words below.

The strip's shade is r with the measured effect over likely words, none at 0 and full at 1. Norms
are exact in every layer; it is words that are pale where they say little.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from bwlens.reading.trust import FLOOR, Trust
from bwlens.show.words import quoted

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

PALE = f"words of a layer that say little: r below {FLOOR}, or not above a control's"


def key(lens: BackwardLens) -> str:
    """What the strip says; it was measured at one token, and speaks of the others less surely."""
    return (
        "how far a layer's words are what a step does: r with the measured effect at"
        f" {quoted(lens.tokens[lens.trust.position])} over the 1,000 likeliest words, none at 0,"
        " full at 1"
    )


def trust_of(lens: BackwardLens, matrix: str) -> Trust | None:
    """The trust that speaks of a matrix' words, if it was measured."""
    return lens.trust if lens.has_trust and lens.trust.matrix == matrix else None


def strip(lens: BackwardLens, matrix: str, at: int) -> str:
    """The strip of one layer, for the row's heading; hidden beside the words of another matrix."""
    if not lens.has_trust:
        return ""
    trust = lens.trust
    r, hidden = share(trust, at), "" if trust.matrix == matrix else "visibility:hidden;"
    style = (
        f"{hidden}"
        "display:inline-block;width:8px;height:14px;margin-left:6px;vertical-align:-2px;"
        f"background:rgba(118,118,118,{r:.2f});border:1px solid #767676;box-sizing:border-box"
    )
    said = escape(trust.sentence(at))
    return f'<i class="bw-trust" role="img" aria-label="{said}" title="{said}" style="{style}"></i>'


def share(trust: Trust, at: int) -> float:
    """How deep the strip is shaded, 0 to 1."""
    r = float(trust.plausible[at])
    return min(max(r, 0.0), 1.0) if r == r else 0.0


def pale(trust: Trust | None, at: int) -> bool:
    """Whether the words of a layer say little, or nobody knows."""
    return trust is not None and trust.verdict(at) in ("none", "unknown")


def packed(lens: BackwardLens) -> dict[str, Any]:
    """What the table's script needs of it."""
    trust = lens.trust
    layers = range(len(trust.layers))
    return {
        "matrix": trust.matrix,
        "r": [round(share(trust, at), 3) for at in layers],
        "says": [trust.sentence(at) for at in layers],
        "pale": [pale(trust, at) for at in layers],
        "key": key(lens),
        "why": PALE,
    }


def short(trust: Trust, at: int) -> str:
    """One layer for a narrow column: ".48 some"."""
    r = float(trust.plausible[at])
    return f"{r:.2f} {trust.verdict(at)}".replace("0.", ".", 1) if r == r else "unknown"


def section(lens: BackwardLens) -> str:
    """The report's table of trust; nothing where it was not measured."""
    if not lens.has_trust:
        return ""
    trust = lens.trust
    heads = ("layer", "likely words", "all words", "random", "other prompt", "promoted 20", "")
    parts = (
        trust.plausible, trust.vocabulary, trust.random, trust.other, trust.promoted
    )  # fmt: skip
    rows = "".join(
        f"<tr><th>{layer}</th>{''.join(f'<td>{part[at]:.2f}</td>' for part in parts)}"
        f"<td>{trust.verdict(at)}</td></tr>"
        for at, layer in reversed(list(enumerate(trust.layers)))
    )
    return (
        f"<h2>How far to trust the words of {escape(trust.matrix)}</h2><p>Correlation of the"
        f" {escape(trust.reading)} reading with the measured effect of a step at position"
        f" {trust.position}, and of two controls over likely words: a random vector, and another"
        f" prompt's delta. “none”: below {FLOOR} or a control's. “Promoted 20”: the share of the 20"
        " words promoted most that the step does raise most. The loss fell by"
        f" {trust.fall.nan_to_num(1).min():.3f} to {trust.fall.nan_to_num(1).max():.3f} of what"
        " delta says.</p>"
        '<table class="trust" style="border-spacing:14px 1px;text-align:right;'
        'font-variant-numeric:tabular-nums">'
        f"<thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead>{rows}</table>"
    )
