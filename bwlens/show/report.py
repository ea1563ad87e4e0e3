"""A lens as one page to send to somebody: the table, details, figures, how to read it, settings."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Literal

from bwlens.show import circuits
from bwlens.show.heads import head_maps_figure, head_table
from bwlens.show.sheet import definitions, document, grid, svg
from bwlens.show.table import first_matrix, table, titled
from bwlens.show.trusting import section
from bwlens.show.words import model_name, visible

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

_LEGEND = """
<dl>
<dt>imprint</dt><dd>The x of W_in, read from its <em>most</em> probable words: the context that
the step stamps in. It is what this layer's neurons will answer to from now on.</dd>
<dt>shift</dt><dd>The delta of W_out, read from its <em>least</em> probable words. A descent step
<em>subtracts</em> the gradient, so these are the words that it promotes; the most probable ones are
suppressed.</dd>
<dt>how far to trust it</dt><dd>The reading takes delta straight to the vocabulary, and leaves out
the layers above. It is best near the top: low in a deep model its words say little of what the step
does. At the very top they are what it does, which need not be the target: in some models (SmolLM2)
a step on the last layer raises other words more.</dd>
<dt>other readings</dt><dd><em>dual</em> and <em>cosine</em> undo the unembedding rather than
apply it again: what the step asks for. <em>effect</em> is no reading of delta: a small step on the
cell was taken, and the words are those whose log-probability rose most (weighed by how likely they
were, where the settings name a temper). The settings below name the reading of this page.</dd>
<dt>the target</dt><dd>It is taken as written: “ Paris” and “Paris” are other tokens. Of a target
of several tokens, the probability, ranks and marks are those of the first one, and the loss is the
mean (or sum) over all, as the heading says.</dd>
<dt>shade</dt><dd>The norm of delta: how hard the step pushes in this layer, at this token. Among
experts, the root of the sum of their squares for W_in and W_gate.</dd>
<dt>empty cell</dt><dd>Delta is zero there: in the last layer only the positions that the loss reads
have a gradient.</dd>
<dt>mark of doubt</dt><dd>The vector is short beside the epsilon of the final norm, so that the
lens may read the norm's bias instead of it.</dd>
</dl>
"""

_FIGURES: tuple[tuple[Literal["norms", "target_ranks", "spectrum"], str], ...] = (
    ("norms", "How hard the step pushes: the norm of delta by layer and token."),
    (
        "target_ranks",
        "Where the target's first token stands in each reading; delta's bottom is promoted most.",
    ),
    ("spectrum", "Singular values of each layer's gradient: its rank is at most its tokens."),
)


def report(lens: BackwardLens) -> str:
    """The whole page."""
    matrix = first_matrix(lens.matrices)
    settings = [(name, str(value)) for name, value in lens.settings.items()]
    settings = [(name, model_name(lens) if name == "model" else value) for name, value in settings]
    return document(
        titled(lens),
        "<h1>What one gradient step would write</h1>"
        f"{table(lens)}{section(lens)}{_heads(lens)}"
        f"<h2>How to read it</h2>{_LEGEND}"
        f"<h2>Figures</h2>{_figures(lens, matrix)}"
        f"<h2>Parts of the prompt, {matrix}</h2>{_segments(lens, matrix)}"
        "<h3>Norm of delta over the prompt</h3>"
        f"{circuits.token_norms(lens, matrix, layers=_strongest(lens, matrix)).local_src}"
        f"<h2>To make this again</h2>{definitions(settings, 'small', code=True)}",
    )


def _strongest(lens: BackwardLens, matrix: str) -> list[int]:
    """Up to six layers: those with the largest norms, from the first on."""
    order = lens.norms(matrix).amax(1).argsort(descending=True)[:6].tolist()
    return [lens.layers[at] for at in sorted(order)]


def _heads(lens: BackwardLens) -> str:
    """Where the step asks other attention of heads, where the lens holds it."""
    if not lens.settings.get("attention"):
        return ""
    return (
        f"<h2>Heads</h2><p>R is the gradient of a head's scores: a step attends more where it is"
        f" negative. Hover over a head for its two maps; the strongest are below.</p>"
        f"{head_table(lens.attention)._repr_html_()}"
        f'<figure class="sheet">{svg(head_maps_figure(lens.attention, 4))}'
        f"<figcaption>R of the heads with the largest norm, and A, the forward map.</figcaption>"
        f"</figure>"
    )


def _segments(lens: BackwardLens, matrix: str) -> str:
    """How strong each part of the prompt is: the subject, its neighbours, the last token."""
    norms = lens.norms(matrix)
    first, last = min(lens.subject, default=0), lens.n_prompt - 1
    parts = {
        "before the subject": [p for p in range(first) if lens.subject],
        "the subject": [*lens.subject],
        "after the subject": [p for p in range(last) if p > first and p not in lens.subject],
        "the last token": [last],
        "the target's own tokens": [*range(lens.n_prompt, len(lens.tokens))],
    }
    rows = []
    for name, where in parts.items():
        if not where:
            continue
        part = norms[:, where]
        layer, pos = divmod(int(part.argmax()), len(where))
        token = escape(visible(lens.tokens[where[pos]]))
        cells = (
            name, len(where), f"{part.mean():.3g}", f"{part.max():.3g}",
            f"layer {lens.layers[layer]}, “{token}”",
        )  # fmt: skip
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return grid(("part", "tokens", "mean norm", "largest", "where"), rows)


def _figures(lens: BackwardLens, matrix: str) -> str:
    drawn = [
        f'<figure class="sheet">{svg(lens.figure(kind, matrix))}'
        f"<figcaption>{caption}</figcaption></figure>"
        for kind, caption in _FIGURES
        if kind != "target_ranks" or lens.target
    ]
    return f'<div class="figures">{"".join(drawn)}</div>'
