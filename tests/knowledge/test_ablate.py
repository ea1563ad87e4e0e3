"""Rows taken away for a time."""

import pytest
import torch

from bwlens.knowledge import ablate, neurons
from tests import tiny
from tests.knowledge.by_hand import ByHand

TOKENS = torch.tensor([[5, 9, 30, 41, 17, 8]])


def logits(model):
    return model(TOKENS, return_type="logits")[0, -1].detach()


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_rows_are_gone_within_and_back_after(name, boot):
    model = boot(name)
    hf = ByHand(tiny.hf_model(name), TOKENS, 17)
    before, plain = state(model), logits(model)
    chosen = neurons(model, TOKENS, 17).top(3)
    with ablate(model, chosen):
        without = logits(model)
    assert same(model, before)
    assert torch.equal(logits(model), plain)
    for layer, index, expert in chosen:
        for tensor in hf._parameters(layer, index, expert, ("weight",)):
            tensor.zero_()
    expected = hf.hf(TOKENS, use_cache=False).logits[0, -1]
    torch.testing.assert_close(without, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without, plain)


def fail_within(model, before):
    with ablate(model, [(1, 3), (1, 4)], factor=2.0), ablate(model, -1):
        assert not same(model, before)
        raise RuntimeError("mine")


def test_also_after_an_exception_and_nested(boot):
    model = boot("gpt2")
    before = state(model)
    with ablate(model, (1, 3)):
        changed = state(model)
        with pytest.raises(RuntimeError, match="mine"):
            fail_within(model, before)
        assert same(model, changed)
    assert same(model, before)


def test_a_layer_is_all_of_its_rows(boot):
    model = boot("gpt2")
    width = model.cfg.d_mlp
    with ablate(model, 1):
        whole = logits(model)
    with ablate(model, [(1, row) for row in range(width)]):
        torch.testing.assert_close(logits(model), whole)


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ([], ValueError, "nothing to ablate"),
        ((1, 10_000), ValueError, "has rows 0 to 63, found 10000"),
        ((7, 1), ValueError, "layer 7 asked for"),
        ("all", TypeError, "'all' names nothing"),
        ((1, 3, 0), ValueError, "no mixture of experts"),
    ],
)
def test_what_is_not_there_is_said(what, error, says, boot):
    model = boot("gpt2")
    before = state(model)
    with pytest.raises(error, match=says), ablate(model, what):
        pass
    assert same(model, before)
