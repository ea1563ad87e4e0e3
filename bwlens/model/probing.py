"""A short prompt of bwlens' own, to ask a model what it computes, and what a step at a site does.

The user's hooks are off meanwhile: what is asked is the model's own.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bwlens.model.flows import experts_one_by_one
from bwlens.model.passes import Addition, all_modules, run, wide
from bwlens.model.prompts import Batch, padded
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Point
from bwlens.model.unhooked import users_hooks_off

_SPREAD = (0.11, 0.31, 0.53, 0.71)
"""Where in the vocabulary the probe's tokens stand; no text, as a model may have no tokenizer."""


def probe_batch(model: LensModel) -> Batch:
    """One prompt of four tokens from all over the vocabulary."""
    d_vocab = int(getattr(model.cfg, "d_vocab", 0)) or len(next(model.embed.parameters()))
    return padded(model, [[int(part * d_vocab) for part in _SPREAD]])


def probe_loss(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """NLL of the tokens in reverse: some loss that every position has a share in, in nats."""
    scores = wide(logits).log_softmax(-1)
    answers = batch.tokens.flip(1).to(logits.device)
    return -scores.gather(2, answers[..., None]).mean((1, 2))


@contextmanager
def undisturbed(model: LensModel) -> Generator[None, None, None]:
    """The model without its user's hooks, its experts run one by one (as `capture` runs them)."""
    configs: dict[int, Any] = {}
    for module in all_modules(model):
        config: Any = vars(module).get("config")
        if getattr(config, "_experts_implementation", None):
            configs[id(config)] = config
    with ExitStack() as stack:
        stack.enter_context(users_hooks_off(model))
        if torch.is_inference_mode_enabled():
            # What modules keep of such a pass could have no gradient in a later one.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        stack.enter_context(experts_one_by_one(configs.values()))
        yield


def logits_and(
    model: LensModel, points: set[Point], tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_vocab"], Mapping[Point, list[Tensor]]]:
    """The model's own logits, and what passed the points, off the graph."""
    with undisturbed(model):
        passed = run(model, tokens, points=points)
    return passed.logits, passed.seen


def losses_after_steps(
    model: LensModel,
    point: Point,
    step: Float[Tensor, "pos d_out"],
    sizes: list[float],
    tokens: Int[Tensor, "1 pos"],
) -> Float[Tensor, " sizes"]:
    """The probe's loss, summed in float64, with `size * step` added to what passes a point.

    All sizes are one batch. The point is a hook point, or what leaves a module.
    """
    several = torch.tensor(sizes, dtype=step.dtype, device=step.device)
    batch = padded(model, tokens.tolist() * len(sizes))
    with undisturbed(model):
        added = Addition((point,), several[:, None, None] * step)
        passed = run(model, batch.tokens, additions=[added])
    return probe_loss(passed.logits.double(), batch)
