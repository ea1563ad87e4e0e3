"""Losses on preferences, whose gradient is a chosen half and a rejected half.

A pair is a prompt with a chosen and a rejected answer, two rows of a batch. With l the summed
log-probability of an answer and r = l - l_ref, the losses are functions of these alone, so the
gradient is w_c dl_c/dW + w_r dl_r/dW: its rows of the chosen answers, and those of the rejected.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
# (torch and pandas leave functions untyped.)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from bwlens.gradient.capturing import Gradients, capture
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.gradient.objectives import NLL
from bwlens.model.losses import forward
from bwlens.model.prompts import Batch, Prompts, Target, make_batch
from bwlens.model.sites import Layers, Site, default_matrices

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Preference:
    """A loss of pairs. Its batch has the chosen answers' rows first, then the rejected ones'.

    `capture_preference` makes that batch. Each row is given half of its pair's loss, so that the
    losses' sum is that of the pairs.

    Args:
        chosen: The answer after each prompt, as text (with its blank) or token ids.
        rejected: The other answer.
        reference: What the log-probabilities are compared with: a model, or the answers' own under
            one, [chosen..., rejected...]; None is the model that is read, as it is now.
    """

    chosen: Target | Sequence[Target]
    rejected: Target | Sequence[Target]
    reference: Any = field(default=None, repr=False)
    needs_reference: ClassVar[bool] = True

    @property
    def target(self) -> list[Target]:
        """All answers, in the order of the rows."""
        return [*_several(self.chosen), *_several(self.rejected)]

    def value(
        self, chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"], lengths: Tensor
    ) -> Float[Tensor, " pair"]:
        """The loss out of the answers' rewards l - l_ref; `lengths` [2, pair] are their tokens."""
        raise NotImplementedError

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        """Half of the pair's loss for each row."""
        if len(batch) % 2 or len(batch.targets) != len(batch):
            raise ValueError(
                f"{type(self).__name__} compares pairs: expected the chosen answers' rows, then the"
                f" rejected ones', found {len(batch)} rows; use bwlens.capture_preference"
            )
        log_p = -NLL(self.target, "sum")(logits, batch)
        if self.needs_reference:
            log_p = log_p - self.reference_of(log_p)
        chosen, rejected = log_p.chunk(2)
        lengths = torch.tensor([len(ids) for ids in batch.targets], device=log_p.device).view(2, -1)
        pair = self.value(chosen, rejected, lengths)
        return torch.cat([pair, pair]) / 2

    def reference_of(self, log_p: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The reference's log-probabilities, in the order of the rows.

        Raises:
            ValueError: They are given and of another number.
        """
        if self.reference is None:
            return log_p.detach()
        reference = torch.as_tensor(self.reference, device=log_p.device, dtype=log_p.dtype)
        if reference.shape != log_p.shape:
            raise ValueError(
                f"the reference has shape {list(reference.shape)}; expected the log-probability of"
                f" each of the {len(log_p)} answers, the chosen ones first"
            )
        return reference


@dataclass(frozen=True)
class DPO(Preference):
    """-log sigmoid(beta (r_c - r_r)). Source: Rafailov et al., NeurIPS 2023, equation 7."""

    beta: float = 0.1

    def value(self, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> Tensor:
        """The loss of each pair."""
        return -logsigmoid(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class IPO(Preference):
    """(r_c - r_r - 1 / (2 tau))^2. Source: Azar et al., AISTATS 2024, equation 17."""

    tau: float = 0.1

    def value(self, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> Tensor:
        """The loss of each pair."""
        return (chosen - rejected - 1 / (2 * self.tau)).square()


@dataclass(frozen=True)
class SimPO(Preference):
    """-log sigmoid(beta (l_c / |c| - l_r / |r|) - gamma), with no reference.

    Source: Meng, Xia and Chen, NeurIPS 2024, equation 6.
    """

    beta: float = 2.0
    gamma: float = 1.0
    needs_reference: ClassVar[bool] = False

    def value(self, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> Tensor:
        """The loss of each pair."""
        means = chosen / lengths[0] - rejected / lengths[1]
        return -logsigmoid(self.beta * means - self.gamma)


@dataclass(frozen=True)
class KTO(Preference):
    """desirable (1 - sigmoid(beta (r_c - kl))) + undesirable (1 - sigmoid(beta (kl - r_r))).

    `kl` is z_0, an estimate of KL(model || reference) that no gradient passes.

    Source: Ethayarajh et al., ICML 2024, equation 8.
    """

    beta: float = 0.1
    kl: float = 0.0
    desirable: float = 1.0
    undesirable: float = 1.0

    def value(self, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> Tensor:
        """The loss of each pair."""
        good = 1 - torch.sigmoid(self.beta * (chosen - self.kl))
        bad = 1 - torch.sigmoid(self.beta * (self.kl - rejected))
        return self.desirable * good + self.undesirable * bad


@dataclass(frozen=True, eq=False)
class PreferenceGradients:
    """The gradient of a preference loss and its two halves, which sum to it.

    Attributes:
        gradients: The whole, rows of all chosen answers, then of all rejected ones.
        chosen: The half of the chosen answers' rows, by site.
        rejected: The other half.
        losses: Of each pair.
        weights: dloss/dl of each answer [2, pair]: how hard the loss pulls at either.
    """

    gradients: Gradients
    chosen: dict[Site, LowRankGradient]
    rejected: dict[Site, LowRankGradient]
    losses: Float[Tensor, " pair"]
    weights: Float[Tensor, "2 pair"]

    def entanglement(self, pair: int | None = None) -> pd.DataFrame:
        """A row for each matrix and layer: how far raising the chosen raises the rejected too.

        `entanglement` is the cosine of d l_chosen / dW and d l_rejected / dW, exact from the
        factors (the halves themselves point apart, as one answer is raised and one lowered): 1,
        the two cannot be told apart there. `chosen`, `rejected` and `norm` are the norms of the
        halves and of their sum. Of all pairs together, or of one.

        Raises:
            ValueError: There is no such pair.
        """
        import pandas as pd

        n = len(self.losses)
        if pair is not None and not 0 <= pair < n:
            raise ValueError(f"pair {pair} of {n}; expected 0 to {n - 1}")
        rows = []
        for site, one in self.chosen.items():
            if site not in self.rejected:
                continue
            other = self.rejected[site]
            if pair is not None:
                one, other = one.for_prompt(pair), other.for_prompt(n + pair)
            rows.append(
                {
                    "layer": site.layer,
                    "matrix": site.matrix,
                    "expert": site.expert_number,
                    "entanglement": -float(one.cosine(other)),
                    "chosen": float(one.norm()),
                    "rejected": float(other.norm()),
                    "norm": float((one + other).norm()),
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"PreferenceGradients({len(self.losses)} pairs, {self.gradients!r})"


def capture_preference(
    model: Any,
    prompts: Prompts,
    objective: Preference,
    matrices: Sequence[str] | str | None = None,
    layers: Layers = None,
    *,
    prepend_bos: bool | None = None,
) -> PreferenceGradients:
    """The gradient of a preference loss, exactly, and its chosen and rejected halves.

    Args:
        model: The model.
        prompts: One, or several, each with its own chosen and rejected answer.
        objective: `DPO`, `IPO`, `KTO`, `SimPO`, or another `Preference`.
        matrices: None for those of the MLPs.
        layers: None for all.
        prepend_bos: As for `capture`.

    Raises:
        ValueError: Other numbers of prompts and answers; and as `capture` does.

    Example:
        >>> loss = DPO([" Paris"], [" Rome"])
        >>> made = capture_preference(model, "The capital of France is", loss)  # doctest: +SKIP
        >>> made.entanglement()  # doctest: +SKIP
    """
    rows = _rows(prompts)
    n = [len(rows), len(_several(objective.chosen)), len(_several(objective.rejected))]
    if len(set(n)) > 1:
        raise ValueError(f"{n[0]} prompts with {n[1]} chosen and {n[2]} rejected answers")
    objective = with_reference(objective, rows, prepend_bos)
    matrices = default_matrices(model) if matrices is None else matrices
    both = [*rows, *rows]
    grads = capture(model, both, objective, matrices, layers, prepend_bos=prepend_bos)
    chosen, rejected = {}, {}
    for site, gradient in grads.items():
        assert gradient.prompt is not None
        for half, here in ((chosen, gradient.prompt < n[0]), (rejected, gradient.prompt >= n[0])):
            if here.any():
                assert gradient.pos is not None
                half[site] = LowRankGradient(
                    gradient.x[here], gradient.delta[here], gradient.prompt[here],
                    gradient.pos[here],
                )  # fmt: skip
    weights = weights_of_pairs(model, both, objective, prepend_bos)
    return PreferenceGradients(grads, chosen, rejected, 2 * grads.losses[: n[0]], weights)


def with_reference(
    objective: Preference, prompts: Sequence[Any], prepend_bos: bool | None = None
) -> Preference:
    """The loss with a reference model's log-probabilities in the model's place."""
    if not objective.needs_reference or not hasattr(objective.reference, "blocks"):
        return objective
    model, both = objective.reference, [*prompts, *prompts]
    log_p = -_losses(model, both, NLL(objective.target, "sum"), prepend_bos)
    return replace(objective, reference=log_p.cpu())


def weights_of_pairs(
    model: Any, both: Sequence[Any], objective: Preference, prepend_bos: bool | None = None
) -> Float[Tensor, "2 pair"]:
    """dloss/dl of each answer: below 0 where a step raises it."""
    log_p = -_losses(model, both, NLL(objective.target, "sum"), prepend_bos)
    batch = make_batch(model, list(both), objective.target, prepend_bos=prepend_bos)
    lengths = torch.tensor([len(ids) for ids in batch.targets], device=log_p.device).view(2, -1)
    with torch.enable_grad():
        own = log_p.detach().requires_grad_()
        reward = own - objective.reference_of(own) if objective.needs_reference else own
        chosen, rejected = reward.chunk(2)
        loss = objective.value(chosen, rejected, lengths).sum()
        return torch.autograd.grad(loss, own)[0].view(2, -1).detach()


def _losses(model: Any, prompts: Sequence[Any], objective: Any, prepend_bos: bool | None) -> Tensor:
    batch = make_batch(model, list(prompts), objective.target, prepend_bos=prepend_bos)
    return forward(model, batch, objective).losses.detach()


def _rows(prompts: Any) -> list[Any]:
    """Prompts as a list, one of each."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Tensor):
        return (prompts[None] if prompts.ndim == 1 else prompts).tolist()
    listed = list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed


def _several(answers: Any) -> list[Any]:
    return [answers] if isinstance(answers, str | int) else list(answers)


@dataclass(frozen=True)
class Half:
    """weight * log p(target): one half of a preference loss, to first order.

    Its gradient is that half's, exactly, at the model that the weight was measured on.
    """

    target: Target | Sequence[Target]
    weight: float

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        """The weighted log-probability of each prompt's answer."""
        return -self.weight * NLL(self.target, "sum")(logits, batch)
