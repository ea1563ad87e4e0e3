"""Losses whose gradient is read: NLL, logit difference, a text's, KL, any function of the logits.

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

from bwlens.model.passes import device_of, run
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


@dataclass(frozen=True)
class SFT:
    """Mean next-token loss over a text, as fine-tuning has it, in nats.

    The mean of `-log p(token i | those before it)` over the tokens i from 1 on that a mask lets
    count: where an answer starts, or the assistant's turns of a conversation.

    Args:
        mask: True (1) where a token counts, a row for each text, of as many entries as it has
            tokens (BOS included); None for all.
        reduction: "mean" over a text's counted tokens, or their "sum".

    Example:
        >>> grads = capture(model, "Bees make honey.", SFT(), "W_out")  # doctest: +SKIP
    """

    mask: Sequence[Sequence[bool | int]] | Tensor | None = None
    reduction: Literal["mean", "sum"] = "mean"

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        """The loss of each text.

        Raises:
            ValueError: A mask of another shape, or one that lets nothing count.
        """
        counted = batch.mask.clone()
        counted[:, 0] = False
        if self.mask is not None:
            if len(self.mask) != len(batch):
                raise ValueError(f"the mask has {len(self.mask)} rows for {len(batch)} texts")
            for index, row in enumerate(self.mask):
                own = torch.as_tensor(row, dtype=torch.bool, device=counted.device)
                n = int(batch.lengths[index])
                if len(own) < n or own[n:].any():
                    raise ValueError(
                        f"the mask of text {index} has {len(own)} entries for its {n} tokens (with"
                        f" BOS, where there is one)"
                    )
                counted[index, :n] &= own[:n]
        if len(empty := (~counted.any(1)).nonzero().flatten()):
            raise ValueError(
                f"no token of text {int(empty[0])} counts: it has one token, or the mask none; the"
                f" first token of a text is never predicted"
            )
        row, pos = counted.nonzero(as_tuple=True)
        scores, ids = logits[row, (pos - 1).to(logits.device)], batch.tokens[row, pos]
        losses = torch.nn.functional.cross_entropy(scores, ids.to(scores.device), reduction="none")
        total = losses.new_zeros(len(batch)).index_add(0, row.to(losses.device), losses)
        return total if self.reduction == "sum" else total / counted.sum(1).to(total)


@dataclass(frozen=True)
class KL:
    """Divergence of the next words from another model's, in nats, at the last token or over all.

    KL(other || own), the distillation loss; with `reverse` KL(own || other).

    Args:
        model: Another model of the same vocabulary, which is run on the same tokens.
        positions: "last", or "all" for the mean over the text.
        reverse: Which of the two is averaged over.
    """

    model: Any
    positions: Literal["last", "all"] = "last"
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.positions not in ("last", "all"):
            raise ValueError(f"positions is {self.positions!r}; expected 'last' or 'all'")

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        """The divergence of each prompt.

        Raises:
            ValueError: The other model has another vocabulary.
        """
        other = run(self.model, batch.tokens.to(device_of(self.model))).logits
        if other.shape[-1] != logits.shape[-1]:
            raise ValueError(
                f"the other model has {other.shape[-1]} words and this one {logits.shape[-1]}; a"
                f" divergence needs the same vocabulary"
            )
        mine, theirs = logits.log_softmax(-1), other.to(logits).log_softmax(-1)
        first, second = (mine, theirs) if self.reverse else (theirs, mine)
        each = (first.exp() * (first - second)).sum(-1)
        if self.positions == "last":
            return each[torch.arange(len(batch), device=each.device), batch.last.to(each.device)]
        mask = batch.mask.to(each)
        return (each * mask).sum(1) / mask.sum(1)


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
