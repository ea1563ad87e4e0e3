"""Details in circuitsvis' own widgets, made to work offline, on dark pages and many to a page.

Faults of circuitsvis 1.43 that are worked around: its notebook output probes the network and then
links a CDN, which leaves a blank cell offline; each widget brings 1.3 MB of script; its container
is never closed and swallows what follows on a page; token text goes in as markup; numpy scalars
raise; dark pages show its black text on black; its signed maps and `colored_tokens_multi` measure
one map or layer by another's scale.
"""

from __future__ import annotations

import gzip
import re
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from circuitsvis import activations, attention, topk_samples
from circuitsvis.tokens import colored_tokens
from circuitsvis.utils.render import RenderedHTML

from bwlens.show.colors import limit
from bwlens.show.sheet import document
from bwlens.show.words import visible

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

Layers = Sequence[int] | None
_RENDER = "CircuitsVis.render("

MAPS, DRAWN_CELLS = 24, 60_000
"""Maps, and cells of them all, that `attention_maps` draws at most by itself."""

# On these, and on what lies between them and white, circuitsvis writes in black, readably.
_MORE, _LESS, _NORM = "#66bfb6", "#d8b365", "#6baed6"

# Widgets are drawn dark on white, whatever the page.
_SHEET = "background:#fff;color:#111;color-scheme:light;padding:8px;border-radius:6px;overflow:auto"

# The first copy on a page unpacks and runs the library, all others wait for it.
_LOAD = """window.bwlensCircuits ??= new Response(new Blob([Uint8Array.from(atob("%s"), (c) =>
c.charCodeAt(0))]).stream().pipeThrough(new DecompressionStream("gzip"))).text().then((text) => {
const script = document.createElement("script"); script.textContent = text;
document.head.append(script); });
window.bwlensCircuits.then(() => {%s});"""


class OfflineHTML(RenderedHTML):
    """Widgets of circuitsvis, one or several, that never ask the network.

    `body` are their containers and what is between them, `library` circuitsvis' script, `calls`
    what draws into the containers.
    """

    def __init__(self, body: str, library: str = "", calls: str = "") -> None:
        self.body, self.library, self.calls = body, library, calls
        load = _LOAD % (_packed(library), calls) if calls else ""
        local = f'{body}<script type="module">{load}</script>' if calls else body
        super().__init__(local, local)

    def _repr_html_(self) -> str:
        return self.local_src


@cache
def _packed(library: str) -> str:
    return b64encode(gzip.compress(library.encode(), mtime=0)).decode()


def _offline(rendered: RenderedHTML, style: str = f"margin:15px 0;{_SHEET}") -> OfflineHTML:
    if isinstance(rendered, OfflineHTML):
        return rendered
    container, _, rest = rendered.local_src.partition("<script")
    script = rest.partition(">")[2].rpartition("</script>")[0]
    library, _, call = script.rpartition(_RENDER)
    # The container comes as <div .../>, which HTML reads as one that is never closed.
    container = re.sub(r'style="[^"]*"/>', f'style="{style}"></div>', container.strip(), count=1)
    # Labels are text in a script: none of them may end it.
    call = _RENDER + call.strip().replace("<", "\\u003c")
    return OfflineHTML(container, library.strip(), call)


def top_words(
    lens: BackwardLens, layer: int, pos: int, *, matrix: str = "W_out", top_k: int = 10
) -> OfflineHTML:
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
    return _offline(
        topk_samples.topk_samples(
            tokens=[[[_apart(end) for end in words]]],
            activations=[[[strength[0].tolist(), (-strength[1]).tolist()]]],
            zeroth_dimension_name="Layer",
            first_dimension_name="Token",
            zeroth_dimension_labels=[str(layer)],
            first_dimension_labels=[f"{pos}: {visible(lens.tokens[pos])}"],
        )
    )


def token_norms(lens: BackwardLens, matrix: str = "W_out", *, layers: Layers = None) -> OfflineHTML:
    """Delta's norm along the prompt, a line for each layer (circuitsvis' `colored_tokens`).

    All lines have one scale, from white for 0 to blue for the largest norm that is no outlier.
    """
    norms = lens.norms(matrix)
    return _along(lens, norms, limit(norms), layers, f"norm of \u03b4, {matrix}")


def token_places(
    lens: BackwardLens,
    matrix: str = "W_out",
    *,
    word: str | None = None,
    layers: Layers = None,
) -> OfflineHTML:
    """How far each token's step promotes a word, a line for each layer (`colored_tokens`).

    Of the word's place p among V from the promoted end the value is 1 - ln p / ln(V/2) where that
    is positive (teal: 1 is #1), and the same from the suppressed end with a minus (brown: -1 is
    last). `word` is one that the lens follows (`backward_lens(..., follow=[...])`); None takes the
    target's first token.

    Raises:
        ValueError: A word that is not followed, or no target.
    """
    known = lens.followed_places(matrix)
    if word is not None and word not in known:
        raise ValueError(
            f"{word!r} is not followed; make the lens with backward_lens(..., follow=[{word!r}])"
        )
    if word is None and not lens.target:
        raise ValueError("the lens has no target; name a word that it follows with word=...")
    places = (lens.target_places(matrix) if word is None else known[word]).double()
    half = max(2.0, lens.d_vocab / 2)
    ends = [
        (1 - p.clamp_min(1).log() / np.log(half)).clamp_min(0)
        for p in (places, lens.d_vocab + 1 - places)
    ]
    values = (ends[0] - ends[1]).masked_fill(places == 0, 0)
    name = "the target" if word is None else visible(word)
    return _along(
        lens, values, 1.0, layers, f"{name}: promoted (teal), suppressed (brown), {matrix}"
    )


def _along(lens: BackwardLens, values: Any, top: float, layers: Layers, title: str) -> OfflineHTML:
    """Lines of the prompt's tokens, coloured by values [layer, pos] from -top to top."""
    running, hue = _running(lens.tokens), _MORE if values.min() < 0 else _NORM
    pieces: list[RenderedHTML | str] = [f'<div style="{_SHEET}">{escape(title)}']
    for layer in lens.layers if layers is None else map(lens.resolve_layer, layers):
        row = _plain(values[lens.layers.index(layer)])
        line = colored_tokens(running, row, -top, top, _LESS, hue)
        pieces += [f"<div>layer {layer}</div>", _offline(line, "margin:0 0 6px 20px")]
    return together([*pieces, "</div>"])


def attention_maps(
    tokens: Sequence[str],
    maps: Any,
    labels: Sequence[str] | None = None,
    *,
    causal: bool = True,
    top_k: int | None = None,
) -> OfflineHTML:
    """Signed maps from queries to keys, such as reversed attention (`attention_heads`).

    Teal is positive, brown negative, white 0; all maps have one scale, symmetric about 0, up to the
    largest entry. Hovering a cell shows its value to three digits.

    Args:
        tokens: The prompt's tokens.
        maps: Numbers [head, query, key] or [layer, head, query, key].
        labels: A name for each map, the heads of the first layer first; by default "head 3" or
            "L0 H3".
        causal: Whether keys after the query have no value.
        top_k: How many maps are drawn, those with the largest norms, strongest first; by default
            all, but of many or long ones as many as a browser draws at ease, and the text says so.

    Raises:
        ValueError: Shapes that do not fit each other, or numbers that are not finite.
    """
    values = torch.as_tensor(maps).detach().double().cpu()
    n = len(tokens)
    if values.ndim not in (3, 4) or tuple(values.shape[-2:]) != (n, n) or not values.numel():
        raise ValueError(
            f"maps have the shape {list(values.shape)}; expected [head, {n}, {n}] or"
            f" [layer, head, {n}, {n}] for {n} tokens"
        )
    if labels is None:
        several = values.ndim == 4
        heads = range(values.shape[-3])
        labels = (
            [f"L{layer} H{head}" for layer in range(len(values)) for head in heads]
            if several
            else [f"head {head}" for head in heads]
        )
    values = values.reshape(-1, n, n)
    if len(labels) != len(values):
        raise ValueError(f"{len(labels)} labels for {len(values)} maps; give one for each")
    if not bool(values.isfinite().all()):
        raise ValueError("maps hold numbers that are not finite; mask them with 0")
    if causal:
        values = values.tril()
    most = min(MAPS, max(1, DRAWN_CELLS // n**2)) if top_k is None else top_k
    chosen, some = list(range(len(values))), ""
    if most < len(chosen):
        chosen = values.flatten(1).norm(dim=1).topk(most).indices.tolist()
        some = f" {most} of {len(values)} maps, the strongest first."
    top = float(values.abs().max())
    title = f"From -{top:.3g} (brown) to {top:.3g} (teal).{some}"
    widget = attention.attention_heads(
        attention=[[_plain(row) for row in values[at]] for at in chosen],
        tokens=[visible(token) for token in tokens],
        attention_head_names=[labels[at] for at in chosen],
        max_value=top or 1.0,
        min_value=-top or -1.0,
        negative_color="#8c510a",
        positive_color="#01665e",
        mask_upper_tri=causal,
    )
    return together([f'<p style="margin:4px 0">{title}</p>', widget])


def moved_neurons(
    lens: BackwardLens,
    matrix: str = "W_out",
    *,
    layers: Sequence[int] | None = None,
    top_k: int = 8,
) -> OfflineHTML:
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
    return _offline(
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
    return document(title, together(widgets).local_src)


def together(widgets: Sequence[RenderedHTML | str]) -> OfflineHTML:
    """Widgets, and pieces of HTML between them, as one with one copy of circuitsvis' script."""
    pieces = [OfflineHTML(w) if isinstance(w, str) else _offline(w) for w in widgets]
    return OfflineHTML(
        "".join(piece.body for piece in pieces),
        next((piece.library for piece in pieces if piece.library), ""),
        ";".join(piece.calls for piece in pieces if piece.calls),
    )


def _plain(values: Any) -> list[float]:
    """Numbers of three digits that circuitsvis prints as they are."""
    return [float(f"{value:.3g}") for value in values.tolist()]


def _apart(words: Sequence[str]) -> list[str]:
    """Words of a list, set apart, as text that circuitsvis' markup leaves as it is."""
    return [f"&nbsp;{escape(visible(word))}&nbsp;" for word in words]


def _running(words: Sequence[str]) -> list[str]:
    """Tokens of running text, the same way; a leading space is a space."""
    return [
        ("&nbsp;" if word[:1] == " " and word.strip(" ") else "") + escape(visible(word))
        for word in words
    ]
