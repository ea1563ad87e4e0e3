"""Which vector a cell reads, and of which token it gives the rank, by a loop over the cells."""

import pytest
import torch

import bwlens
from bwlens.lens.backward import READ_THROUGH
from tests import tiny

PROMPT = "t5 t9 t30 t41 t8"
TARGET = "t17 t20 t21"
MATRICES = ["W_in", "W_gate", "W_out", "W_Q", "W_K", "W_V", "W_O"]


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.bridge("llama", tokenizer)


@pytest.fixture(scope="module")
def lens(model):
    return bwlens.backward_lens(model, PROMPT, TARGET, matrices=MATRICES, prepend_bos=False)


@pytest.fixture(scope="module")
def next_word(model):
    """The model's probabilities of what comes after the prompt alone."""
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 30, 41, 8]]))[0, -1].softmax(-1)


@pytest.mark.parametrize("matrix", MATRICES)
def test_ranks_of_target_and_answer(model, lens, next_word, matrix):
    target, answer = 17, int(next_word.argmax())
    assert answer not in (17, 20, 21)
    targets, answers = lens.target_ranks(matrix), lens.answer_ranks(matrix)
    assert targets.shape == answers.shape == (tiny.LAYERS, 7)
    for layer in range(tiny.LAYERS):
        gradient = lens.gradients[matrix, layer]
        for pos, vector in enumerate(getattr(gradient, READ_THROUGH[matrix])):
            if not gradient.delta[pos].any():
                assert targets[layer, pos] == answers[layer, pos] == -1
                continue
            with torch.no_grad():
                scores = model.unembed(model.ln_final(vector[None, None]))[0, 0]
            order = scores.argsort(descending=True).tolist()
            assert targets[layer, pos] == order.index(target)
            assert answers[layer, pos] == order.index(answer)
    spread = targets[targets >= 0].unique(), answers[answers >= 0].unique()
    assert min(map(len, spread)) > 2


def test_attention_reads_what_enters_attention(lens):
    for matrix in ("W_K", "W_V"):
        assert torch.equal(lens.readout(matrix).top_ids, lens.readout("W_Q").top_ids)
    assert torch.equal(lens.readout("W_gate").top_ids, lens.readout("W_in").top_ids)
    assert not torch.equal(lens.readout("W_Q").top_ids, lens.readout("W_in").top_ids)
    assert not torch.equal(lens.readout("W_O").bottom_ids, lens.readout("W_out").bottom_ids)


def test_probability_is_the_first_target_tokens(lens, next_word):
    assert lens.target_ids == (17, 20, 21)
    assert lens.target_probability == pytest.approx(float(next_word[17]), rel=1e-5)
    assert lens.answer_probability == pytest.approx(float(next_word.max()), rel=1e-5)
    assert float(next_word[17]) != pytest.approx(float(next_word[21]), rel=1e-2)
