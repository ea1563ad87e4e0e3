"""What heads read and write, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.attention.maps import reversed_attention
from bwlens.gradient.capturing import capture
from bwlens.gradient.objectives import as_objective
from bwlens.model.attention import changed_patterns
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.passes import run, wide
from bwlens.model.prompts import Prompts, one_prompt
from bwlens.model.sites import Site
from bwlens.model.tokens import token_texts
from bwlens.model.weights import weight_of
from bwlens.reading.readouts import readout

if TYPE_CHECKING:
    from pandas import DataFrame

STEP = 0.05
"""How much the strongest row of a head's attention is moved to measure its effect."""


@one_thread_at_a_time
def head_words(
    model: Any,
    prompt: Prompts,
    objective: Any,
    heads: Iterable[tuple[int, int]] | int = 10,
    *,
    top_k: int = 5,
    prepend_bos: bool | None = None,
) -> DataFrame:
    """What the heads that a loss asks most of read and write on a prompt, a row for each.

    Columns: `layer`, `head`, `norm` (||R||_F); `query` and `key`, the tokens between which R is
    largest, with `R` and `A` there (R < 0: a descent step attends more); `writes`, the top words of
    what the head adds to the stream at the query (A V W_O, the lens of that vector); `asked`, the
    words that a step on W_O promotes there (the lens of -delta of W_O, one for all heads of the
    layer); `effect`, the words whose log-probability rises most at the loss' position when the
    head's pattern is moved along -R, measured.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        prompt: One.
        objective: As for `capture`.
        heads: Which (layer, head), or how many of the strongest.
        top_k: How many words.
        prepend_bos: As for `capture`.

    Raises:
        ValueError, NotImplementedError: As `reversed_attention`; W_O that cannot be read.

    Example:
        >>> head_words(model, "I visited the city of", " Florence", 5)  # doctest: +SKIP
    """
    from pandas import DataFrame

    prompt = one_prompt(prompt)
    maps = reversed_attention(model, prompt, objective, prepend_bos=prepend_bos)
    places = (
        maps.strongest(heads) if isinstance(heads, int) else [(int(a), int(b)) for a, b in heads]
    )
    if not places:
        raise ValueError("no heads asked for; name some (layer, head), or how many")
    each = [maps.map(*place) for place in places]  # says so where one is not there
    layers = sorted({layer for layer, _ in places})
    grads = capture(model, prompt, as_objective(objective), "W_O", layers, prepend_bos=prepend_bos)
    effects = _effects(model, maps.batch.tokens, int(maps.batch.last[0]), places, each)
    tokenizer, tokens = model.tokenizer, maps.tokens[0]

    def words(vectors: Tensor) -> list[str]:
        ids = readout(model, vectors[None], top_k).top_ids[0]
        return token_texts(tokenizer, ids.tolist())

    rows: list[dict[str, Any]] = []
    for (layer, head), r, effect in zip(places, each, effects, strict=True):
        query, key = divmod(int(r.abs().argmax()), len(r))
        gradient, weight = grads["W_O", layer], weight_of(model, Site("W_O", layer)).read()
        width = gradient.x.shape[1] // _n_heads(maps, layer)
        columns = slice(head * width, (head + 1) * width)
        written = gradient.x[query, columns].to(weight) @ weight[columns]
        rows.append(
            {
                "layer": layer,
                "head": head,
                "norm": float(r.norm()),
                "query": tokens[query],
                "key": tokens[key],
                "R": float(r[query, key]),
                "A": float(maps.map(layer, head, kind="forward")[query, key]),
                "writes": words(written),
                "asked": words(-gradient.delta[query]) if gradient.delta[query].any() else [],
                "effect": token_texts(tokenizer, effect.topk(top_k).indices.tolist()),
            }
        )
    return DataFrame(rows)


def _n_heads(maps: Any, layer: int) -> int:
    return len(maps.heads[layer])


def _effects(
    model: Any,
    tokens: Tensor,
    last: int,
    places: Sequence[tuple[int, int]],
    each: Sequence[Tensor],
) -> Float[Tensor, "head d_vocab"]:
    """Change of each word's log-probability when a head's pattern moves along -R.

    A central difference: two prompts of one batch for each head.
    """
    out: list[Tensor] = []
    for place, r in zip(places, each, strict=True):
        step = -r / r.abs().max().clamp(min=torch.finfo(r.dtype).tiny) * STEP

        def change(pattern: Tensor, head: int = place[1], step: Tensor = step) -> Tensor:
            pattern = pattern.clone()
            pattern[0, head] += step.to(pattern)
            pattern[1, head] -= step.to(pattern)
            return pattern

        with changed_patterns(model, {place[0]: change}):
            passed = run(model, tokens.expand(2, -1), positions=torch.tensor([last]))
        log_probs = wide(passed.logits[:, 0]).log_softmax(-1)
        out.append(log_probs[0] - log_probs[1])
    return torch.stack(out)
