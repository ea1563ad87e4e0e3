"""One layer's MLP under a step: the terms of Lemma 5.2, each predicted and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.experiments.own_steps import Stepped, low_rank, padded, stepped
from bwlens.gradient.capturing import Gradients
from bwlens.gradient.objectives import NLL
from bwlens.model.prompts import Batch, Target
from bwlens.model.sites import Site, Tap
from bwlens.model.weights import weight_of

WHICH = ("W_in", "W_out", "both")
"""What a step is taken on; W_gate goes with W_in, whose x it shares."""


@dataclass(frozen=True)
class TargetLogit:
    """The logit of the target's first token after the prompt: an objective to be raised.

    Tokens of the target are teacher forced as `NLL` does, so that both have the same batch.
    """

    target: Target | Sequence[Target]

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        """The logit for each prompt."""
        rows = torch.arange(len(batch), device=logits.device)
        first = torch.tensor([ids[0] for ids in batch.targets], device=logits.device)
        return logits[rows, batch.last.to(logits.device), first]


class SteppedLayer:
    """One layer's MLP before a step, and rows of what a step does.

    Args:
        model: The model.
        grads: The gradients of `loss`, which is stepped down.
        raised: Those of the target's logit, of the same batch.
        taps: The layer's W_in, W_gate if it has one, and W_out, in this order.
        before: A pass without a step, its x and z at the taps.
        loss: See above.
    """

    def __init__(
        self,
        model: Any,
        grads: Gradients,
        raised: Gradients,
        taps: Mapping[Site, Tap],
        before: Stepped,
        loss: NLL,
    ) -> None:
        self._model, self._batch, self._taps = model, grads.batch, taps
        self._before, self._loss = before, loss
        self._at = torch.arange(len(grads.batch), device=grads.batch.tokens.device)
        self._out = next(site for site in taps if site.matrix == "W_out")
        self._in = [site for site in taps if site != self._out]
        self._rows = {site: padded(grads[site], grads.batch) for site in taps}
        self._W_out = weight_of(model, self._out).read()
        self._slopes = {}  # of the loss and the logit, by matrix, for a step of size 1
        for site, (x, delta) in self._rows.items():
            up = padded(raised[site], grads.batch)[1]
            inner = x @ x.mT
            self._slopes[site] = tuple(
                -(inner * (d @ delta.mT)).double().sum((1, 2)) for d in (delta, up)
            )
        self._answer = TargetLogit(loss.target)

    def rows(self, eta: float) -> list[dict[str, Any]]:
        """A row for each prompt and each of `WHICH`."""
        sites = {"W_in": self._in, "W_out": [self._out], "both": list(self._taps)}
        after = {
            which: stepped(
                self._model,
                self._batch,
                {site: low_rank(*self._rows[site], -eta) for site in changed},
                self._taps,
            )
            for which, changed in sites.items()
        }
        effects = {which: self._effects(found) for which, found in after.items()}
        rows = []
        for which, found in after.items():
            row: dict[str, Any] = {"item": self._at, "which": which, "eta": eta}
            row |= self._pre_activations(found, eta if which != "W_out" else None)
            row |= self._output(found, eta, which)
            for at, name in enumerate(("loss", "logit")):
                predicted = eta * torch.stack([self._slopes[s][at] for s in sites[which]]).sum(0)
                measured = effects[which][at]
                row[f"{name}_predicted"] = predicted
                row[f"{name}_measured"] = measured
                row[f"{name}_error"] = (measured - predicted).abs() / predicted.abs()
                alone = effects["W_in"][at] + effects["W_out"][at]
                blank = torch.full_like(measured, float("nan"))
                row[f"{name}_cross"] = measured - alone if which == "both" else blank
            rows.append(
                {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in row.items()}
            )
        return rows

    def _effects(self, after: Stepped) -> tuple[Tensor, Tensor]:
        """Measured changes of the loss and of the target's logit."""
        loss, logit = (
            (
                score(after.logits, self._batch).double()
                - score(self._before.logits, self._batch).double()
            ).to(self._at.device)
            for score in (self._loss, self._answer)
        )
        return loss, logit

    def _at_last(self, rows: Tensor) -> Tensor:
        return rows[self._at, self._batch.last]

    def _own_and_others(self, sites: Sequence[Site], x_last: Tensor) -> tuple[Tensor, Tensor]:
        """(x . x_i) delta_i of the last token i, and the other tokens' sum of them."""
        x = self._rows[sites[0]][0]
        delta = torch.cat([self._rows[site][1] for site in sites], -1)
        along = (x @ x_last[..., None])[..., 0]
        own = self._at_last(along)[:, None] * self._at_last(delta)
        along = along.index_put((self._at, self._batch.last), along.new_zeros(()))
        return own, (along[:, None] @ delta)[:, 0]

    def _pre_activations(self, after: Stepped, eta: float | None) -> dict[str, Any]:
        names = ("pre_change", "pre_imprint", "pre_cross", "pre_error", "pre_cosine")
        if eta is None:
            return dict.fromkeys(names, float("nan"))
        own, others = self._own_and_others(self._in, self._before.x[self._in[0]])
        imprint, cross = -eta * own, -eta * others
        measured = torch.cat([after.z[s] - self._before.z[s] for s in self._in], -1)
        values = (
            measured.norm(dim=1),
            imprint.norm(dim=1),
            cross.norm(dim=1),
            _relative(measured - imprint - cross, measured),
            torch.cosine_similarity(measured, imprint, eps=1e-30),
        )
        return dict(zip(names, values, strict=True))

    def _output(self, after: Stepped, eta: float, which: str) -> dict[str, Any]:
        old = self._before.x[self._out]
        moved = after.x[self._out] - old
        measured = after.z[self._out] - self._before.z[self._out]
        imprint = moved @ self._W_out.to(moved)
        nothing = torch.zeros_like(imprint)
        shift = cross = lemma = nothing
        if which != "W_in":
            own, others = self._own_and_others([self._out], old)
            lemma = -eta * own
            shift = lemma - eta * others
            own, others = self._own_and_others([self._out], moved)
            cross = -eta * (own + others)
        delta = self._at_last(self._rows[self._out][1])
        down = -delta / delta.norm(dim=1, keepdim=True)
        parts = {"imprint": imprint, "shift": shift, "cross": cross}
        return {
            "out_change": measured.norm(dim=1),
            **{f"out_{name}": part.norm(dim=1) for name, part in parts.items()},
            **{f"{name}_on": (part * down).sum(1) for name, part in parts.items()},
            "out_error": _relative(measured - imprint - shift - cross, measured),
            "out_lemma": lemma.norm(dim=1) if which != "W_in" else nothing[:, 0] + float("nan"),
            "lemma_error": _relative(shift - lemma, lemma),
        }


def _relative(difference: Tensor, to: Tensor) -> Tensor:
    """Norms of the difference over those of `to`; nan where both are zero."""
    return difference.norm(dim=1) / to.norm(dim=1)
