"""Lemma 5.2 against a real step: what a step on one layer's MLP stamps in, and what it shifts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.capture import Gradients, capture
from bwlens.experiments.base import Experiment, Reading, Result, frame, run
from bwlens.experiments.own_steps import Stepped, dense_taps, low_rank, padded, stepped
from bwlens.experiments.statistics import summarize
from bwlens.objectives import NLL
from bwlens.parameters import weight_of
from bwlens.prompts import Batch, Edit, Target
from bwlens.sites import Site, Tap, available_matrices, resolve_layers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ETAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Step sizes: from where first order holds to well beyond, for models of the demo's size."""

WHICH = ("W_in", "W_out", "both")

_BOUND = 0.1
"""First order carries as long as it is off by less than this share."""

_ROUNDING = 1e-3
"""Predicted changes of a loss or logit below this are too near the rounding to be judged."""


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


@dataclass(frozen=True)
class ImprintShift(Experiment):
    """Predicted and measured effects of a step -eta dL/dW on one layer's MLP, by layer and eta.

    Every prompt gets the step of its own loss and no other, on `which`: W_in (with W_gate where
    there is one: both read the same x), W_out, or both. Rows: `item`, `layer`, `which`, `eta` and,
    at the last prompt token i with x, delta of W_in side by side with W_gate's, and a, d those of
    W_out (norms are L2):

    - pre-activations: `pre_change`, the norm of what was measured; its two parts, `pre_imprint`
      -eta ||x_i||^2 delta_i, and `pre_cross` -eta sum_{j != i} (x_i . x_j) delta_j, which the other
      tokens stamp in; `pre_error`, how far their sum is from what was measured (relative: rounding
      alone, as z = x W is linear in W), and `pre_cosine`, of what was measured with the imprint.
    - the MLP's output: `out_change`; its parts `out_imprint` (changed activations through the old
      W_out), `out_shift` (old activations through the change of W_out, -eta sum_j (a_i . a_j) d_j)
      and `out_cross` (both changed), which add up but for rounding (`out_error`); each part's
      projection on -d_i as `imprint_on`, `shift_on`, `cross_on`: positive is down the loss;
      `out_lemma` eta ||a_i||^2 ||d_i||, the length of the lemma's shift, which leaves out the other
      tokens, and `lemma_error`, how far it is from the whole shift (relative to the lemma's).
    - `loss` and `logit` (of the target's first token): `loss_predicted` is what first order says,
      -eta <dL/dW, dL/dW>, and `logit_predicted` -eta <d logit/dW, dL/dW>, summed over the matrices;
      `loss_measured`, `logit_measured`; `loss_error`, `logit_error` |measured - predicted| /
      |predicted|; for both matrices `loss_cross`, `logit_cross`: what was measured less what was
      for either alone.

    The summary has the means by layer, which and eta, over all layers together as layer -1, and
    `loss_reach`, `logit_reach` (with eta nan): the largest eta of the grid up to which the relative
    error stays below 10 %, as log10, of prompts whose first eta has it there.

    Source: Backward Lens, Lemma 5.2 (section 5.2), whose claims are `pre_imprint`, `out_lemma`.
    """

    etas: tuple[float, ...] = ETAS

    name: ClassVar[str] = "imprint_shift"
    title: ClassVar[str] = "Imprint and shift of a step"
    source: ClassVar[str] = "Lemma 5.2"
    reading: ClassVar[str] = (
        "Above: how much a step on one layer lowers the prompt's own loss, and how much first"
        " order says it should. Below: the change of the MLP's output, split into the imprint"
        " (changed activations through the old W_out), the shift (old activations through the"
        " changed W_out) and what comes of both; and the step size up to which first order is"
        " off by less than a tenth."
    )
    published: ClassVar[str] = (
        "a lemma, not a figure: a step moves neuron j's pre-activation on the same input by -eta"
        " ||x||^2 delta_j and W_out's output by -eta ||x||^2 delta; terms between tokens are left"
        " out."
    )

    def wanted(self, model: Any) -> tuple[str, ...]:
        """W_in, W_out, and W_gate where some layer has one; the step sizes are checked as well."""
        if not self.etas or not all(0 < eta < float("inf") for eta in self.etas):
            raise ValueError(f"etas are {self.etas}; expected one step size or more, all positive")
        layers = resolve_layers(model, self.layers)
        dense_taps(model, _mlp_matrices(model), layers)
        return _mlp_matrices(model)

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch: three forward passes for each layer and step size."""
        layers = resolve_layers(reading.model, self.layers)
        matrices = _mlp_matrices(reading.model)
        targets = [edit.target_new for edit in reading.edits]
        raised = capture(
            reading.model,
            [edit.text for edit in reading.edits],
            TargetLogit(targets),
            matrices,
            layers,
            prepend_bos=reading.prepend_bos,
        )
        taps = dense_taps(reading.model, matrices, layers)
        before = stepped(reading.model, reading.grads.batch, {}, taps)
        columns = []
        for layer in layers:
            here = {site: tap for site, tap in taps.items() if site.layer == layer}
            mlp = _Layer(reading.model, reading.grads, raised, here, before, NLL(targets))
            columns += [
                {"layer": layer, **row} for eta in sorted(self.etas) for row in mlp.rows(eta)
            ]
        return frame(columns)

    def summarize(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Means by layer (-1: all together), which and eta, and how far first order carries."""
        import pandas as pd

        values = [name for name in rows.columns if name not in ("item", "layer", "which", "eta")]
        reach = _reach(rows)
        reaches = ["loss_reach", "logit_reach"]
        by = ["layer", "which"]
        summaries = [
            *(summarize(t, [*by, "eta"], values) for t in (rows, rows.assign(layer=-1))),
            *(summarize(t, by, reaches) for t in (reach, reach.assign(layer=-1))),
        ]
        return pd.concat(summaries, ignore_index=True)

    def draw(self, summary: pd.DataFrame) -> Figure:
        """Predicted against measured by eta above; the split, and first order's reach, below."""
        import pandas as pd

        from bwlens.show.drawing import panels

        rows, titles = _effect_panels(summary)
        below, names = _layer_panels(summary)
        rows += below
        order = ("measured", "predicted", "imprint", "shift", "cross", *WHICH)
        figure, axes = panels(
            pd.concat(rows), titles + names, rows, "line", order, "", x="at", columns=3,
            size=(2.2, 1.9), share_x=False,
        )  # fmt: skip
        for number, ax in enumerate(axes):
            if number < 3:
                ax.set_xscale("log")
            if number < 5:
                ax.set_yscale("log")
            ax.set_xlabel("eta" if number < 3 else "layer")
        axes[0].set_ylabel("drop of the loss (nats)")
        axes[3].set_ylabel("norm / eta")
        return figure


def imprint_shift(
    model: Any,
    edits: Sequence[Edit],
    layers: Sequence[int] | None = None,
    etas: Sequence[float] = ETAS,
    **options: Any,
) -> Result:
    """What a step on W_in, W_out or both of one layer does, predicted and measured.

    Args:
        model: A TransformerBridge or HookedTransformer whose MLPs, in those layers, are dense.
        edits: The edits.
        layers: Layers from 0, negative ones from the end; None for all.
        etas: Step sizes.
        **options: As for `bwlens.experiments.run`.

    Raises:
        ValueError: A step size that is not positive, or no such layer.
        NotImplementedError: A layer is a mixture of experts.

    Source: Backward Lens, Lemma 5.2.

    Example:
        >>> found = imprint_shift(model, edits, layers=[5])  # doctest: +SKIP
        >>> found.summary.query("quantity == 'loss_reach'")  # doctest: +SKIP
    """
    chosen = None if layers is None else tuple(layers)
    return run(ImprintShift(chosen, tuple(map(float, etas))), model, edits, **options)


class _Layer:
    """One layer's MLP before the step, and its rows after one."""

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
            score(after.logits, self._batch).double()
            - score(self._before.logits, self._batch).double()
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


def _mlp_matrices(model: Any) -> tuple[str, ...]:
    held = available_matrices(model)
    return tuple(name for name in ("W_in", "W_gate", "W_out") if name in held)


def _reach(rows: pd.DataFrame) -> pd.DataFrame:
    """How far each prompt's first-order prediction carries, in each layer."""
    groups = ["item", "layer", "which"]
    rows = rows.sort_values([*groups, "eta"], kind="stable")
    out = rows[groups].drop_duplicates(ignore_index=True)
    for name in ("loss", "logit"):
        off = (rows[f"{name}_error"] >= _BOUND) & (rows[f"{name}_predicted"].abs() >= _ROUNDING)
        ever = off.groupby([rows[column] for column in groups]).cummax()
        held = rows["eta"].map(math.log10).where(~ever)
        best = held.groupby([rows[column] for column in groups]).max().rename(f"{name}_reach")
        out = out.merge(best.reset_index(), on=groups)
    return out


def _effect_panels(summary: pd.DataFrame) -> tuple[list[pd.DataFrame], list[str]]:
    """The loss' drop, predicted and measured, by eta, all layers together."""
    import pandas as pd

    rows = []
    whole = summary[summary["layer"] == -1].assign(at=summary["eta"])
    for which in WHICH:
        lines = []
        for line in ("measured", "predicted"):
            found = whole[(whole["quantity"] == f"loss_{line}") & (whole["which"] == which)]
            found = found.assign(line=line, mean=-found["mean"], low=-found["high"],
                                 high=-found["low"])  # fmt: skip
            lines.append(found)
        rows.append(pd.concat(lines))
    return rows, [f"step on {which}" for which in WHICH]


def _layer_panels(summary: pd.DataFrame) -> tuple[list[pd.DataFrame], list[str]]:
    """By layer: how long the parts of the output's change are, small step and large; the reach."""
    import pandas as pd

    layers = summary[summary["layer"] >= 0].assign(at=summary["layer"])
    etas = np.sort(layers["eta"].dropna().unique())
    rows, titles = [], []
    for eta in (etas[0], etas[-1]):
        lines = []
        for line in ("imprint", "shift", "cross"):
            found = layers[(layers["quantity"] == f"out_{line}") & (layers["which"] == "both")]
            found = found[found["eta"] == eta].assign(line=line)
            ends = {end: found[end] / eta for end in ("mean", "low", "high")}
            lines.append(found.assign(**ends))
        rows.append(pd.concat(lines))
        titles.append(f"parts of the output's change, eta {eta:g}")
    reach = layers[layers["quantity"] == "loss_reach"]
    rows.append(reach.assign(line=reach["which"]))
    titles.append("first order carries to (log10 eta)")
    return rows, titles
