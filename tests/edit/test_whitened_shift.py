"""The whitened shift: closed form, one forward pass, and the constraints that define it."""

import pytest
import torch

import bwlens
from bwlens import Edit, Site
from bwlens.edit.keys import contexts_of, passed_by
from bwlens.edit.statistics import key_statistics
from bwlens.edit.whitened import whitened_shift
from tests import tiny

EDIT = Edit("{} t9 t30 t41", subject="t5 t6", target_new=" t17", target_true=" t23")
OTHER = Edit("t12 {} t21 t50", subject="t33", target_new=" t9", target_true=" t40")
PREFIXES = ("t20 t21", "t50 t40 t8")
TEXTS = [" ".join(f"t{4 + (7 * i + 3 * j * j) % 57}" for j in range(40)) for i in range(12)]


def statistics(model, matrix="W_O"):
    return key_statistics(model, TEXTS, matrix=matrix, cache=False)


def keys_at(model, edits, site):
    contexts = contexts_of(model, edits, PREFIXES, "last", None)
    return contexts, passed_by(model, contexts.batch, [site.matrix], site.layer)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "qwen2", "gemma2", "olmo2", "granite"])
@pytest.mark.parametrize("matrix", ["W_O", "W_out"])
def test_the_constraints(name, matrix, boot):
    """u_i . k_j = [i = j]: at each mean key exactly its own value is written."""
    model = boot(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    held = statistics(model, matrix)
    change = whitened_shift(
        model, [EDIT, OTHER], layers=[1, 2], matrix=matrix, prefixes=PREFIXES, statistics=held
    )
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    assert list(change) == [Site(matrix, 1), Site(matrix, 2)]
    for site in change:
        contexts, passed = keys_at(model, [EDIT, OTHER], site)
        keys = contexts.at(passed.x[site]).mean(1)
        torch.testing.assert_close(
            change[site].x.double() @ keys.double().T,
            torch.eye(2).double(),
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.parametrize("name", ["gpt2", "llama", "granite", "gemma2", "olmo2"])
@pytest.mark.parametrize("matrix", ["W_O", "W_out"])
def test_the_stream_moves_along_the_difference(name, matrix, boot):
    """Before the final norm, by `(gap + margin) d / ||d||^2`, d written out by hand."""
    model = boot(name)
    held = statistics(model, matrix)
    settings = {"layers": -1, "matrix": matrix, "prefixes": (), "statistics": held}
    gap = whitened_shift(model, EDIT, margin=0.0, **settings).details["gap"][0]
    contexts = contexts_of(model, [EDIT], (), "last", None)
    before = passed_by(model, contexts.batch, [matrix], 2)
    size = 1e-3
    with whitened_shift(model, EDIT, margin=size - gap, **settings).applied(model):
        after = passed_by(model, contexts.batch, [matrix], 2)

    stream, norm = before.final[0, -1], model.ln_final
    centred = name == "gpt2"
    spread = (stream - stream.mean() * centred).square().mean().sqrt()
    gain = norm.weight + (1.0 if name == "gemma2" else 0.0)
    difference = gain * (model.unembed.W_U[:, 17] - model.unembed.W_U[:, 23])
    d = (difference - difference.mean() * centred) / spread
    d = d / 2 if name == "granite" else d  # its logits are divided by 2
    expected = (size * d / d.square().sum()).detach()
    moved = after.final[0, -1] - stream
    if matrix == "W_out" and name in ("gpt2", "llama", "granite"):
        torch.testing.assert_close(moved, expected, rtol=2e-2, atol=2e-2 * expected.abs().max())
        logits = before.logits[0, -1]
        assert float(logits[23] - logits[17]) == pytest.approx(gap, rel=1e-4, abs=1e-4)
    else:  # a norm in between, or the MLP after it, answers as well
        assert torch.cosine_similarity(moved, expected, dim=0) > 0.5
        assert 0.3 < moved.norm() / expected.norm() < 3


def test_smallest_answer_to_the_text(boot):
    """u minimises u^T C u with u . k = 1: no neighbour of it does better."""
    model, site = boot("gpt2"), Site("W_O", 2)
    held = statistics(model)
    change = whitened_shift(model, EDIT, layers=2, prefixes=PREFIXES, statistics=held)
    contexts, passed = keys_at(model, [EDIT], site)
    key, u = contexts.at(passed.x[site])[0].mean(0).double(), change[site].x[0].double()
    moment = held[site].second_moment
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        aside = torch.randn(16, generator=generator).double()
        aside = aside - key * (aside @ key) / key.square().sum()
        other = u + 1e-2 * u.norm() * aside / aside.norm()
        assert other @ moment @ other > u @ moment @ u


def test_one_forward_pass_and_no_gradient(boot, monkeypatch):
    model = boot("gpt2")
    held = statistics(model)
    whitened_shift(model, EDIT, statistics=held)  # the statistics are checked once
    passes = []
    handle = model.blocks[0].register_forward_hook(lambda *args: passes.append(1))

    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    change = whitened_shift(model, [EDIT, OTHER], statistics=held)
    handle.remove()
    assert len(passes) == change.details["forward_passes"] == 1
    assert change.details["prompts"] == 6
    assert all(p.grad is None for p in model.original_model.parameters())


def test_known_answers_are_left_out(boot):
    model = boot("gpt2")
    held = statistics(model)
    with torch.no_grad():
        said = int(model(EDIT.text)[0, -1].argmax())
    known = Edit(EDIT.prompt, EDIT.subject, f" t{said}")
    change = whitened_shift(model, known, statistics=held)
    assert not change
    assert "already" in change.note
    both = whitened_shift(model, [known, OTHER], statistics=held)
    assert both["W_O", 2].n == 1
    alone = whitened_shift(model, OTHER, statistics=held)
    expected = alone["W_O", 2].dense()
    assert (both["W_O", 2].dense() - expected).norm() < 1e-2 * expected.norm()


def test_without_an_old_answer_the_models_own_is_written_over(boot):
    model = boot("gpt2")
    held = statistics(model)
    with torch.no_grad():
        said = int(model(EDIT.text)[0, -1].argmax())
    given = Edit(EDIT.prompt, EDIT.subject, " t17", f" t{said}")
    open_ = Edit(EDIT.prompt, EDIT.subject, " t17")
    one, other = (whitened_shift(model, edit, statistics=held) for edit in (given, open_))
    torch.testing.assert_close(one["W_O", 2].dense(), other["W_O", 2].dense())


def test_bad_input(boot):
    model = boot("gpt2")
    held = statistics(model)
    with pytest.raises(ValueError, match="'W_O' or 'W_out'"):
        whitened_shift(model, EDIT, matrix="W_in", statistics=held)
    with pytest.raises(ValueError, match="margin is nan"):
        whitened_shift(model, EDIT, margin=float("nan"), statistics=held)
    with pytest.raises(ValueError, match="begin with the same token"):
        whitened_shift(model, Edit("{} t9", "t5", " t17 t5", " t17 t4"), statistics=held)
    with pytest.raises(NotImplementedError, match="mixture"):
        whitened_shift(boot("mixtral"), EDIT, matrix="W_out", statistics=held)


def test_a_mixture_takes_it_in_its_attention(boot):
    model = boot("mixtral")
    assert whitened_shift(model, EDIT, statistics=statistics(model))["W_O", 2].n == 1


def test_the_same_on_either_class_of_model(boot, tokenizer):
    if not tiny.HAS_HOOKED_TRANSFORMER:
        pytest.skip("TransformerLens 4 has one class of model")
    bridge, hooked = boot("gpt2"), tiny.hooked_transformer("gpt2", tokenizer=tokenizer)
    held = statistics(bridge)
    settings = {"prepend_bos": False, "statistics": held}
    one, other = (whitened_shift(m, EDIT, **settings) for m in (bridge, hooked))
    torch.testing.assert_close(one["W_O", 2].dense(), other["W_O", 2].dense(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("index", [0, 2, 4])
def test_flips_answers_of_the_demo_model(index):
    model, example = bwlens.load_model("demo"), bwlens.demo.EXAMPLES[index]
    template = example.prompt.replace(example.subject, "{}")
    edit = Edit(template, example.subject, example.target_new, example.target_true)
    change = whitened_shift(model, edit)
    with change.applied(model), torch.no_grad():
        answer = int(model(example.prompt)[0, -1].argmax())
    assert model.tokenizer.decode([answer]) == example.target_new
    assert model.tokenizer.decode([int(model(example.prompt)[0, -1].argmax())]) != edit.target_new
