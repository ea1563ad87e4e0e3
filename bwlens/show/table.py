"""The lens as a piece of HTML: a table of layers by tokens, the words in it, norms as shade."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from bwlens.show.colors import css, ink, shade
from bwlens.show.words import visible

if TYPE_CHECKING:
    from bwlens.lens import BackwardLens


def table(lens: BackwardLens) -> str:
    """The lens as one self-contained HTML element."""
    return "".join(f"<h3>{matrix}</h3>{_matrix_table(lens, matrix)}" for matrix in lens.matrices)


def page(lens: BackwardLens) -> str:
    """The lens as a whole HTML page."""
    title = escape(f"{lens.prompt} → {lens.target}")
    answer = escape(visible(lens.answer))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{title}</title><style>"
        "body{font:15px system-ui;margin:2em;color-scheme:light dark}"
        "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 6px;text-align:left}"
        "</style>"
        f"<h2>{title}</h2><p>The model's answer before: <b>{answer}</b>"
        f" (p = {lens.answer_probability:.3f}); loss {lens.loss:.3f}.</p>{table(lens)}</html>"
    )


def _matrix_table(lens: BackwardLens, matrix: str) -> str:
    norms = lens.norms(matrix)
    top = float(norms.max()) or 1.0
    heads = "".join(f"<th scope=col>{escape(visible(token))}</th>" for token in lens.tokens)
    rows = []
    promoted = lens.words("promoted", matrix)
    for at in reversed(range(len(lens.layers))):
        cells = []
        for pos, words in enumerate(promoted[at]):
            back = shade(float(norms[at, pos]) / top)
            style = f"background:{css(back)};color:{css(ink(back))}" if words else ""
            tip = escape(f"norm {float(norms[at, pos]):.4g}: " + ", ".join(map(visible, words)))
            word = escape(visible(words[0])) if words else ""
            cells.append(f'<td style="{style}" title="{tip}">{word}</td>')
        rows.append(f"<tr><th scope=row>{lens.layers[at]}</th>{''.join(cells)}</tr>")
    return f"<table><tr><th>layer</th>{heads}</tr>{''.join(rows)}</table>"
