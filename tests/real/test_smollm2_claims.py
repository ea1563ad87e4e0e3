"""What is said of every model, held against a real one: SmolLM2-135M-Instruct."""

import pytest
import torch

import bwlens
from bwlens import experiments
from bwlens.model.sites import available_matrices
from tests import oracle

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]

FRANCE = "The capital of France is"
FACTS = [
    bwlens.Edit("The capital of {} is", subject, target_new)
    for subject, target_new in (
        ("France", " Rome"),
        ("Japan", " Paris"),
    )
]


@pytest.fixture(scope="module")
def lens(smollm2):
    return bwlens.backward_lens(smollm2, FRANCE, " Rome", subject="France", prepend_bos=False)


def test_every_gradient_is_that_of_an_unbridged_copy(smollm2):
    """All seven matrices of the lowest, a middle and the highest layer."""
    wrapped, layers = smollm2.original_model, (0, 14, 29)
    state = {
        name.replace("_original_component.", "").replace(".original_component", ""): tensor
        for name, tensor in wrapped.state_dict().items()
    }
    hf = type(wrapped)(wrapped.config)
    hf.load_state_dict({name: state[name] for name in hf.state_dict()})
    matrices = available_matrices(smollm2)
    assert matrices == bwlens.MATRICES
    grads = bwlens.capture(smollm2, FRANCE, " Rome", matrices, layers, prepend_bos=False)
    tokens = grads.batch.tokens
    target = grads.batch.targets[0][0]
    loss = -hf.eval()(tokens).logits[0, -1].log_softmax(-1)[target]
    loss.backward()
    assert float(grads.losses[0]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for site, gradient in grads.items():
        expected = oracle.dense(hf, site.matrix, site.layer)
        assert oracle.relative_error(gradient.dense(), expected) < 5e-5, site
    assert len(grads) == 21


def test_the_words_of_the_upper_layers_and_what_lies_below(lens):
    places = lens.target_places("W_out")[:, -1]
    assert (places[23:29] == 1).all()
    assert (places[:15] > 1000).sum() >= 13  # the plain reading says little there
    assert lens.answer == " Paris"
    assert [row[-1][0] for row in lens.words()][23:28] == [" Rome"] * 5
    assert lens.norms()[-1, :-1].eq(0).all()


def test_a_step_along_delta_does_what_its_norm_says(smollm2):
    report = bwlens.check(
        smollm2, FRANCE, matrices=["W_out", "W_Q"], layers=[3, 15], progress=False
    )
    assert report.ok, report


def test_a_sweep_over_facts(smollm2, tmp_path):
    done = experiments.sweep(["target_rank"], smollm2, FACTS, tmp_path / "sweep")
    assert done.finished
    assert not done.failures
    ranks = done["target_rank"].rows
    assert ranks["item"].nunique() == 2
    last = ranks[(ranks["segment"] == "last") & (ranks["matrix"] == "W_out")]
    by_layer = last.groupby("layer")["target_rank"].median()
    assert by_layer[25] > 49_000 > by_layer[10]
    assert done.index.is_file()


def test_an_edit_is_the_answer_and_is_undone_bit_for_bit(smollm2):
    tokens = smollm2.to_tokens(FRANCE, prepend_bos=False)
    with torch.no_grad():
        before = smollm2(tokens)
        change = bwlens.edit.forward_pass_shift(smollm2, FACTS[0], layer=25, prepend_bos=False)
        with change.applied(smollm2):
            edited = smollm2(tokens)[0, -1].argmax()
        after = smollm2(tokens)
    assert smollm2.tokenizer.decode(edited) == " Rome"
    assert torch.equal(before, after)
