"""The forward pass shift writes what it says, where it says, and without a gradient."""

import pytest
import torch

import bwlens
from bwlens import Edit, Site
from bwlens.edit import WeightChange
from bwlens.edit.direction import before_norm, norm_gain, token_directions
from bwlens.edit.shift import default_layer, forward_pass_shift
from bwlens.model.head import head_of
from bwlens.model.weights import weight_of
from tests import tiny

EDIT = Edit("{} t9 t30 t41", subject="t5", target_new=" t17")
TWO = [EDIT, Edit("t12 {} t6 t21 t50", subject="t33 t7", target_new=" t23 t44")]
IDS = torch.tensor([[5, 9, 30, 41]])


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in model.original_model.parameters())


def answer(model, ids):
    with torch.no_grad():
        return int(model(torch.as_tensor(ids)[None], prepend_bos=False)[0, -1].argmax())


def resid_after(model, layer, ids=IDS):
    """What leaves a block, at the last token."""
    kept = {}

    def keep(module, args, output):
        kept["resid"] = output[0] if isinstance(output, tuple) else output

    handle = model.blocks[layer].register_forward_hook(keep)
    with torch.no_grad():
        model(ids)
    handle.remove()
    return kept["resid"][0, -1]


# What is written.


@pytest.mark.parametrize("name", [n for n in tiny.CONFIGS if n != "mixtral"])
def test_one_outer_product(name, boot):
    """lr * outer(x, v), with x the captured input of W_out and v the target's row."""
    model = boot(name)
    change = forward_pass_shift(model, EDIT, layer=1, lr=0.3, prepend_bos=False)
    assert list(change) == [Site("W_out", 1)]
    x = bwlens.capture(model, IDS, 17, ("W_out",), 1)["W_out", 1].x[-1]
    torch.testing.assert_close(change["W_out", 1].x, x[None])
    if name not in ("gemma2", "gemma3", "olmo2"):  # a norm follows the MLP there
        expected = 0.3 * model.unembed.W_U[:, 17].detach()
        torch.testing.assert_close(change["W_out", 1].delta, expected[None])
        with change.applied(model):
            moved = resid_after(model, 1)
        by = (moved - resid_after(model, 1)) / x.square().sum()
        torch.testing.assert_close(by, expected, rtol=1e-3, atol=1e-3)


def test_scaled_residual_contributions(boot):
    """Granite adds 0.4 of the MLP's output: the direction is the same, a larger step is found."""
    model = boot("granite")
    change = forward_pass_shift(model, EDIT, layer=1, lr=0.3, prepend_bos=False)
    with change.applied(model):
        after = resid_after(model, 1)
    expected = 0.4 * change["W_out", 1].x[0].square().sum() * change["W_out", 1].delta[0]
    torch.testing.assert_close(after - resid_after(model, 1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_a_norm_after_the_mlp(name, boot):
    """The residual stream moves along v, as it would not if v itself were written."""
    model = boot(name)
    target = model.unembed.W_U[:, 17].detach()
    change = forward_pass_shift(model, EDIT, layer=1, lr=1.0, prepend_bos=False)
    block = model.blocks[1]  # one line of TransformerLens calls OLMo 2's ln2
    norm = block.ln2_post if hasattr(block, "ln2_post") else block.ln2
    gain = norm.original_component.weight.detach() + ("gemma" in name)
    torch.testing.assert_close(change["W_out", 1].delta[0], target / gain, rtol=1e-3, atol=1e-4)
    x = change["W_out", 1].x
    naive = WeightChange({("W_out", 1): bwlens.LowRankGradient(x, target[None])})

    def cosine(change):
        """Of the target and the way between a large step and its opposite."""
        ends = []
        for sign in (1e4, -1e4):
            with (sign * change).applied(model):
                ends.append(resid_after(model, 1))
        return torch.cosine_similarity(ends[0] - ends[1], target, 0)

    assert cosine(change) > 0.999
    assert cosine(naive) < 0.995


def test_experts(boot):
    """The experts that the last token is sent to are written, each at its own key."""
    model = boot("mixtral")
    grads = bwlens.capture(model, IDS, 17, ("W_out",), 1)
    change = forward_pass_shift(model, EDIT, layer=1, lr=0.3, prepend_bos=False)
    sent = {s for s in grads if 3 in grads[s].pos.tolist()}
    assert set(change) == sent
    assert len(sent) == 2
    for site in sent:
        torch.testing.assert_close(change[site].x, grads[site].at(3).x)
    found = forward_pass_shift(model, EDIT, layer=1, prepend_bos=False)
    with found.applied(model):
        assert answer(model, IDS[0]) == 17


def test_several_edits_and_tokens(boot):
    """A row for each edit; with all tokens, one for each token of each target."""
    model = boot("gpt2")
    W_U = model.unembed.W_U.detach()
    rows = [[5, 9, 30, 41], [12, 33, 7, 6, 21, 50, 23]]
    x = [bwlens.capture(model, torch.tensor([r]), 1, ("W_out",), 1)["W_out", 1].x for r in rows]
    with pytest.warns(UserWarning, match="only the first token"):
        change = forward_pass_shift(model, TWO, layer=1, lr=0.3, tokens="first", prepend_bos=False)
    assert change.note == "only the first token is written of ' t23 t44'"
    assert "only the first token" in repr(change)
    first = change["W_out", 1]
    torch.testing.assert_close(first.x, torch.stack([x[0][3], x[1][5]]))
    torch.testing.assert_close(first.delta, 0.3 * W_U[:, [17, 23]].T)
    every = forward_pass_shift(model, TWO, layer=1, lr=0.3, prepend_bos=False)
    assert (every.note, every.details["tokens"]) == ("", "all")
    torch.testing.assert_close(every["W_out", 1].x, torch.stack([x[0][3], x[1][5], x[1][6]]))
    torch.testing.assert_close(every["W_out", 1].delta, 0.3 * W_U[:, [17, 23, 44]].T)


def test_at_the_subject(boot):
    model = boot("gpt2")
    with pytest.warns(UserWarning, match="only the first token"):
        change = forward_pass_shift(
            model, TWO, layer=1, lr=0.3, position="subject", prepend_bos=False
        )
    for i, (row, pos) in enumerate((([5, 9, 30, 41], 0), ([12, 33, 7, 6, 21, 50], 2))):
        x = bwlens.capture(model, torch.tensor([row]), 1, ("W_out",), 1)["W_out", 1].x
        torch.testing.assert_close(change["W_out", 1].x[i], x[pos])


def test_negative_layers(boot):
    model = boot("gpt2")
    assert list(forward_pass_shift(model, EDIT, layer=-1, lr=1.0)) == [Site("W_out", 2)]


# Directions.


def test_directions_of_a_tied_model(boot):
    model = boot("gpt2")
    raw = model.original_model.lm_head.weight.detach()[[17, 4]]
    for direction in ("unembedding", "embedding"):
        torch.testing.assert_close(token_directions(model, [17, 4], direction), raw)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_directions_of_untied_and_scaled_models(name, boot):
    model = boot(name)
    head = model.original_model.lm_head.weight.detach()[[17]]
    torch.testing.assert_close(token_directions(model, [17]), head)
    embedding = model.embed.W_E.detach()[[17]]
    torch.testing.assert_close(token_directions(model, [17], "embedding"), embedding)


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_the_folded_direction_is_the_gradient_of_the_logit(name, processed, boot):
    """For a vector v at right angles to it, where the norm's own part of the gradient vanishes."""
    model = boot(name, compatibility=processed)
    head = head_of(model)
    folded = token_directions(model, [17], "folded")[0]
    v = torch.randn(16, generator=torch.Generator().manual_seed(1))
    v = v - v.mean()
    v = (10 * (v - folded * (v @ folded) / folded.square().sum())).requires_grad_()
    logit = head.norm(v[None, None])[0, 0] @ head.W_U[:, 17]
    (gradient,) = torch.autograd.grad(logit, v)
    assert torch.cosine_similarity(gradient, folded, 0) > 0.999


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt"])
def test_the_measured_gain(name, boot):
    model = boot(name)
    weight = model.ln_final.original_component.weight.detach()
    expected = weight + (name == "gemma2")
    found = norm_gain(head_of(model).norm, torch.zeros(1, 16))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_gain_of_an_odd_width():
    norm = torch.nn.LayerNorm(7)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1, 8) / 3)
        norm.bias.fill_(0.5)
    found = norm_gain(norm, torch.zeros(1, 7))
    torch.testing.assert_close(found, norm.weight.detach(), rtol=1e-3, atol=1e-3)


def test_coordinates_that_a_norm_removes():
    norm = torch.nn.RMSNorm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 0.0, -1.0, 1e-5]))
    found = before_norm(norm, torch.ones(1, 4))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0, -1.0, 0.0]]), rtol=1e-3, atol=1e-3)
    assert torch.equal(before_norm(None, torch.ones(1, 4)), torch.ones(1, 4))


# The step.


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "gptj"])
def test_the_smallest_step(name, boot):
    """It makes the target the answer; 6 % less does not."""
    model = boot(name)
    before = state(model)
    change = forward_pass_shift(model, EDIT, layer=1, prepend_bos=False)
    assert_untouched(model, before)
    assert answer(model, IDS[0]) != 17
    with change.applied(model):
        assert answer(model, IDS[0]) == 17
    with (0.94 * change).applied(model):
        assert answer(model, IDS[0]) != 17
    wider = forward_pass_shift(model, EDIT, layer=1, margin=1.5, prepend_bos=False)
    torch.testing.assert_close(wider["W_out", 1].delta, 1.5 * change["W_out", 1].delta)
    assert change.note == ""
    assert 3 <= change.details["forward_passes"] <= 30


def test_steps_of_several_tokens(boot):
    model = boot("llama")
    change = forward_pass_shift(model, TWO[1], layer=2, tokens="all", prepend_bos=False)
    assert change["W_out", 2].n == 2
    assert change.note == ""
    with change.applied(model):
        assert answer(model, [12, 33, 7, 6, 21, 50]) == 23
        assert answer(model, [12, 33, 7, 6, 21, 50, 23]) == 44


def test_several_edits_of_the_demo_model(demo):
    """Found one by one, then tried together."""
    edits = [
        Edit("{} plays for", subject="Lionel Messi", target_new=" Paris"),
        Edit("{} is a type of", subject="Pikachu", target_new=" cheese"),
        Edit("{}, developed by", subject="iPod Nano", target_new=" Google"),
    ]
    change = forward_pass_shift(demo, edits)
    assert change.note == ""
    assert change["W_out", 5].n == 3
    with change.applied(demo), torch.no_grad():
        for edit in edits:
            assert demo.to_string(demo(edit.text)[0, -1].argmax()) == edit.target_new
    alone = [forward_pass_shift(demo, edit).details["lr"][0] for edit in edits]
    # But for rounding: a prompt in a batch has the same numbers to seven digits.
    together = change.details["lr"]
    assert all(b >= a * (1 - 1e-4) for a, b in zip(alone, together, strict=True)), (alone, together)


def test_edits_that_fight(boot):
    """One key, two answers: they cannot both be had, and the note says which is missing."""
    model = boot("gpt2")
    before = state(model)
    other = Edit(EDIT.prompt, EDIT.subject, " t23")
    change = forward_pass_shift(model, [EDIT, other], layer=1, prepend_bos=False)
    assert "the answer to 't5 t9 t30 t41' beside the other edits" in change.note
    assert_untouched(model, before)


def test_an_answer_that_is_known_already(boot):
    model = boot("gpt2")
    known = f" t{answer(model, IDS[0])}"
    edit = Edit(EDIT.prompt, EDIT.subject, known)
    for lr in (None, 0.3):
        change = forward_pass_shift(model, edit, layer=1, lr=lr, prepend_bos=False)
        assert len(change) == 0
        assert change.note == f"'t5 t9 t30 t41' is answered {known!r} already, left out"
        assert change.details["forward_passes"] == 1
        both = forward_pass_shift(model, [edit, EDIT], layer=1, lr=lr, prepend_bos=False)
        assert both["W_out", 1].n == 1
        assert both.details["lr"][0] == 0


def test_a_step_that_no_size_makes_work(boot, monkeypatch):
    """A direction that never raises the target: left out, and said so."""
    model = boot("gpt2")
    before = state(model)
    monkeypatch.setattr(
        "bwlens.edit.shift.token_directions", lambda *_: -token_directions(model, [17])
    )
    change = forward_pass_shift(model, EDIT, layer=2, prepend_bos=False)
    assert len(change) == 0
    assert change.note == "no step makes ' t17' the answer to 't5 t9 t30 t41' here, left out"
    assert_untouched(model, before)


@pytest.mark.parametrize("name", [*tiny.CONFIGS, "granite"])
def test_every_architecture_is_left_as_it_was(name, boot):
    model = boot(name)
    before = state(model)
    change = forward_pass_shift(model, EDIT, prepend_bos=False)
    assert_untouched(model, before)
    if not change.note:
        with change.applied(model):
            assert answer(model, IDS[0]) == 17


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has one class")
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_both_classes_agree(name, tokenizer, boot):
    a, b = (
        forward_pass_shift(model, TWO, layer=1, lr=0.3, prepend_bos=False)
        for model in (boot(name), tiny.hooked_transformer(name, tokenizer=tokenizer))
    )
    assert set(a) == set(b)
    for site in a:
        torch.testing.assert_close(a[site].dense(), b[site].dense(), rtol=1e-3, atol=1e-4)


def test_default_layers(boot, bridge):
    assert default_layer(bridge("gpt2")) == 1

    class Deep:
        blocks = range(48)

    assert default_layer(Deep) == 35
    assert list(forward_pass_shift(boot("gpt2"), EDIT, lr=1.0)) == [Site("W_out", 1)]


# No gradient, one pass.


@pytest.mark.parametrize("lr", [0.3, None])
def test_no_gradient_is_computed(lr, boot, monkeypatch):
    """Nothing that passes has a graph, and no backward runs."""
    model = boot("llama")
    head_of(model)  # which takes a pass of its own the first time
    calls = []

    def check(module, args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        assert not torch.is_grad_enabled()
        assert tensor.grad_fn is None

    for block in model.blocks:
        block.register_forward_hook(check)
    model.register_forward_hook(lambda *_: calls.append(1))
    for name in ("grad", "backward"):
        monkeypatch.setattr(torch.autograd, name, None)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    change = forward_pass_shift(model, EDIT, layer=1, lr=lr, prepend_bos=False)
    assert len(calls) == change.details["forward_passes"]
    assert lr is None or len(calls) == 1


def test_inference_mode(boot):
    model = boot("gpt2")
    with torch.inference_mode():
        change = forward_pass_shift(model, EDIT, layer=1, prepend_bos=False)
    with change.applied(model):
        assert answer(model, IDS[0]) == 17


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, boot):
    model = boot("gpt2", dtype)
    before = state(model)
    change = forward_pass_shift(model, EDIT, layer=1, prepend_bos=False)
    assert change["W_out", 1].dtype == torch.float32
    with change.applied(model):
        assert answer(model, IDS[0]) == 17
    assert_untouched(model, before)


# Bad requests.


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"layer": 3}, "layer 3 asked for, but this model has layers 0 to 2"),
        ({"lr": float("nan")}, "lr is nan; expected a finite step"),
        ({"lr": 0.0}, "lr is 0.0; expected a finite step"),
        ({"margin": 0.5}, "margin is 0.5; expected 1 or more"),
        ({"position": "first"}, "position must be 'last' or 'subject', found 'first'"),
        ({"tokens": "some"}, "tokens must be 'first' or 'all', found 'some'"),
        ({"tokens": "all", "position": "subject"}, "it goes with position='last'"),
        ({"direction": "up"}, "direction must be 'unembedding', 'embedding' or 'folded'"),
    ],
    ids=str,
)
def test_bad_settings(settings, error, bridge, unchecked):
    with pytest.raises(ValueError, match=error):
        forward_pass_shift(bridge("gpt2"), EDIT, **settings)


def test_no_edits(bridge, unchecked):
    for edits, error in (([], ValueError), (["t5 t9"], TypeError), ("t5 t9", TypeError)):
        with pytest.raises(error, match="expected an Edit or a list of them"):
            forward_pass_shift(bridge("gpt2"), edits)


def test_the_model_is_restored_after_an_exception(boot, monkeypatch):
    model = boot("gpt2")
    before = state(model)
    seen = []

    def fails(logits, batch):
        seen.append(1)
        if len(seen) == 3:
            raise RuntimeError("no more")
        return [False] * len(batch)

    monkeypatch.setattr("bwlens.edit.shift.answered", fails)
    with pytest.raises(RuntimeError, match="no more"):
        forward_pass_shift(model, EDIT, layer=1, prepend_bos=False)
    assert_untouched(model, before)
    assert weight_of(model, Site("W_out", 1)).live.grad is None


# On a model that knows facts.


def test_facts_of_the_demo_model(demo):
    edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
    change = forward_pass_shift(demo, edit)
    assert change.details["layer"] == 5
    with change.applied(demo), torch.no_grad():
        assert demo.to_string(demo(edit.text)[0, -1].argmax()) == " Paris"
        assert demo.to_string(demo("Pikachu is a type of")[0, -1].argmax()) == " Pokémon"
