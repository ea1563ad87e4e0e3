"""Lenses made from tensors alone, for pictures: any size, any words, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, product

import torch

from bwlens.gradient.capturing import Gradients
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.lens.backward import READ_THROUGH, BackwardLens
from bwlens.model.prompts import Batch
from bwlens.model.sites import Site
from bwlens.reading.readouts import Readout
from bwlens.reading.scoring import ranks_among

HOSTILE = (
    "</script>",
    "<s>",
    "<img src=x onerror=window.hacked=1>",
    "<!--",
    "\n",
    "\t",
    "",
    "a\u200bb",
    "\u202eevil",
    "שלום",
    "مرحبا",
    "\ud83d",
    "\ufffd",
    "$x_{$",
    "\\(y\\)",
    "$$z$$",
    "\"quoted' &amp; <b>",
    "  two",
    "trailing ",
    " ",
    "\u0301",
    "]]>",
    "`code`",
    "\u2028",
    "x" * 60,
)
"""Tokens that break careless pages."""


def words_alike(n: int = 50257) -> list[str]:
    """Words of two to four syllables, as many as a vocabulary has."""
    ends = ("a", "e", "i", "o", "u", "an", "er")
    syllables = [start + end for start in "bcdfghklmnprstvw" for end in ends]
    return [
        f" {''.join(word)}"
        for word in islice(product(syllables, syllables, syllables), 0, None, 27)
    ][:n]


def fake_lens(
    vocabulary: Sequence[str] | int = 100,
    n_layers: int = 4,
    n_pos: int = 5,
    matrices: Sequence[str] = ("W_in", "W_out"),
    k: int = 10,
    *,
    tokens: Sequence[str] | None = None,
    subject: tuple[int, ...] = (1, 2),
    target: int | None = 7,
    both: bool = False,
    seed: int = 0,
    silent: bool = True,
    follow: tuple[int, ...] = (),
) -> BackwardLens:
    """A lens over random words; with `silent` the last layer but its last cell has no gradient.

    Token `target` is the target and is promoted most in two cells of each W_out; token 8 is the
    model's answer. A few short vectors are in the regime of the norm's epsilon (raw reading only).
    """
    make = torch.Generator().manual_seed(seed)
    words = [f" w{i}" for i in range(vocabulary)] if isinstance(vocabulary, int) else vocabulary
    v = len(words)
    token_ids = torch.randint(v, (1, n_pos), generator=make)
    texts = tuple(tokens) if tokens else tuple(str(words[i]) for i in token_ids[0].tolist())
    followed = [*([] if target is None else [target]), 8, *follow]
    held = {}
    for matrix in matrices:
        for layer in range(n_layers):
            decay = torch.exp(-3 * torch.rand(n_pos, 1, generator=make))
            delta = torch.randn(n_pos, 6, generator=make) * decay
            if silent and layer == n_layers - 1:
                delta[:-1] = 0
            x = torch.randn(n_pos, 6, generator=make)
            held[Site(matrix, layer)] = LowRankGradient(x, delta, pos=torch.arange(n_pos))
    readings = {
        name: {
            m: _reading(held, m, n_layers, v, min(k, v), followed, name == "normalised", make)
            for m in matrices
        }
        for name in (("plain", "normalised") if both else ("plain",))
    }
    batch = Batch(token_ids, torch.tensor([n_pos]), torch.tensor([n_pos]))
    logits = torch.zeros(1, v)
    logits[0, 8] = 9.0
    return BackwardLens(
        prompt="".join(texts),
        tokens=texts,
        token_ids=tuple(token_ids[0].tolist()),
        n_prompt=n_pos,
        subject=subject,
        target="" if target is None else words[target],
        target_ids=() if target is None else (target,),
        answer=words[8],
        answer_probability=0.75,
        target_probability=None if target is None else 0.0123,
        loss=4.398,
        layers=tuple(range(n_layers)),
        matrices=tuple(matrices),
        gradients=Gradients(torch.tensor([4.398]), logits, batch, held),
        settings={"model": "fake", "objective": "NextToken"},
        _readings=readings,
        _words=dict(enumerate(words)),
        follow_ids=follow,
    )


def with_words(lens: BackwardLens, words: dict[tuple[int, int], int]) -> BackwardLens:
    """A copy of a lens in whose W_out these cells (layer, position) promote these ids most."""
    read = lens.readout("W_out")
    ids = read.bottom_ids.clone()
    for (layer, pos), index in words.items():
        ids[layer, pos, 0] = index
    readings = dict(lens._readings["plain"], W_out=replace(read, bottom_ids=ids))
    return replace(lens, _readings=dict(lens._readings, plain=readings))


def _reading(held, matrix, n_layers, v, k, followed, normalized, make) -> Readout:
    through = READ_THROUGH[matrix]
    rows = torch.stack([getattr(held[Site(matrix, at)], through) for at in range(n_layers)])
    scores = torch.randn(*rows.shape[:2], v, generator=make) * 8
    if matrix == "W_out" and followed[0] != 8:
        # Least probable in delta: what a step promotes.
        scores[min(1, n_layers - 1), -1, followed[0]] = scores[-1, -1, followed[0]] = -99.0
    top, bottom = scores.topk(k, -1), scores.topk(k, -1, largest=False)
    norms = rows.norm(dim=-1)
    zero = norms == 0
    shrinkage = torch.ones_like(norms) if normalized else norms / torch.hypot(norms, norms.median())
    followed_scores = scores[..., followed]
    ranks = ranks_among(scores.flatten(0, 1), followed_scores.flatten(0, 1))
    return Readout(
        top_ids=top.indices.masked_fill(zero[..., None], -1),
        top_scores=top.values.masked_fill(zero[..., None], float("nan")),
        bottom_ids=bottom.indices.masked_fill(zero[..., None], -1),
        bottom_scores=bottom.values.masked_fill(zero[..., None], float("nan")),
        norms=norms,
        zero=zero,
        shrinkage=shrinkage,
        eps_regime=(shrinkage < 0.65) & ~zero,
        ranks=ranks.view_as(followed_scores).masked_fill(zero[..., None], -1),
        target_scores=followed_scores,
    )
