"""Neurons of the dense gradient against the spanning vectors: one lens at a time, in loops."""

import math

import numpy as np
import pytest
import torch

import bwlens
from bwlens import Edit, LowRankGradient
from bwlens.experiments._naive_reading import naive_map, naive_reading
from bwlens.gradient.objectives import NLL
from bwlens.lens.backward import READ_THROUGH
from tests import tiny

EDITS = [
    Edit("t7 {} t9", "t5 t6", " t20"),
    Edit("{} t30 t31 t32", "t8", " t21 t22"),
    Edit("t11 t12 {}", "t5 t33", " t40"),
]
TOP = 8


def top_words(model, vector, top, normalize):
    """The lens of one vector, by the model's own modules."""
    with torch.no_grad():
        v = vector / vector.norm() if normalize else vector
        logits = model.unembed(model.ln_final(v[None, None]))[0, 0]
    return set(logits.topk(top).indices.tolist())


def slow_map(model, edit, matrix, layer, top, normalize=True, owner=None):
    grads = bwlens.capture(model, edit.text, NLL(edit.target_new), [matrix], layer)
    vectors_of = bwlens.capture(
        model, (owner or edit).text, NLL((owner or edit).target_new), [matrix], layer
    )
    dense = grads[matrix, layer].dense()
    neurons = dense if READ_THROUGH[matrix] == "delta" else dense.T
    vectors = getattr(vectors_of[matrix, layer], READ_THROUGH[matrix])
    cosine = torch.full((len(neurons), len(vectors)), math.nan)
    overlap = cosine.clone()
    for k, neuron in enumerate(neurons):
        for i, vector in enumerate(vectors):
            if not neuron.any() or not vector.any():
                continue
            cosine[k, i] = torch.cosine_similarity(neuron, vector, dim=0)
            sign = -1 if cosine[k, i] < 0 else 1
            mine = top_words(model, neuron, top, normalize)
            theirs = top_words(model, sign * vector, top, normalize)
            overlap[k, i] = len(mine & theirs) / top
    return neurons, cosine, overlap


@pytest.mark.parametrize("matrix", ["W_out", "W_in", "W_O"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_map_against_one_lens_at_a_time(name, matrix, bridge):
    model = bridge(name)
    for layer in (1, 2):
        found = naive_map(model, EDITS[0], matrix=matrix, layer=layer, top_k=TOP)
        _, cosine, overlap = slow_map(model, EDITS[0], matrix, layer, TOP)
        torch.testing.assert_close(
            found.cosine.float(), cosine, rtol=1e-3, atol=1e-3, equal_nan=True
        )
        # Rounding may move a word over the edge of the top, not two.
        torch.testing.assert_close(
            found.overlap.float(), overlap, rtol=0, atol=1.01 / TOP, equal_nan=True
        )
        assert (found.overlap - overlap).abs().nan_to_num().mean() < 0.01
        assert found.cosine.isnan().any() == (layer == 2 and READ_THROUGH[matrix] == "delta")


def test_of_one_spanning_vector_every_neuron_is_a_multiple(bridge):
    """The last layer's gradient has rank 1: the naive reading says one thing, over and over."""
    for matrix in ("W_out", "W_in"):
        edits = [EDITS[0], EDITS[2]]  # targets of one token
        result = naive_reading(
            bridge("llama"), edits, matrices=matrix, layers=2, top_k=TOP, progress=False
        )
        assert (result.rows["cosine"] > 1 - 1e-5).all()
        assert (result.rows["overlap"] > 1 - 1e-5).all()
        assert (result.rows["explained"] > 1 - 1e-9).all()


def test_a_negative_multiple_is_compared_with_the_other_end(bridge):
    """With a bias in the final norm the words of -v are no mirror image of those of v."""
    found = naive_map(bridge("gpt2"), EDITS[0], matrix="W_out", layer=2, top_k=TOP)
    last = found.cosine[:, -1]
    assert (last < -0.99).any()
    assert (last > 0.99).any()
    torch.testing.assert_close(found.overlap[:, -1], torch.ones_like(last))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_rows_are_means_of_the_best(name, bridge):
    model = bridge(name)
    result = naive_reading(model, EDITS, layers=[1], top_k=TOP, neurons=10, progress=False)
    batch = in_batch(model)
    for row in result.rows.to_dict("records"):
        edit = EDITS[row["item"]]
        after = EDITS[batch[(batch.index(row["item"]) + 1) % len(batch)]]
        for prefix, owner in (("", None), ("control_", after)):
            neurons, cosine, overlap = slow_map(model, edit, row["matrix"], 1, TOP, owner=owner)
            strongest = neurons.norm(dim=1).topk(10).indices
            best = cosine.abs().nan_to_num(0)[strongest].amax(1).mean()
            assert row[f"{prefix}cosine"] == pytest.approx(float(best), abs=1e-3)
            best = overlap.nan_to_num(0)[strongest].amax(1).mean()
            assert row[f"{prefix}overlap"] == pytest.approx(float(best), abs=0.03)
        values = torch.linalg.svdvals(slow_map(model, edit, row["matrix"], 1, TOP)[0].double())
        share = values[0] ** 2 / values.square().sum()
        assert row["explained"] == pytest.approx(float(share), rel=1e-4)


def in_batch(model):
    """The items as they stand in a batch: by length."""
    lengths = [len(model.to_tokens(edit.text)[0]) + (i == 1) for i, edit in enumerate(EDITS)]
    return sorted(range(len(EDITS)), key=lambda item: (lengths[item], item))


def test_a_batch_of_one_has_no_control(bridge):
    rows = naive_reading(bridge("gpt2"), EDITS[:1], top_k=TOP, progress=False).rows
    assert rows["control_cosine"].isna().all()
    assert rows["cosine"].notna().all()


def test_experts_one_by_one(bridge):
    rows = naive_reading(bridge("mixtral"), EDITS, layers=[1], top_k=TOP, progress=False).rows
    assert len(set(rows["expert"])) > 1
    assert (rows["cosine"] <= 1 + 1e-6).all()
    with pytest.raises(NotImplementedError, match="mixture of experts"):
        naive_map(bridge("mixtral"), EDITS[0], layer=1, top_k=TOP)


def test_sorting_and_figures(bridge):
    model = bridge("gpt2")
    found = naive_map(model, EDITS[0], layer=1, top_k=TOP, neurons=12)
    assert len(found.neurons) == len(found.nearest) == 12
    expected = [int(np.argmax(row)) for row in found.cosine.abs().numpy()]
    assert found.nearest.tolist() == expected
    assert len(found.tokens) == found.cosine.shape[1]
    assert found._repr_png_()[0].startswith(b"\x89PNG")
    assert "12 neurons" in repr(found)
    result = naive_reading(model, EDITS, top_k=TOP, progress=False)
    assert set(result.summary["n"]) == {len(EDITS)}
    assert len(result.figure().axes) == 3


def test_the_neurons_are_those_of_the_dense_gradient(bridge):
    found = naive_map(bridge("llama"), EDITS[0], matrix="W_in", layer=1, top_k=TOP, neurons=5)
    gradient = bwlens.capture(bridge("llama"), EDITS[0].text, " t20", ["W_in"], 1)["W_in", 1]
    assert isinstance(gradient, LowRankGradient)
    norms = gradient.dense().norm(dim=0)
    assert found.neurons.tolist() == sorted(norms.topk(5).indices.tolist())


def test_what_does_not_fit_is_refused(bridge):
    model = bridge("gpt2")
    with pytest.raises(ValueError, match=f"1 to {tiny.VOCAB}"):
        naive_map(model, EDITS[0], layer=1, top_k=100)
    with pytest.raises(ValueError, match="expected 1 or more"):
        naive_map(model, EDITS[0], layer=1, top_k=TOP, neurons=0)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        naive_map(model, EDITS[0], layer=5, top_k=TOP)
