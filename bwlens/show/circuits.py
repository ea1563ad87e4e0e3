"""Details of a lens in circuitsvis' own widgets, made to work offline.

Four faults of circuitsvis 1.43 are worked around: its notebook output probes the network and then
links a CDN, which leaves a blank cell offline; its container is never closed and swallows what
follows on a page; token text goes in as markup; and numpy scalars raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import torch
from circuitsvis import activations, tokens, topk_samples
from circuitsvis.utils.render import RenderedHTML

from bwlens.show.sheet import document
from bwlens.show.words import visible

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

_RENDER = "CircuitsVis.render("


class OfflineHTML(RenderedHTML):
    """A circuitsvis widget that carries its own script and never asks the network."""

    def __init__(self, rendered: RenderedHTML) -> None:
        # The container comes as <div .../>, which HTML reads as one that is never closed.
        local = rendered.local_src.replace('"/>', '"></div>', 1)
        # Labels are text in a script: none of them may end it.
        script, call, data = local.rpartition(_RENDER)
        data, end, rest = data.rpartition("</script>")
        local = script + call + data.replace("<", "\\u003c") + end + rest
        super().__init__(local, local)

    def _repr_html_(self) -> str:
        return self.local_src

    def parts(self) -> tuple[str, str, str]:
        """The container, the library's script, and the call that draws into the container."""
        container, _, rest = self.local_src.partition("<script")
        script = rest.partition(">")[2].rpartition("</script>")[0]
        library, _, call = script.rpartition(_RENDER)
        return container.strip(), library.strip(), _RENDER + call.strip()


def top_words(
    lens: BackwardLens, layer: int, pos: int, *, matrix: str = "W_out", top_k: int = 10
) -> RenderedHTML:
    """One cell's most promoted (blue) and most suppressed (red) words (`topk_samples`).

    Values are the distances of the scores from the middle of the two ends, so that their signs and
    depths compare.

    Raises:
        ValueError: No such cell, or one without gradient.
    """
    layer = lens.resolve_layer(layer)
    if not -len(lens.tokens) <= pos < len(lens.tokens):
        raise ValueError(f"position {pos} is outside the {len(lens.tokens)} tokens of the prompt")
    at, pos = lens.layers.index(layer), pos % len(lens.tokens)
    words, scores = [], []
    for end in ("promoted", "suppressed"):
        words.append(lens.words(end, matrix)[at][pos][:top_k])
        scores.append(lens.side(end, matrix)[1][at, pos, : len(words[-1])])
    if not words[0]:
        raise ValueError(
            f"{matrix} has no gradient in layer {layer} at position {pos}"
            f" ({lens.tokens[pos]!r}), so there are no words to show"
        )
    high, low = scores if scores[0][0] >= scores[1][0] else scores[::-1]
    middle = (high.min() + low.max()) / 2
    strength = [(end - middle).abs() for end in scores]
    return OfflineHTML(
        topk_samples.topk_samples(
            tokens=[[[_apart(end) for end in words]]],
            activations=[[[strength[0].tolist(), (-strength[1]).tolist()]]],
            zeroth_dimension_name="Layer",
            first_dimension_name="Token",
            zeroth_dimension_labels=[str(layer)],
            first_dimension_labels=[f"{pos}: {visible(lens.tokens[pos])}"],
        )
    )


def token_norms(lens: BackwardLens, matrix: str = "W_out") -> RenderedHTML:
    """Delta's norm over the prompt, layer by layer (circuitsvis' `colored_tokens_multi`)."""
    return OfflineHTML(
        tokens.colored_tokens_multi(
            _running(lens.tokens),
            lens.norms(matrix).T.float().cpu(),
            [f"layer {layer}" for layer in lens.layers],
        )
    )


def moved_neurons(
    lens: BackwardLens,
    matrix: str = "W_out",
    *,
    layers: Sequence[int] | None = None,
    top_k: int = 8,
) -> RenderedHTML:
    """The neurons whose weights the step moves most, and each token's share in that move.

    A neuron is a row of W_out or a column of W_in and W_gate; in a mixture, written as
    expert.neuron. Those are listed whose part of the gradient is longest in each layer; a token's
    value is its own term, `|x_ij| ||delta_i||` for neuron j of W_out, `|delta_ij| ||x_i||` for W_in
    (`text_neuron_activations`).

    Raises:
        ValueError: A matrix without neurons (attention), or one that was not read.
    """
    if matrix not in ("W_in", "W_gate", "W_out"):
        raise ValueError(f"{matrix!r} has no neurons; take W_in, W_gate or W_out")
    lens.readout(matrix)  # says so if it was not read
    columns, labels = [], []
    for layer in lens.layers if layers is None else map(lens.resolve_layer, layers):
        sizes, shares, names = [], [], []
        for expert, gradient in lens.gradients_of(matrix, layer).items():
            x, delta = gradient.x.float(), gradient.delta.float()
            terms, other = (x, delta) if matrix == "W_out" else (delta, x)
            # Squared norm of neuron j's part: sum over pairs of tokens, without the dense matrix.
            size = ((other @ other.T) @ terms * terms).sum(0)
            top = size.topk(min(top_k, len(size)))
            share = terms[:, top.indices].abs() * other.norm(dim=1, keepdim=True)
            every = share.new_zeros(len(lens.tokens), share.shape[1])
            sizes.append(top.values)
            pos = torch.arange(len(share)) if gradient.pos is None else gradient.pos
            shares.append(every.index_copy(0, pos.to(every.device), share))
            names += [f"{j}" if expert is None else f"{expert}.{j}" for j in top.indices.tolist()]
        size = torch.cat(sizes)
        best = size.topk(min(top_k, len(size))).indices
        columns.append(torch.cat(shares, dim=1)[:, best])
        kind = "expert.neuron" if "." in names[0] else "neurons"
        labels.append(f"{layer} ({kind} {', '.join(names[j] for j in best.tolist())})")
    values = torch.stack(columns, dim=1)
    return OfflineHTML(
        activations.text_neuron_activations(
            _running(lens.tokens),
            values.cpu(),
            first_dimension_name="Layer",
            second_dimension_name="Place",
            first_dimension_labels=labels,
            second_dimension_labels=[f"{place + 1}." for place in range(values.shape[2])],
        )
    )


def strongest_cells(
    lens: BackwardLens, matrix: str = "W_out", *, top_k: int = 3
) -> list[tuple[int, int]]:
    """The cells (layer, pos) with words where delta is longest, strongest first."""
    norms = lens.norms(matrix).masked_fill(lens.silent(matrix), 0.0).flatten()
    order = norms.argsort(descending=True)[:top_k].tolist()
    return [(lens.layers[i // len(lens.tokens)], i % len(lens.tokens)) for i in order if norms[i]]


def page(widgets: Sequence[RenderedHTML | str], title: str = "bwlens") -> str:
    """Several widgets, and pieces of HTML between them, as one page with one copy of the script."""
    return document(title, f'<div class="sheet">{together(widgets)}</div>')


def together(widgets: Sequence[RenderedHTML | str]) -> str:
    """Widgets and pieces of HTML as one piece of HTML with one copy of circuitsvis' script."""
    pieces, calls, library = [], [], ""
    for piece in widgets:
        if not isinstance(piece, str):
            offline = piece if isinstance(piece, OfflineHTML) else OfflineHTML(piece)
            piece, library, call = offline.parts()
            calls.append(call)
        pieces.append(piece)
    script = f'<script type="module">{library}\n{";".join(calls)}</script>' if calls else ""
    return "".join(pieces) + script


def _apart(words: Sequence[str]) -> list[str]:
    """Words of a list, set apart, as text that circuitsvis' markup leaves as it is."""
    return [f"&nbsp;{escape(visible(word))}&nbsp;" for word in words]


def _running(words: Sequence[str]) -> list[str]:
    """Tokens of running text, the same way; a leading space is a space."""
    return [
        ("&nbsp;" if word[:1] == " " and word.strip(" ") else "") + escape(visible(word))
        for word in words
    ]
