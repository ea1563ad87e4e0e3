"""A page that can be sent to somebody: one file, light and dark, that loads nothing."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;
background:light-dark(#fff,#14181d);color:light-dark(#1c2128,#e6e9ee)}
h1{font-size:1.3rem;font-weight:600}h2{font-size:1.15rem;margin-top:2.2em}
a{color:light-dark(#0b5cad,#7ab8ff)}
.sheet{background:#fff;color:#111;color-scheme:light;border-radius:8px;padding:.6rem 1rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:1rem}
figure{margin:0}figure svg{width:100%;height:auto}figcaption{font-size:.85rem}
figure.wide .sheet{width:fit-content;max-width:100%;box-sizing:border-box}
figure.wide svg{display:block;width:auto;max-width:100%}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .6rem;text-align:left;border-bottom:1px solid light-dark(#d8dee6,#333b45)}
td.number,th.number{text-align:right}.scroll{overflow-x:auto}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:0}dd{margin:0}
dl.small{font-size:.85rem}dt{color:light-dark(#57606c,#9aa5b4)}dd code{overflow-wrap:anywhere}
"""


def document(title: str, body: str, style: str = "") -> str:
    """The page around a body of HTML, with a style beside that of all pages."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        # The page loads nothing, and lets nothing be loaded.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
        " style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}{style}</style></head><body>{body}</body></html>"
    )


def svg(figure: Figure) -> str:
    """A figure as an SVG element."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    _, tag, rest = drawn.getvalue().partition("<svg")
    return tag + rest


def grid(
    heads: Sequence[str], rows: Iterable[str], numbers: Sequence[int] = (), name: str = ""
) -> str:
    """Rows of HTML under heads, those of the columns `numbers` to the right."""
    kinds = [' class="number"' if at in numbers else "" for at in range(len(heads))]
    top = "".join(f"<th{kind}>{head}</th>" for kind, head in zip(kinds, heads, strict=True))
    return (
        f'<div class="scroll"><table{f" id={name}" if name else ""}><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def definitions(rows: Iterable[tuple[str, str]], kind: str = "", code: bool = False) -> str:
    """Names and what they are, as a list of two columns."""
    inner = "".join(
        f"<dt>{escape(name)}</dt><dd>{f'<code>{escape(v)}</code>' if code else escape(v)}</dd>"
        for name, v in rows
    )
    return f'<dl class="{kind}">{inner}</dl>'
