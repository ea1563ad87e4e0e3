"""Lemma 5.2's experiment against steps really made in the weights, prompt by prompt, in loops."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import bwlens
from bwlens import Edit, Site
from bwlens.edit import WeightChange
from bwlens.experiments._imprint_shift import ImprintShift, imprint_shift
from bwlens.experiments.stepped_layer import TargetLogit
from bwlens.gradient.objectives import NLL
from bwlens.model.flows import as_rows
from bwlens.model.passes import run
from bwlens.model.sites import available_matrices, find_taps
from bwlens.model.weights import weight_of
from tests import tiny

EDITS = [
    Edit("t7 {} t9", "t5 t6", " t20"),
    Edit("{} t30 t31 t32", "t8", " t21 t22"),
    Edit("t11 t12 {}", "t5 t33", " t40"),
]
ETAS = (0.05, 1.0)
LAYER = 1
HOOKED = pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")


def test_exact_pre_activation_identity_of_one_token(bridge):
    """One token: nothing stamps in but itself, and the lemma is the whole truth."""
    model = bridge("gpt2")
    rows = imprint_shift(model, [Edit("{}", "t9", " t20")], prepend_bos=False, etas=[0.5]).rows
    assert set(rows["layer"]) == {0, 1, 2}
    inside = rows[rows["which"] != "W_out"]
    assert (inside["pre_cross"] == 0).all()
    assert (inside["pre_error"] < 1e-5).all()
    assert (inside["pre_cosine"] > 1 - 1e-5).all()
    assert (rows[rows["which"] != "W_in"]["lemma_error"] == 0).all()


def passing(model, edit, sites):
    """The last prompt token's x and z of some sites, and loss and logit, from a plain pass."""
    matrices, layer = [site.matrix for site in sites], sites[0].layer
    taps = find_taps(model, matrices, [layer])
    grads = bwlens.capture(model, edit.text, NLL(edit.target_new), matrices, [layer])
    logit = bwlens.capture(model, edit.text, TargetLogit(edit.target_new), matrices, [layer])
    at = int(grads.batch.last[0])
    x, z = {}, {}
    for flow in run(model, grads.batch.tokens, taps=taps).flows:
        x[flow.tap.site] = as_rows(flow.x.detach())[at].double()
        z[flow.tap.site] = as_rows(flow.z.detach())[at].double()
    return x, z, float(grads.losses[0]), float(logit.losses[0]), grads, logit


def oracle(model, edit, layer, which, eta):
    """One row, by loops over tokens and a change of the weights themselves."""
    names = [m for m in ("W_in", "W_gate", "W_out") if m in available_matrices(model)]
    sites = [Site(name, layer) for name in names]
    inside, out = sites[:-1], sites[-1]
    changed = {"W_in": inside, "W_out": [out], "both": sites}[which]
    x, z, loss, logit, grads, raised = passing(model, edit, sites)
    at = int(grads.batch.last[0])
    change = WeightChange({site: -eta * grads[site] for site in changed})
    W_out = weight_of(model, out).read().double()
    with change.applied(model):
        x_new, z_new, loss_new, logit_new, _, _ = passing(model, edit, sites)
    row = {}
    if which != "W_out":
        imprint, cross = 0.0, 0.0
        for site in inside:
            g = grads[site]
            terms = [
                -eta * float(g.x[j].double() @ x[site]) * g.delta[j].double() for j in range(g.n)
            ]
            own = torch.zeros(g.d_out, dtype=torch.float64)
            own += terms[at]
            others = sum((t for j, t in enumerate(terms) if j != at), torch.zeros_like(own))
            imprint = imprint + float(own.square().sum())
            cross = cross + float(others.square().sum())
        row["pre_imprint"], row["pre_cross"] = math.sqrt(imprint), math.sqrt(cross)
        moved = torch.cat([z_new[s] - z[s] for s in inside])
        row["pre_change"] = float(moved.norm())
    a, delta = x[out], grads[out].delta.double()
    moved = x_new[out] - a
    imprint = moved @ W_out
    step = torch.zeros_like(W_out)
    if which != "W_in":
        for j in range(grads[out].n):
            step -= eta * torch.outer(grads[out].x[j].double(), delta[j])
        row["out_lemma"] = eta * float(a @ a) * float(delta[at].norm())
    parts = {"imprint": imprint, "shift": a @ step, "cross": moved @ step}
    down = -delta[at] / delta[at].norm()
    row["out_change"] = float((z_new[out] - z[out]).norm())
    for name, part in parts.items():
        row[f"out_{name}"] = float(part.norm())
        row[f"{name}_on"] = float(part @ down)
    row["loss_measured"], row["logit_measured"] = loss_new - loss, logit_new - logit
    row["loss_predicted"] = -eta * sum(float(grads[s].inner(grads[s])) for s in changed)
    row["logit_predicted"] = -eta * sum(float(raised[s].inner(grads[s])) for s in changed)
    return row


def check(model, layers=(LAYER,)):
    result = imprint_shift(model, EDITS, layers=layers, etas=ETAS, progress=False)
    assert len(result.rows) == len(EDITS) * len(layers) * 3 * len(ETAS)
    for row in result.rows.to_dict("records"):
        edit = EDITS[row["item"]]
        expected = oracle(model, edit, row["layer"], row["which"], row["eta"])
        for name, value in expected.items():
            scale = max(abs(value), row["out_change"] if name.endswith("_on") else 0.0)
            assert row[name] == pytest.approx(value, abs=2e-3 * scale + 2e-5), (name, row)
        assert row["out_error"] < 1e-4
        for name in ("loss", "logit"):
            predicted, measured = row[f"{name}_predicted"], row[f"{name}_measured"]
            error = abs(measured - predicted) / abs(predicted)
            assert row[f"{name}_error"] == pytest.approx(error, rel=1e-5)
    return result


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_against_real_steps(name, bridge):
    check(bridge(name))


@HOOKED
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_against_real_steps_of_a_hooked_transformer(name, tokenizer):
    check(tiny.hooked_transformer(name, tokenizer=tokenizer))


def test_cross_terms_of_the_effects(bridge):
    rows = imprint_shift(bridge("gpt2"), EDITS, etas=ETAS, progress=False).rows
    keys = ["item", "layer", "eta"]
    table = rows.pivot_table(index=keys, columns="which", values="loss_measured")
    both = rows[rows["which"] == "both"].set_index(keys)["loss_cross"]
    expected = table["both"] - table["W_in"] - table["W_out"]
    pd.testing.assert_series_equal(both.sort_index(), expected, check_names=False)
    assert rows[rows["which"] != "both"]["loss_cross"].isna().all()


def test_first_order_gets_better_as_the_step_shrinks(bridge):
    etas = (0.01, 0.1, 1.0)
    rows = imprint_shift(bridge("llama"), EDITS, etas=etas, progress=False).rows
    rows = rows[rows["loss_predicted"].abs() > 1e-2]
    small, large = (rows[rows["eta"] == eta]["loss_error"].median() for eta in (0.01, 1.0))
    assert small < 0.05 < large


def test_reach_is_the_last_step_before_the_error():
    rows = pd.DataFrame(
        {
            "item": 0,
            "layer": 0,
            "which": "W_in",
            "eta": [0.001, 0.01, 0.1, 1.0],
            "loss_error": [0.5, 0.05, 0.3, 0.01],  # the first is rounding, the last is chance
            "loss_predicted": [-1e-5, -1e-2, -1.0, -10.0],
            "logit_error": [0.2, 0.2, 0.2, 0.2],
            "logit_predicted": [1.0, 1.0, 1.0, 1.0],
        }
    )
    summary = ImprintShift().summarize(rows.sample(frac=1, random_state=0))
    reach = summary[(summary["quantity"] == "loss_reach") & (summary["layer"] == 0)]
    assert reach["mean"].tolist() == [pytest.approx(math.log10(0.01))]
    assert np.isnan(reach["eta"]).all()
    assert "logit_reach" not in set(summary["quantity"])


def test_batch_as_one_by_one(bridge):
    model = bridge("llama")
    together = imprint_shift(model, EDITS, etas=ETAS, progress=False).rows
    singly = [imprint_shift(model, [edit], etas=ETAS, progress=False).rows for edit in EDITS]
    alone = pd.concat([rows.assign(item=item) for item, rows in enumerate(singly)])
    keys = ["item", "layer", "which", "eta"]
    a, b = (rows.set_index(keys).sort_index() for rows in (together, alone))
    for name in ("pre_change", "out_change", "out_cross", "loss_measured", "logit_predicted"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=2e-5)


def test_summary_and_figure(bridge):
    result = imprint_shift(bridge("gpt2"), EDITS, etas=ETAS, progress=False)
    whole = result.summary[result.summary["layer"] == -1]
    mean = whole.query("quantity == 'loss_measured' and which == 'both' and eta == 1.0")
    rows = result.rows.query("which == 'both' and eta == 1.0")
    assert mean["mean"].item() == pytest.approx(rows["loss_measured"].mean())
    assert mean["n"].item() == len(EDITS)
    assert len(result.figure().axes) == 6


def test_what_does_not_fit_is_refused(bridge):
    with pytest.raises(NotImplementedError, match="mixture of experts"):
        imprint_shift(bridge("mixtral"), EDITS)
    with pytest.raises(ValueError, match="all positive"):
        imprint_shift(bridge("gpt2"), EDITS, etas=[0.1, -1.0])
    with pytest.raises(ValueError, match="layers 0 to 2"):
        imprint_shift(bridge("gpt2"), EDITS, layers=[7])
