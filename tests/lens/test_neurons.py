"""Neurons that a step moves, against the dense gradient of one token."""

import pytest
import torch

import bwlens
from bwlens.model.sites import Site
from bwlens.model.weights import weight_of
from tests.fake_lens import fake_lens


@pytest.mark.parametrize("matrix", ["W_in", "W_out"])
def test_neurons_are_those_whose_part_of_a_tokens_own_gradient_is_longest(matrix):
    lens = fake_lens(200, 3, 5, ("W_in", "W_out"), silent=False)
    frame = lens.neurons(matrix, layers=[0, 2], positions=[1, -1], top_k=3)
    assert list(zip(frame.layer[::3], frame.pos[::3], strict=True)) == [
        (0, 1), (0, 4), (2, 1), (2, 4)]  # fmt: skip
    for start in range(0, len(frame), 3):
        rows = frame[start : start + 3]
        layer, pos = int(rows.layer[start]), int(rows.pos[start])
        part = lens.gradient(matrix, layer)
        sizes = torch.outer(part.x[pos], part.delta[pos]).norm(dim=int(matrix == "W_out"))
        assert [*map(int, rows.neuron)] == sizes.topk(3).indices.tolist()
        assert rows.moved.tolist() == pytest.approx(sizes.topk(3).values.tolist(), rel=1e-5)
        own = part.x[pos] if matrix == "W_out" else part.delta[pos]
        name = "activation" if matrix == "W_out" else "delta"
        indices = [*map(int, rows.neuron)]
        assert rows[name].tolist() == pytest.approx(own[indices].tolist())
    assert set(frame.word) == {""}


def test_a_token_without_gradient_moves_no_neuron():
    assert fake_lens(200, 3, 5, ("W_out",)).neurons(layers=-1).pos.unique().tolist() == [4]


def test_words_of_neurons_are_what_their_rows_of_W_out_read_as(bridge):
    model = bridge("llama")
    lens = bwlens.backward_lens(model, "t5 t9 t30", "t17", neurons=2)
    frame = lens.neurons(top_k=2)
    assert len(frame) > 0
    for row in frame.itertuples():
        weight = weight_of(model, Site("W_out", row.layer)).read()[int(row.neuron)]
        best = bwlens.readout(model, weight, 1, normalize=True).top_ids[0]
        assert row.word == model.tokenizer.decode(best)
    with pytest.raises(ValueError, match="W_O have no neurons"):
        bwlens.backward_lens(model, "t5 t9 t30", "t17", neurons=2, matrices="W_O")
    with pytest.raises(ValueError, match="'W_O' has no neurons"):
        lens.neurons("W_O")


def test_neurons_of_experts_are_named_with_them(bridge):
    model = bridge("mixtral")
    lens = bwlens.backward_lens(model, "t5 t9 t30", "t17", neurons=1)
    frame = lens.neurons(layers=-1, positions="last", top_k=1)
    expert, index = frame.neuron[0].split(".")
    weight = weight_of(model, Site("W_out", int(frame.layer[0]), int(expert))).read()[int(index)]
    best = bwlens.readout(model, weight, 1, normalize=True).top_ids[0]
    assert frame.word[0] == model.tokenizer.decode(best)
