"""Edited copies, and changes shipped from one copy of a model to another."""

import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import save_file

import bwlens
from bwlens import LowRankGradient, Site
from bwlens.edit import WeightChange
from bwlens.model.weights import copy_of
from tests import tiny
from tests.changed import HOOKED, MASK, TOKENS, assert_untouched, change_of, state

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
    sites = (Site("W_in", 0, "shared"), Site("W_out", 1, 0), Site("W_K", 1))
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
