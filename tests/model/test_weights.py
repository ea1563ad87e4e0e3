"""Weights found where they live, and changes that are applied, undone, added and shipped."""

import copy
import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bwlens
from bwlens import LowRankGradient, Site
from bwlens.edit import WeightChange
from bwlens.model.flows import as_rows
from bwlens.model.passes import run
from bwlens.model.prompts import make_batch
from bwlens.model.sites import available_matrices, find_taps
from bwlens.model.weights import copy_of, weight_of, weights_of
from tests import cases, oracle, tiny

TOKENS, MASK = cases.padded(cases.PROMPTS)
HOOKED = pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")


def passing(model):
    """x and z of every site as they pass, in rows."""
    taps = find_taps(model, available_matrices(model))
    return {
        site: (as_rows(flow.x), as_rows(flow.z)[:, columns])
        for flow in run(model, make_batch(model, TOKENS).tokens, taps=taps).flows
        for site, columns in flow.parts
    }


def random_change(weight, rank=2, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    return LowRankGradient(
        scale * torch.randn(rank, weight.shape[0], generator=generator),
        torch.randn(rank, weight.shape[1], generator=generator),
    )


def change_of(model, *sites, seed=0, **kwargs):
    return WeightChange(
        {
            s: random_change(weight_of(model, s), seed=seed + i, **kwargs)
            for i, s in enumerate(sites)
        }
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    different = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert different == []


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
        assert weight.site.layer == site.layer % 3


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


def linear_of(model, layer=1):
    return model.blocks[layer].mlp.out.original_component


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


# Another copy, another form.


def storages(model):
    trees = [model, getattr(model, "original_model", model)]
    tensors = [t for tree in trees for t in (*tree.parameters(), *tree.buffers())]
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def check_edited(model):
    before, change = state(model), change_of(model, Site("W_out", 1), Site("W_O", 0))
    with torch.no_grad():
        logits = model(TOKENS)
        with change.applied(model):
            expected = model(TOKENS)
        twin = change.edited(model)
        assert torch.equal(twin(TOKENS), expected)
        assert not torch.allclose(expected, logits)
        assert storages(twin).isdisjoint(storages(model))
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(TOKENS), logits)
    assert_untouched(model, before)
    twin = change.edited(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    grads = bwlens.capture(twin, TOKENS, 17)  # the copy is a model of its own
    assert len(grads) == 2 * tiny.LAYERS
    change.undo(twin)
    assert_untouched(twin, before)


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "phi3"])
def test_an_edited_copy(name, processed, boot):
    check_edited(boot(name, compatibility=processed))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_copy_of_a_model_that_has_just_run_with_gradients(name, boot):
    """Attention keeps the patterns of its last pass, on the graph."""
    model = boot(name)
    logits = model(TOKENS)
    assert logits.requires_grad
    assert torch.equal(copy_of(model)(TOKENS), logits)


@pytest.mark.parametrize(
    ("flag", "point"),
    [
        ("use_split_qkv_input", "blocks.1.attn.hook_q_input"),
        ("use_hook_mlp_in", "blocks.1.hook_mlp_in"),
        ("use_attn_result", "blocks.1.attn.hook_result"),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_flags_of_a_copy_are_its_own(name, flag, point, boot):
    """Hooks that a bridge hangs up at boot reach into the copy, not into the model."""
    model = boot(name)
    twin, fired = copy_of(model), []
    for one in (model, twin):
        one.hook_dict[point].register_forward_hook(lambda *_, key=one: fired.append(id(key)))
    with torch.no_grad():
        logits = model(TOKENS)
        getattr(twin, f"set_{flag}")(True)
        torch.testing.assert_close(twin(TOKENS), logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(TOKENS), logits)
        assert fired == [id(twin)]
        del model, one
        gc.collect()
        torch.testing.assert_close(twin(TOKENS), logits, rtol=1e-4, atol=1e-4)


@HOOKED
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_an_edited_copy_of_a_hooked_transformer(name):
    check_edited(tiny.hooked_transformer(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_and_loaded_onto_another_copy(dtype, boot, tmp_path):
    model, other = boot("qwen2_moe"), boot("qwen2_moe")
    sites = (Site("W_in", 0, "shared"), Site("W_out", 1, 0), Site("W_K", 2))
    change = change_of(model, *sites).to(dtype=dtype)
    change = WeightChange(change.parts, "a note", {"method": "by hand", "lr": 0.25})
    path = tmp_path / "change.safetensors"
    change.save(path)
    loaded = WeightChange.load(path)
    assert list(tmp_path.iterdir()) == [path]
    assert list(loaded) == list(change)
    assert (loaded.note, loaded.details) == (change.note, change.details)
    for site in sites:
        assert torch.equal(loaded[site].x, change[site].x)
        assert torch.equal(loaded[site].delta, change[site].delta)
    with change.applied(model), loaded.applied(other), torch.no_grad():
        assert torch.equal(model(TOKENS), other(TOKENS))


def test_a_change_between_kinds_of_model(boot):
    """Raw weights are the same on either class, so a change fits both."""
    if not tiny.HAS_HOOKED_TRANSFORMER:
        pytest.skip("TransformerLens 4 has one class")
    bridge, hooked = boot("llama"), tiny.hooked_transformer("llama")
    change = change_of(bridge, Site("W_Q", 0), Site("W_V", 1), Site("W_O", 1), Site("W_gate", 2))
    with torch.no_grad(), change.applied(bridge), change.applied(hooked):
        a, b = (model(TOKENS).log_softmax(-1) for model in (bridge, hooked))
    torch.testing.assert_close(a[MASK.bool()], b[MASK.bool()], rtol=1e-4, atol=1e-4)


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "other.safetensors"
    LowRankGradient(torch.ones(1, 4), torch.ones(1, 3)).save(path)
    with pytest.raises(ValueError, match=r"LowRankGradient.*expected.*bwlens.WeightChange"):
        WeightChange.load(path)
    save_file({}, path, metadata={"format": "bwlens.WeightChange", "version": "99"})
    with pytest.raises(ValueError, match="'version': '99'"):
        WeightChange.load(path)
    path.write_text(json.dumps({"no": "tensors"}))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        WeightChange.load(path)
    with pytest.raises(FileNotFoundError):
        WeightChange.load(tmp_path / "none")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "change.safetensors"
    WeightChange(note="old").save(path)
    monkeypatch.setattr("bwlens.changes.change.os.replace", lambda a, b: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        WeightChange(note="new").save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert WeightChange.load(path).note == "old"


# Arithmetic.


def two_changes():
    generator = torch.Generator().manual_seed(3)

    def rows(n, d_in, d_out):
        return LowRankGradient(
            torch.randn(n, d_in, generator=generator), torch.randn(n, d_out, generator=generator)
        )

    a = WeightChange({("W_out", 1): rows(2, 6, 4), ("W_in", 0): rows(1, 4, 6)}, "first")
    b = WeightChange({("W_out", 1): rows(3, 6, 4), ("W_out", 2): rows(1, 6, 4)}, "second")
    return a, b


def dense(change):
    return {site: part.dense() for site, part in change.items()}


def test_sums_and_multiples():
    a, b = two_changes()
    x, y = dense(a), dense(b)
    for found, expected in (
        (a + b, lambda s: x.get(s, 0) + y.get(s, 0)),
        (a - b, lambda s: x.get(s, 0) - y.get(s, 0)),
        (sum([a, b]), lambda s: x.get(s, 0) + y.get(s, 0)),
    ):
        assert set(found) == set(a) | set(b)
        assert found.note == "first; second"
        for site, values in dense(found).items():
            torch.testing.assert_close(values, expected(site))
    for found, factor in ((2 * a, 2), (a * 0.5, 0.5), (-a, -1)):
        for site, values in dense(found).items():
            torch.testing.assert_close(values, factor * x[site])


def test_sums_of_changes_of_different_models():
    a, _ = two_changes()
    other = WeightChange({("W_out", 1): LowRankGradient(torch.ones(1, 6), torch.ones(1, 5))})
    with pytest.raises(ValueError, match=r"W_out of layer 1: a change of a \[6, 4\] matrix and"):
        _ = a + other
    with pytest.raises(TypeError):
        _ = a + object()  # pyright: ignore[reportOperatorIssue]


def test_norms():
    a, _ = two_changes()
    x = dense(a)
    assert a.norm(("W_out", 1)) == pytest.approx(float(x[Site("W_out", 1)].norm()))
    whole = torch.cat([values.flatten() for values in x.values()])
    assert a.norm() == pytest.approx(float(whole.norm()))
    assert WeightChange().norm() == 0
    with pytest.raises(KeyError, match="W_O of layer 1 is not changed here; this changes W_in of"):
        a.norm(("W_O", 1))


def test_compressed():
    a, _ = two_changes()
    doubled = (a + a).compress()
    assert [part.n for part in doubled.values()] == [1, 2]
    for site, values in dense(doubled).items():
        torch.testing.assert_close(values, 2 * dense(a)[site], rtol=1e-4, atol=1e-5)


def test_what_it_says():
    a, b = two_changes()
    assert repr(WeightChange()) == "WeightChange(nothing)"
    assert repr(WeightChange(note="known already")) == "WeightChange(nothing; known already)"
    assert repr(a).startswith("WeightChange(W_in, W_out of layers 0-1; 3 rows, norm ")
    assert repr(a).endswith("; first)")
    assert repr(WeightChange({("W_out", 1): b["W_out", 1]})).startswith(
        "WeightChange(W_out of layer 1; 3 rows"
    )
    assert ("W_out", 1) in b
    assert ("W_in", 1) not in b
    assert "W_out" not in b
    assert list(a) == [Site("W_in", 0), Site("W_out", 1)]


def test_an_empty_change_changes_nothing(boot, tmp_path):
    model = boot("gpt2")
    before = state(model)
    with WeightChange().applied(model):
        assert_untouched(model, before)
    WeightChange().save(tmp_path / "nothing")
    assert len(WeightChange.load(tmp_path / "nothing")) == 0


def test_no_model():
    with pytest.raises(TypeError, match="expected a TransformerLens model, found str"):
        WeightChange().apply("gpt2")


def test_a_copy_of_a_change_is_another_change(boot):
    """Identity says what is applied, so an equal change may be added on top."""
    model, site = boot("gpt2"), Site("W_out", 1)
    change = change_of(model, site)
    value = weight_of(model, site).read()
    with change.applied(model), copy.copy(change).applied(model):
        torch.testing.assert_close(weight_of(model, site).read(), value + 2 * change[site].dense())
    assert torch.equal(weight_of(model, site).read(), value)
