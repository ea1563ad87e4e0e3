"""A forward pass with its losses, and gradients of them at what passed."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)
# pyright: reportUnnecessaryComparison=false, reportUnnecessaryIsInstance=false
# (What torch's types rule out does come, and what users give is checked.)

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.model.locking import alone_with
from bwlens.model.passes import Passed, in_eval_mode, run, wide
from bwlens.model.places import ExpertTap, Point, Tap
from bwlens.model.prompts import Batch
from bwlens.model.protocol import LensModel

_HALF_SCALE = {torch.float16: 1024.0}
"""Losses are scaled up by this (exactly, a power of two) where small gradients would vanish."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished forward pass with its losses and their scaled sum, still on the graph."""

    passed: Passed
    losses: Float[Tensor, " batch"]
    total: Float[Tensor, ""]
    scale: float

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """The pass's logits."""
        return self.passed.logits

    def gradients(
        self, tensors: list[Tensor], names: list[str], allow_unused: bool = False
    ) -> list[Any]:
        """dL/dtensor for each; the losses' sum is taken, as prompts do not touch one another."""
        off_graph = [n for t, n in zip(tensors, names, strict=True) if not t.requires_grad]
        if off_graph:
            raise ValueError(f"{off_graph[0]} was computed off the autograd graph")
        found = torch.autograd.grad(self.total, tensors, allow_unused=True)
        for name, delta in zip(names, found, strict=True):
            if delta is None and not allow_unused:
                raise ValueError(
                    f"the loss does not depend on {name}, so it has no gradient there; ask for"
                    f" other layers or matrices, or use an objective that reads the logits"
                )
            if delta is not None and not torch.isfinite(delta).all():
                raise ValueError(
                    f"the gradient at {name} is not finite; the model overflows in"
                    f" {delta.dtype}, load it in float32 or bfloat16"
                )
        if self.scale == 1.0:
            return list(found)
        return [None if delta is None else delta.float() / self.scale for delta in found]

    def next_logits(self, batch: Batch) -> Float[Tensor, "batch d_vocab"]:
        """The logits after each prompt's last token, off the graph."""
        return last_logits(self.logits.detach(), batch).clone()


def last_logits(
    logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
) -> Float[Tensor, "batch d_vocab"]:
    """The logits after each prompt's last token."""
    rows = torch.arange(len(batch), device=logits.device)
    return logits[rows, batch.last.to(logits.device)]


def check_mode() -> None:
    """Refuse to run where no gradient can be had."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "bwlens needs a backward pass, which torch.inference_mode() forbids; call it outside"
            " (torch.no_grad() around it is fine)"
        )


def forward(
    model: LensModel,
    batch: Batch,
    objective: Callable[[Tensor, Batch], Tensor],
    taps: Collection[Tap | ExpertTap] = (),
    points: Collection[Point] = (),
    **options: Any,
) -> Run:
    """Run the model (`options` as `passes.run` has them) and the objective, and check its losses.

    Raises:
        NotImplementedError: A module that autograd cannot follow takes part, or a tap that passed
            nowhere.
        ValueError: The objective gave something else than one finite loss per prompt.
    """
    with alone_with(model), in_eval_mode(model), torch.enable_grad():
        passed = run(model, batch.tokens, taps=taps, points=points, graph=True, **options)
        losses: Any = objective(wide(passed.logits), batch)
    if not isinstance(losses, Tensor) or losses.shape != (len(batch),):
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise ValueError(
            f"the objective returned {found}; expected one loss per prompt, shape ({len(batch)},):"
            f" reduce over positions, not over the batch"
        )
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        found = float(losses.detach()[bad[0]])
        raise ValueError(
            f"the loss of prompt {bad[0]} is {found}; expected a finite number. Check the model's"
            f" weights and dtype ({passed.logits.dtype})"
        )
    if not losses.requires_grad:
        raise ValueError(
            "the objective's loss is cut off from the model (it has no gradient); compute it from"
            " the logits it is given, without .detach(), .item() or torch.no_grad()"
        )
    scale = _HALF_SCALE.get(passed.logits.dtype, 1.0)
    with torch.enable_grad():
        return Run(passed, losses, losses.sum() * scale, scale)
