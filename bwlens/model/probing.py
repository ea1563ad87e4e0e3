"""A short prompt of bwlens' own, to ask a model what it computes, and what a step at a site does.

The user's hooks are off meanwhile: what is asked is the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bwlens.model.passes import recording
from bwlens.model.prompts import Batch
from bwlens.model.sites import Point
from bwlens.model.unhooked import users_hooks_off

_SPREAD = (0.11, 0.31, 0.53, 0.71)
"""Where in the vocabulary the probe's tokens stand; no text, as a model may have no tokenizer."""


def probe_batch(model: Any) -> Batch:
    """One prompt of four tokens from all over the vocabulary."""
    weight = next(model.embed.parameters())
    d_vocab = int(getattr(model.cfg, "d_vocab", 0)) or len(weight)
    ids = [int(part * d_vocab) for part in _SPREAD]
    return batch_of(torch.tensor([ids], device=weight.device))


def batch_of(tokens: Int[Tensor, "batch pos"]) -> Batch:
    """Rows of tokens, all of them real, as a batch without targets."""
    lengths = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    return Batch(tokens, lengths, lengths)


def probe_loss(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """NLL of the tokens in reverse: some loss that every position has a share in, in nats."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(wide).log_softmax(-1)
    answers = batch.tokens.flip(1).to(logits.device)
    return -scores.gather(2, answers[..., None]).mean((1, 2))


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """The model without its user's hooks, its experts run one by one (as `capture` runs them)."""
    trees = [model, getattr(model, "original_model", None)]
    modules = [module for tree in trees if tree is not None for module in tree.modules()]
    configs = {
        id(config): config
        for module in modules
        if getattr(config := vars(module).get("config"), "_experts_implementation", None)
    }
    before = {key: config._experts_implementation for key, config in configs.items()}
    with ExitStack() as stack:
        stack.enter_context(users_hooks_off(model))
        if torch.is_inference_mode_enabled():
            # What modules keep of such a pass could have no gradient in a later one.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        try:
            for config in configs.values():
                config._experts_implementation = "eager"
            yield
        finally:
            for key, config in configs.items():
                config._experts_implementation = before[key]


def logits_and(
    model: Any, points: set[Point], tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[Point, list[Tensor]]]:
    """The model's own logits, and what passed the points, off the graph."""
    with undisturbed(model), recording(model, points) as seen, torch.no_grad():
        logits = model(tokens, return_type="logits", padding_side="right")
    return logits, seen


def losses_after_steps(
    model: Any,
    point: Point,
    step: Float[Tensor, "pos d_out"],
    sizes: list[float],
    tokens: Int[Tensor, "1 pos"],
) -> Float[Tensor, " sizes"]:
    """The probe's loss, summed in float64, with `size * step` added to what passes a point.

    All sizes are one batch. The point is a hook point, or what leaves a module.
    """
    several = torch.tensor(sizes, dtype=step.dtype, device=step.device)
    rows = (several[:, None, None] * step).flatten(0, 1)

    def add(module: Any, args: Any, output: Any) -> Any:
        leaving = output[0] if isinstance(output, tuple) else output
        changed = leaving + rows.to(leaving).reshape(leaving.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    batch = batch_of(tokens.expand(len(sizes), -1))
    with undisturbed(model):
        handle = point.module.register_forward_hook(add)
        try:
            with recording(model, set()), torch.no_grad():
                logits = model(batch.tokens, return_type="logits", padding_side="right")
        finally:
            handle.remove()
    return probe_loss(logits.double(), batch)
