"""`neurons`: the share of every row of W_out in the answer to a prompt."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.gradient.capturing import capture
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.gradient.objectives import NLL
from bwlens.knowledge._neurons import N_WORDS, Neuron, Neurons, Row
from bwlens.knowledge._shares import Shares
from bwlens.model.prompts import Prompts, make_batch, one_prompt
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, available_matrices
from bwlens.model.targets import Target
from bwlens.model.tokens import token_texts
from bwlens.reading.readouts import readout


def neurons(
    model: LensModel,
    prompt: Prompts,
    target: Target | None = None,
    *,
    layers: Layers = None,
    step: Target | None = None,
    top_k: int = 10,
    prepend_bos: bool | None = None,
) -> Neurons:
    """The share of every row of W_out in the answer to a prompt.

    The product of a feed-forward part is y = a W_out + b: rows mixed with weights a. At the last
    token, row j gives the target's logit a_j W_out[j] N W_U[:, target] on the direct path: N is the
    final norm (before it a norm behind the block, a mixture's routing) with its scale held at what
    it is in this pass. Rows and bias sum to the part's share exactly. What passes through later
    layers is not in it; `ablate` measures that.

    Args:
        model: A TransformerBridge or HookedTransformer.
        prompt: Text or token ids, one prompt.
        target: The answer whose logit is shared out, the first token of it; None for the model's.
        layers: Whose stores; None for all.
        step: What a gradient step is towards, whose reach is set beside the shares; None for the
            target.
        top_k: How many rows of each store are read in words.
        prepend_bos: Whether text gets a BOS token; None is the model's own default.

    Raises:
        ValueError: Several prompts, a model or layers without W_out, top_k below 1.
        NotImplementedError: A path to the logits that is not linear with norms held (a norm in
            the stream itself, another head), with figures.

    Source: Geva et al. 2021 and 2022 (rows as values); arXiv 2312.12141 (the increase of
    log-probability). Cautions: arXiv 2405.02421, 2405.14117.

    Example:
        >>> found = neurons(model, "Lionel Messi plays for")  # doctest: +SKIP
        >>> found.table().head()  # doctest: +SKIP
        >>> with ablate(model, found.top(10)):  # doctest: +SKIP
        ...     model.generate("Lionel Messi plays for")
    """
    prompt = one_prompt(prompt)
    if isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; expected a number of rows, 1 or more")
    if available_matrices(model) and "W_out" not in available_matrices(model):
        raise ValueError(
            f"this model has no feed-forward part (W_out) that bwlens reads; it has"
            f" {', '.join(available_matrices(model))}, and rows of a store are W_out's"
        )
    batch = make_batch(model, prompt, target, prepend_bos=prepend_bos)
    tokens = batch.tokens[:, : int(batch.prompt_lengths[0])]
    wanted = batch.targets[0][0] if batch.targets else None
    shares = Shares(model, tokens, layers, wanted)
    towards = step if step is not None else target if target is not None else shares.target
    moved = _moved(model, prompt, towards, shares, prepend_bos)
    rows = _rows(model, shares, top_k)
    given = dict.fromkeys(shares.layers, 0.0)
    for store in shares.stores:
        given[store.site.layer] += float((store.weights * store.gains).double().sum())
    texts = token_texts(model.tokenizer, [*tokens[0].tolist(), shares.target])
    return Neurons(
        prompt=prompt if isinstance(prompt, str) else "".join(texts[:-1]),
        target=texts[-1],
        target_id=shares.target,
        step_target=towards if isinstance(towards, str) else texts[-1],
        probability=float(shares.log_probs[shares.target].exp()),
        logit=shares.total,
        layers=shares.layers,
        stores=tuple(store.site for store in shares.stores),
        weights=tuple(store.weights.cpu() for store in shares.stores),
        gains=tuple(store.gains.cpu() for store in shares.stores),
        moved=moved[0],
        moved_keys=moved[1],
        mlps=shares.mlps,
        biases=shares.mlps - torch.tensor(list(given.values()), dtype=torch.float64),
        rows=rows,
        n_layers=len(model.blocks),
    )


def _rows(model: LensModel, shares: Shares, top_k: int) -> tuple[Row, ...]:
    """The rows with the largest shares of each store."""
    chosen, added, increases = [], [], []
    for store in shares.stores:
        sizes = (store.weights * store.gains).abs()
        indices = sizes.topk(min(top_k, len(sizes))).indices
        vectors = shares.added(store, indices)
        chosen.append((store, indices))
        added.append(vectors.to(shares.head.W_U.device))
        increases.append(shares.increases(store.site.layer, vectors))
    # A row whose weight is 0 adds nothing, which has no words.
    k = min(N_WORDS, shares.head.W_U.shape[1])
    read = readout(shares.head, torch.cat(added), top_k=k, normalize=True)
    tops, bottoms = read.top_ids.tolist(), read.bottom_ids.tolist()
    words = {i for ids in (*tops, *bottoms) for i in ids if i >= 0}
    texts = dict(zip(words, token_texts(model.tokenizer, list(words)), strict=True))
    out = []
    for (store, indices), rises in zip(chosen, increases, strict=True):
        for index, rise in zip(indices.tolist(), rises.tolist(), strict=True):
            place = len(out)
            weight = float(store.weights[index])
            out.append(
                Row(
                    Neuron(store.site.layer, index, store.site.expert),
                    weight,
                    weight * float(store.gains[index]),
                    rise,
                    tuple(texts[i] for i in tops[place] if i >= 0),
                    tuple(texts[i] for i in bottoms[place] if i >= 0),
                )
            )
    return tuple(out)


def _moved(
    model: LensModel, prompt: Any, target: Any, shares: Shares, prepend_bos: bool | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Norms of the gradient of each row of W_out and each column of W_in."""
    keys = [name for name in ("W_in",) if name in available_matrices(model)]
    grads = capture(
        model, prompt, NLL(target), [*keys, "W_out"], list(shares.layers), prepend_bos=prepend_bos
    )
    values = tuple(_row_norms(grads[store.site]) for store in shares.stores)
    return values, tuple(
        _row_norms(grads["W_in", store.site.layer, store.site.expert], columns=True)
        for store in shares.stores
        if keys
    )


def _row_norms(gradient: LowRankGradient, columns: bool = False) -> Float[Tensor, " d"]:
    """The norm of each row (or column) of x^T delta, which is never formed."""
    x, delta = (gradient.delta, gradient.x) if columns else (gradient.x, gradient.delta)
    return ((delta @ delta.T @ x) * x).sum(0).clamp_min(0).sqrt().cpu()
