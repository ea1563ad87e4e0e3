"""Lemma 5.2 against a real step: what a step on one layer's MLP stamps in, and what it shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bwlens.data.given import Edits
from bwlens.experiments.base import Experiment, Reading, Result
from bwlens.experiments.columns import frame
from bwlens.experiments.own_steps import dense_taps, stepped
from bwlens.experiments.running import run
from bwlens.experiments.stepped_layer import WHICH, SteppedLayer, TargetLogit
from bwlens.gradient.capturing import capture
from bwlens.gradient.objectives import NLL
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, available_matrices, resolve_layers
from bwlens.runs.intervals import summarize

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ETAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Step sizes: from where first order holds to well beyond, for models of the demo's size."""

_BOUND = 0.1
"""First order carries as long as it is off by less than this share."""

_ROUNDING = 1e-3
"""Predicted changes of a loss or logit below this are too near the rounding to be judged."""


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
    caption: ClassVar[str] = (
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
        matrices = _mlp_matrices(model)
        if not {"W_in", "W_out"} <= set(matrices):
            raise NotImplementedError(f"{self.name}: this model has no MLP to step on")
        dense_taps(model, matrices, resolve_layers(model, self.layers))
        return matrices

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
            mlp = SteppedLayer(reading.model, reading.grads, raised, here, before, NLL(targets))
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
    model: LensModel,
    records: Edits,
    *,
    layers: Layers = None,
    etas: Sequence[float] = ETAS,
    **options: Any,
) -> Result:
    """What a step on W_in, W_out or both of one layer does, predicted and measured.

    The settings are those of `ImprintShift`, the options those of `run`.

    Raises:
        ValueError: A step size that is not positive, or no such layer.
        NotImplementedError: A layer is a mixture of experts.

    Example:
        >>> result = imprint_shift(model, edits, layers=[5])  # doctest: +SKIP
        >>> result.summary.query("quantity == 'loss_reach'")  # doctest: +SKIP
    """
    task = ImprintShift.of(model, layers, etas=tuple(map(float, etas)))
    return run(task, model, records, **options)


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
