"""Weights found where they live."""

import pytest
import torch
from torch import nn

from bwlens import Site
from bwlens.model.sites import available_matrices
from bwlens.model.weights import weight_of, weights_of
from tests import oracle, tiny
from tests.changed import HOOKED, change_of, linear_of, passing, random_change

# Where weights live.


def check_weights_of_a_layer(model, layer=1):
    """A change of a weight moves z by exactly x @ change, at that site alone."""
    before = passing(model)
    assert {site.matrix for site in before} == set(available_matrices(model))
    weights = {site: weight_of(model, site) for site in before}
    values = {site: weight.read() for site, weight in weights.items()}
    for site in (site for site in before if site.layer == layer):
        weight, (x, z) = weights[site], before[site]
        assert weight.shape == (x.shape[1], z.shape[1])
        change = random_change(weight).dense()
        weight.add(change)
        after = passing(model)
        error = oracle.relative_error(after[site][1] - z, x @ change)
        assert error < 1e-4, f"{site}: {error:.1e}"
        for other, (x_before, z_before) in before.items():
            if other == site:
                continue
            assert torch.equal(weights[other].read(), values[other]), f"{other} with {site}"
            x_after, z_after = after.get(other, (None, None))
            if x_after is not None and torch.equal(x_after, x_before):
                assert torch.equal(z_after, z_before), f"{other} with {site}"
        weight.write(values[site])
    for site, (x, z) in passing(model).items():
        assert torch.equal(x, before[site][0])
        assert torch.equal(z, before[site][1])


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_weight_of_a_bridge(name, processed, boot):
    check_weights_of_a_layer(boot(name, compatibility=processed))


@HOOKED
@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_every_weight_of_a_hooked_transformer(name, processed):
    check_weights_of_a_layer(tiny.hooked_transformer(name, processed))


@pytest.mark.parametrize(
    "name",
    ["bloom", "qwen2_moe", "deepseek_v3", "qwen3_5_full_attention", "granite_moe_hybrid", "rwkv"],
)
def test_weights_of_further_architectures(name, boot):
    check_weights_of_a_layer(boot(name))


def test_weights_of_opaque_blocks(boot):
    check_weights_of_a_layer(boot("nemotron_h"), 2)
    check_weights_of_a_layer(boot("recurrent_gemma"), 2)


def test_several_weights_at_once(bridge):
    model = bridge("qwen2_moe")
    sites = [Site("W_out", -1, 2), Site("W_out", 1, "shared"), Site("W_Q", 0)]
    weights = weights_of(model, sites)
    assert list(weights) == sites
    for site, weight in weights.items():
        assert torch.equal(weight.read(), weight_of(model, site).read())
        assert weight.site.layer == site.layer % len(model.blocks)


def test_memory_of_a_model_is_walked_once(boot, monkeypatch):
    """The time for all sites of a model must not grow with their square."""
    model = boot("llama")
    change = change_of(model, *(Site(m, n) for n in range(3) for m in ("W_in", "W_out")))
    walks, parameters = [], nn.Module.parameters

    def counted(module, *args, **kwargs):
        walks.extend(block for block in model.blocks if block is module)
        return parameters(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "parameters", counted)
    with change.applied(model):
        pass
    assert 0 < len(walks) <= 2 * len(model.blocks)


def test_grouped_heads_are_not_repeated(bridge):
    model = bridge("llama")
    assert weight_of(model, Site("W_Q", 0)).shape == (16, 16)
    assert weight_of(model, Site("W_K", 0)).shape == (16, 8)


def test_negative_layers_count_from_the_end(bridge):
    assert weight_of(bridge("gpt2"), Site("W_in", -1)).site == Site("W_in", 2)


@pytest.mark.parametrize(
    ("site", "error"),
    [
        (Site("W_up", 0), "matrices must be among"),
        (Site("W_gate", 0), "W_gate: no such matrix in layer 0"),
        (Site("W_in", 3), "layer 3 asked for, but this model has layers 0 to 2"),
        (Site("W_in", 1, 0), "W_in of layer 1, expert 0: that layer is no mixture of experts"),
    ],
    ids=str,
)
def test_weights_a_model_lacks(site, error, bridge):
    with pytest.raises(ValueError, match=error):
        weight_of(bridge("gpt2"), site)


def test_experts_a_mixture_lacks(bridge):
    model = bridge("mixtral")
    with pytest.raises(ValueError, match=r"W_in of layer 1 names no expert; .* experts 0 to 3"):
        weight_of(model, Site("W_in", 1))
    with pytest.raises(ValueError, match=r"expert 4 does not exist; .* experts 0 to 3$"):
        weight_of(model, Site("W_out", 1, 4))
    with pytest.raises(ValueError, match=r"expert 9 does not .* 0 to 3 and the shared one"):
        weight_of(bridge("qwen2_moe"), Site("W_out", 1, 9))


def test_a_weight_shared_between_layers(boot):
    model = boot("llama")
    linear_of(model, 2).weight = linear_of(model, 1).weight
    with pytest.raises(NotImplementedError, match="W_out of layer 1 is shared with layer 2"):
        weight_of(model, Site("W_out", 1))
    assert weight_of(model, Site("W_out", 0)).shape == (24, 16)


def test_a_weight_that_is_not_in_memory(boot):
    model = boot("llama")
    linear_of(model).weight = nn.Parameter(linear_of(model).weight.to("meta"))
    with pytest.raises(NotImplementedError, match="W_out of layer 1 is not in memory"):
        weight_of(model, Site("W_out", 1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_weight(dtype, boot):
    model = boot("llama")
    linear_of(model).weight = nn.Parameter(linear_of(model).weight.to(dtype), requires_grad=False)
    with pytest.raises(NotImplementedError, match=f"is stored as {dtype}, quantised"):
        weight_of(model, Site("W_out", 1))


def test_a_weight_computed_from_others(boot):
    model = boot("llama")
    nn.utils.parametrizations.weight_norm(linear_of(model))
    with pytest.raises(NotImplementedError, match=r"holds no matrix `weight` of its own"):
        weight_of(model, Site("W_out", 1))


def test_values_of_another_shape(bridge):
    weight = weight_of(bridge("llama"), Site("W_out", 1))
    for write in (weight.write, weight.add):
        with pytest.raises(ValueError, match=r"W_out of layer 1 is a \[24, 16\] matrix"):
            write(torch.zeros(16, 24))
