"""Changes of weights applied and undone, bit for bit."""

import gc
import weakref

import pytest
import torch

import bwlens
from bwlens import LowRankGradient, Site
from bwlens.edit import WeightChange
from bwlens.model.weights import weight_of
from tests import tiny
from tests.changed import HOOKED, TOKENS, assert_untouched, change_of, linear_of, state

# Apply and undo.

SITES = (Site("W_out", 1), Site("W_in", 0), Site("W_Q", 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi3"])
def test_applied_and_undone_bit_for_bit(name, dtype, boot):
    """Sums in float32 at least, rounded once; then every bit as before."""
    model = boot(name, dtype)
    before, values = state(model), {s: weight_of(model, s).read() for s in SITES}
    change = change_of(model, *SITES)
    with change.applied(model):
        for site in SITES:
            wide = torch.promote_types(dtype, torch.float32)
            expected = (values[site].to(wide) + change[site].to(dtype=wide).dense()).to(dtype)
            assert torch.equal(weight_of(model, site).read(), expected)
            assert not torch.equal(expected, values[site])
    assert_untouched(model, before)


@HOOKED
def test_applied_to_a_hooked_transformer():
    model = tiny.hooked_transformer("llama")
    before = state(model)
    with torch.no_grad():
        logits = model(TOKENS)
        with change_of(model, *SITES, Site("W_K", 1), Site("W_O", 1)).applied(model):
            assert not torch.allclose(model(TOKENS), logits)
        assert torch.equal(model(TOKENS), logits)
    assert_untouched(model, before)


def test_undone_after_an_exception(boot):
    model = boot("mixtral")
    before = state(model)
    change = change_of(model, Site("W_gate", 1, 2), Site("W_out", 1, 2))
    with pytest.raises(KeyboardInterrupt), change.applied(model):
        raise KeyboardInterrupt
    assert_untouched(model, before)


def test_an_interruption_while_applying(boot, monkeypatch):
    """Matrices written before it are put back."""
    model = boot("gpt2")
    before, change = state(model), change_of(model, *SITES)
    written = []
    real = bwlens.model.weights.Weight.write

    def interrupted(weight, values):
        real(weight, values)
        written.append(weight.site)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(bwlens.model.weights.Weight, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        change.apply(model)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="not applied to this model"):
        change.undo(model)


def test_requires_grad_and_grad_stay(boot):
    model = boot("llama")
    linear_of(model).weight.grad = torch.ones_like(linear_of(model).weight)
    model.blocks[0].requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with change_of(model, *SITES).applied(model):
        pass
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert (linear_of(model).weight.grad == 1).all()
    assert sum(p.grad is not None for p in model.original_model.parameters()) == 1


def test_nesting(boot):
    """Changes of one matrix stack, and come off in reverse."""
    model, site = boot("llama"), Site("W_out", 1)
    before = state(model)
    first, second = change_of(model, site), change_of(model, site, seed=7)
    value = weight_of(model, site).read()
    with first.applied(model):
        between = weight_of(model, site).read()
        with second.applied(model):
            both = weight_of(model, site).read()
            torch.testing.assert_close(both, value + (first + second)[site].dense())
            with pytest.raises(ValueError, match=r"another change of W_out of layer 1 was applied"):
                first.undo(model)
            assert torch.equal(weight_of(model, site).read(), both)
        assert torch.equal(weight_of(model, site).read(), between)
    assert_untouched(model, before)


def test_undone_in_any_order_where_they_do_not_meet(boot):
    model = boot("llama")
    before = state(model)
    first, second = change_of(model, SITES[0]), change_of(model, SITES[1])
    first.apply(model)
    second.apply(model)
    first.undo(model)
    second.undo(model)
    assert_untouched(model, before)


def test_applied_twice_or_undone_twice(boot):
    model = boot("llama")
    before, change = state(model), change_of(model, *SITES)
    change.apply(model)
    once = state(model)
    for again in (lambda: change.apply(model), lambda: change.edited(model)):
        with pytest.raises(ValueError, match="is applied to this model already"):
            again()
    assert_untouched(model, once)
    change.undo(model)
    with pytest.raises(ValueError, match="is not applied to this model"):
        change.undo(model)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({("W_gate", 0): (16, 64)}, ValueError, "W_gate: no such matrix in layer 0"),
        ({("W_in", 5): (16, 64)}, ValueError, "layer 5 asked for"),
        (
            {("W_in", 0): (64, 16)},
            ValueError,
            r"W_in of layer 0 is \[16, 64\] in this model, but the change of it \[64, 16\]",
        ),
        ({("W_in", 0): (16, 63)}, ValueError, r"but the change of it \[16, 63\]"),
    ],
    ids=["matrix", "layer", "transposed", "width"],
)
def test_a_change_that_does_not_fit(parts, error, message, boot):
    """Nothing is changed, also where other parts of the change would fit."""
    model = boot("gpt2")
    before = state(model)
    rows = {
        key: LowRankGradient(torch.ones(1, d_in), torch.ones(1, d_out))
        for key, (d_in, d_out) in parts.items()
    }
    rows["W_out", 0] = LowRankGradient(torch.ones(1, 64), torch.ones(1, 16))
    change = WeightChange(rows)
    for use in (change.apply, change.edited):
        with pytest.raises(error, match=message):
            use(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="the change of W_out of layer 1 holds nan or inf"):
        WeightChange({("W_out", 1): LowRankGradient(torch.full((1, 4), bad), torch.ones(1, 3))})


def test_a_sum_that_overflows(boot):
    model = boot("gpt2", torch.float16)
    before = state(model)
    with pytest.raises(ValueError, match=r"would hold nan or inf in torch.float16"):
        (1e6 * change_of(model, *SITES)).apply(model)
    assert_untouched(model, before)


def test_layers_counted_from_the_end():
    with pytest.raises(ValueError, match="W_out of layer -1: a change belongs to no model"):
        WeightChange({("W_out", -1): LowRankGradient(torch.ones(1, 4), torch.ones(1, 3))})


def test_a_model_is_not_kept_alive(boot):
    model = boot("gpt2")
    change = change_of(model, *SITES)
    change.apply(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
