"""Losses whose gradient is read: next-token NLL, logit difference, or any function of the logits.

An objective is called with the logits [batch, pos, d_vocab] of a forward pass and its `Batch`, and
returns one loss a prompt. Its optional fields `target` and `other` name answers; the batch then
carries their token ids.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.model.prompts import Batch, Target


@runtime_checkable
class Objective(Protocol):
    """Anything that turns logits and a batch into one loss per prompt."""

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        """One loss per prompt; a gradient step lowers it."""
        ...


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood of the target after the prompt, in nats.

    `-log p(target | prompt)`; the losses of several tokens, teacher forced, are averaged, or summed
    with `reduction="sum"`.

    Source: Backward Lens, section 4.1.

    Example:
        >>> NLL(" Paris")
        NLL(target=' Paris', reduction='mean')
    """

    target: Target | Sequence[Target]
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {self.reduction!r}; expected 'mean' or 'sum'")

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        """The loss of each prompt's target."""
        _check_answers(self, batch, batch.targets)
        lengths = [len(ids) for ids in batch.targets]
        device, counts = logits.device, torch.tensor(lengths, device=logits.device)
        row = torch.repeat_interleave(counts)
        step = torch.cat([torch.arange(n, device=device) for n in lengths])
        ids = torch.tensor([i for t in batch.targets for i in t], device=device)
        # Only the rows that are read are normalised: [targets' tokens, d_vocab].
        scores = logits[row, batch.last.to(device)[row] + step]
        losses = torch.nn.functional.cross_entropy(scores, ids, reduction="none")
        total = losses.new_zeros(len(batch)).index_add(0, row, losses)
        return total if self.reduction == "sum" else total / counts


@dataclass(frozen=True)
class LogitDifference:
    """Logit of another answer less that of the target, at the prompt's last position.

    `logit(other) - logit(target)`: a step that lowers it raises the target against the other.
    Both must be single tokens.
    """

    target: Target | Sequence[Target]
    other: Target | Sequence[Target]

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        """The difference for each prompt."""
        _check_answers(self, batch, batch.targets, batch.others)
        for name, answers in (("target", batch.targets), ("other", batch.others)):
            for index, ids in enumerate(answers):
                if len(ids) != 1:
                    raise ValueError(
                        f"LogitDifference compares single tokens, but the {name} of prompt {index}"
                        f" has {len(ids)}: {list(ids)}; name another word or use NLL"
                    )
        rows = torch.arange(len(batch), device=logits.device)
        scores = logits[rows, batch.last.to(logits.device)]
        target = torch.tensor([ids[0] for ids in batch.targets], device=logits.device)
        other = torch.tensor([ids[0] for ids in batch.others], device=logits.device)
        return scores[rows, other] - scores[rows, target]


def _check_answers(objective: Any, batch: Batch, *answers: tuple[tuple[int, ...], ...]) -> None:
    """The batch must carry the answers; it does where the objective itself was passed to it."""
    if any(len(ids) != len(batch) for ids in answers):
        raise ValueError(
            f"this batch carries no token ids for {type(objective).__name__}; pass it as the"
            f" objective itself, or give your own objective its target (and other) as attributes"
        )


def as_objective(objective: Any) -> Objective:
    """An objective from what a user wrote: text or token ids mean `NLL` of that target.

    Raises:
        TypeError: Neither a target nor callable.
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str | int | Tensor | Sequence):
        return NLL(objective)
    raise TypeError(
        f"expected a target (' Paris', a token id), an objective such as NLL(' Paris'), or a"
        f" function of (logits, batch); found {type(objective).__name__}"
    )
