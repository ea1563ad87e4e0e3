"""A step for each prompt of a batch, against the same changes made in the weights one by one."""

import pytest
import torch

import bwlens
from bwlens import Site
from bwlens.edit import WeightChange
from bwlens.experiments.own_steps import dense_taps, full_matrix, low_rank, padded, stepped
from bwlens.model.sites import available_matrices
from tests import cases, tiny

DENSE = [name for name in tiny.CONFIGS if name != "mixtral"]
HOOKED = pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")
LAYER = 1


def captured(model, matrices):
    tokens, mask = cases.padded(cases.PROMPTS)
    objective = bwlens.NLL(cases.TARGETS)
    return bwlens.capture(model, tokens, objective, matrices, attention_mask=mask)


def one_by_one(model, grads, sites, etas):
    """Logits of each prompt alone, with the step really made in the weights."""
    rows = []
    for index, eta in enumerate(etas):
        parts = {site: -eta * grads[site].for_prompt(index) for site in sites}
        tokens = grads.batch.tokens[index : index + 1, : int(grads.batch.lengths[index])]
        with WeightChange(parts).applied(model), torch.no_grad():
            rows.append(model(tokens)[0])
    return rows


def check(model, matrices, tolerance=2e-4):
    """Every matrix alone, all together, and a step size for each prompt."""
    grads = captured(model, matrices)
    batch, every = grads.batch, [Site(matrix, LAYER) for matrix in matrices]
    before = model.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    etas = torch.tensor([0.3, 0.05, 0.5])
    for sites in (*([site] for site in every), every):
        changes = {site: low_rank(*padded(grads[site], batch), -etas) for site in sites}
        found = stepped(model, batch, changes).logits
        plain = stepped(model, batch, {}).logits
        expected = one_by_one(model, grads, sites, etas.tolist())
        for index, row in enumerate(expected):
            n = len(row)
            moved = (row - plain[index, :n]).abs().max()
            assert moved > 1e-3, "the step is too small to show anything"
            assert (found[index, :n] - row).abs().max() <= tolerance * max(0.5, float(moved))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", DENSE)
def test_mlps_of_every_architecture(name, bridge):
    model = bridge(name)
    check(model, [m for m in ("W_in", "W_gate", "W_out") if m in available_matrices(model)])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attention_and_compatibility_mode(name, bridge):
    check(bridge(name), ["W_V", "W_O", "W_in"])
    check(bridge(name, compatibility=True), ["W_in", "W_out", "W_O"])


@HOOKED
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_hooked_transformer(name):
    model = tiny.hooked_transformer(name)
    check(model, [m for m in ("W_in", "W_gate", "W_out") if m in available_matrices(model)])


def test_a_whole_matrix_is_the_same_as_its_rows(bridge):
    model = bridge("llama")
    grads = captured(model, ["W_out"])
    site, batch = Site("W_out", LAYER), grads.batch
    dense = torch.stack([part.dense() for part in grads[site].split()])
    etas = torch.tensor([0.3, 0.05, 0.5])
    found = stepped(model, batch, {site: full_matrix(dense, -etas)}).logits
    expected = stepped(model, batch, {site: low_rank(*padded(grads[site], batch), -etas)}).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_passed_is_kept_with_its_change(bridge):
    model = bridge("gpt2")
    grads = captured(model, ["W_in", "W_out"])
    taps = dense_taps(model, ["W_in", "W_out"], [LAYER])
    plain = stepped(model, grads.batch, {}, taps)
    last = grads.batch.last
    for site in taps:
        x, _ = padded(grads[site], grads.batch)
        torch.testing.assert_close(plain.x[site], x[torch.arange(3), last])
    site = Site("W_out", LAYER)
    ones = torch.ones_like(plain.z[site])
    found = stepped(model, grads.batch, {site: lambda x: torch.ones(*x.shape[:2], 16)}, taps)
    torch.testing.assert_close(found.z[site], plain.z[site] + ones)


def test_training_mode_and_hooks_are_as_before(boot):
    model = boot("gpt2")
    model.train()
    hooks = sum(len(module._forward_hooks) for module in model.modules())

    def fails(x):
        raise RuntimeError("inside")

    grads = captured(model, ["W_out"])
    with pytest.raises(RuntimeError, match="inside"):
        stepped(model, grads.batch, {Site("W_out", 0): fails})
    assert model.training
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_experts_are_refused(bridge):
    with pytest.raises(NotImplementedError, match="mixture of experts"):
        dense_taps(bridge("mixtral"), ["W_out"], [0])
