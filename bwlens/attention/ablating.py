"""Direct ablation: the loss without each head, one at a time, the dear rival of a gradient."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.attention.patching import Place
from bwlens.gradient.objectives import NLL
from bwlens.model.attention import attended
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.passes import Addition, run, wide
from bwlens.model.prompts import Batch
from bwlens.model.sites import Tap, find_taps


@one_thread_at_a_time
def losses_without(
    model: Any, batch: Batch, *, instead: Literal["zero", "mean"] = "zero", batch_size: int = 64
) -> dict[Place, float]:
    """The mean NLL of the targets' first tokens when one head's part of x of W_O is replaced.

    Every prompt passes once for each (layer, head), so this costs heads x prompts passes.

    Args:
        model: A TransformerBridge or HookedTransformer.
        batch: The prompts with their targets.
        instead: What stands there: "zero", or the head's "mean" over all tokens of these prompts.
        batch_size: How many heads are left out at once, each in a row of its own.

    Raises:
        NotImplementedError: No attention maps, or a W_O that bwlens cannot reach.
    """
    _, passed = attended(model, batch.only(0), NLL(batch.targets[0]))
    n_heads = {layer: one.by_head(one.product).shape[1] for layer, one in passed.items()}
    outputs = find_taps(model, "W_O", list(n_heads))
    taps = {tap.site.layer: tap for tap in outputs if isinstance(tap, Tap)}
    means = dict.fromkeys(n_heads, torch.zeros(()))
    if instead == "mean":
        for flow in run(model, batch.tokens, taps=[*taps.values()]).flows:
            x = wide(flow.x).reshape(*batch.tokens.shape, -1)[batch.mask.to(flow.x.device)]
            layer = flow.parts[0][0].layer
            means[layer] = x.mean(0).unflatten(0, (n_heads[layer], -1))
    places = [(layer, head) for layer, n in n_heads.items() for head in range(n)]
    losses = torch.zeros(len(places), dtype=torch.float64)
    for prompt in range(len(batch)):
        one = batch.only(prompt)
        for at in range(0, len(places), batch_size):
            some = places[at : at + batch_size]
            tokens = one.tokens.expand(len(some), -1)
            additions: list[Addition] = []
            for layer in sorted({layer for layer, _ in some}):
                gone = torch.zeros(len(some), tokens.shape[1], n_heads[layer], 1)
                for row, (own, head) in enumerate(some):
                    gone[row, :, head] = float(own == layer)
                tap = taps[layer]
                change = partial(_instead, gone, means[layer])
                additions.append(Addition(tap.x, change, tap.x, str(tap.site)))
            logits = run(model, tokens, additions=additions, positions=one.last).logits[:, 0]
            target = wide(logits).log_softmax(-1)[:, one.targets[0][0]]
            losses[at : at + len(some)] -= target.double().cpu()
    return dict(zip(places, (losses / len(batch)).tolist(), strict=True))


def _instead(
    gone: Float[Tensor, "row pos head 1"], mean: Tensor, x: Tensor
) -> Float[Tensor, "row pos head d_head"]:
    """What is added to x of W_O: each row's own head goes, and the mean comes."""
    x = x.reshape(*gone.shape[:3], -1)
    return gone.to(x) * (mean.to(x) - x)
