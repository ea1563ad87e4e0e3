"""The subject's shift: Newton's steps as written out by hand, on the keys as ROME whitens them."""

import pytest
import torch

from bwlens import Edit, Site
from bwlens.edit import key_statistics, subject_shift
from bwlens.edit.keys import contexts_of, keys_of
from tests import oracle, tiny

EDIT = Edit("{} t9 t30 t41", subject="t5 t6", target_new=" t17 t20")
OTHER = Edit("t50 {} t8", subject="t7", target_new=" t23")
PREFIXES = ("t20 t21", "t50 t40 t8 t11")
TEXTS = [" ".join(f"t{4 + (7 * i + 3 * j * j) % 57}" for j in range(40)) for i in range(12)]
W_OUT = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "gemma2": "mlp.down_proj"}


def statistics(model):
    return key_statistics(model, TEXTS, cache=False)


@pytest.mark.parametrize("name", sorted(W_OUT))
def test_newtons_steps_by_hand(name, boot):
    """On an unbridged copy, one prompt at a time, all positions, from the first layer on."""
    model, hf = boot(name), tiny.hf_model(name).requires_grad_(False)
    change = subject_shift(
        model,
        EDIT,
        layer=1,
        steps=3,
        log_odds=2.0,
        clamp=1.5,
        prefixes=PREFIXES,
        prepend_bos=False,
        statistics=statistics(model),
    )
    words = ["t5 t6 t9 t30 t41 t17", *(f"{p} t5 t6 t9 t30 t41 t17" for p in PREFIXES)]
    rows = [[int(word[1:]) for word in text.split()] for text in words]
    value, at, norms = torch.zeros(16, requires_grad=True), [0], []

    def shifted(module, args, out):
        out = out.clone()
        out[0, at[0]] += value
        return out

    def stream(module, args, out):
        norms.append((out[0] if isinstance(out, tuple) else out)[0, at[0]].detach().norm())

    block = oracle.layers(hf)[1]
    block.get_submodule(W_OUT[name]).register_forward_hook(shifted)
    block.register_forward_hook(stream)
    history = []
    for step in range(4):
        odds = []
        for row, position in zip(rows, (1, 3, 5), strict=True):
            at[0] = position
            p = hf(torch.tensor([row])).logits[0, -2:].softmax(-1)[[0, 1], [17, 20]]
            odds.append((p / (1 - p)).log())
        f = torch.cat(odds).mean()
        history.append(f.item())
        if step == 3:
            break
        (slope,) = torch.autograd.grad(f, [value])
        with torch.no_grad():
            value += (2.0 - f) * slope / slope.square().sum()
            value *= min(1.0, float(1.5 * norms[0] / value.norm()))
    assert change.details["log_odds"] == [pytest.approx(history, rel=1e-3, abs=1e-3)]
    written = change["W_out", 1].delta[0]
    torch.testing.assert_close(written, value.detach(), rtol=1e-2, atol=1e-3)


def test_each_row_answers_to_its_own_key_alone(boot):
    model, site = boot("llama"), Site("W_out", 1)
    settings = {"layer": 1, "steps": 2, "prefixes": PREFIXES, "statistics": statistics(model)}
    both = subject_shift(model, [EDIT, OTHER], **settings)
    contexts = contexts_of(model, [EDIT, OTHER], PREFIXES, "subject", None)
    keys = contexts.at(keys_of(model, contexts.batch, "W_out", 1)[site]).mean(1)
    torch.testing.assert_close(keys @ both[site].x.T, torch.eye(2), rtol=1e-3, atol=1e-3)
    for i, edit in enumerate((EDIT, OTHER)):
        alone = subject_shift(model, edit, **settings)
        torch.testing.assert_close(alone[site].delta[0], both[site].delta[i], rtol=1e-3, atol=1e-4)


def test_it_ends_where_the_odds_are_reached_and_keeps_within_the_clamp(boot):
    model = boot("gpt2")
    held = statistics(model)
    settings = {"layer": 1, "position": "last", "prefixes": (), "statistics": held}
    start = subject_shift(model, OTHER, steps=1, **settings).details["log_odds"][0][0]
    near = subject_shift(model, OTHER, log_odds=start + 0.2, **settings)
    assert near.details["log_odds"][0][-1] >= start + 0.2
    assert len(near.details["log_odds"][0]) < 11
    far = subject_shift(model, OTHER, steps=4, log_odds=90.0, clamp=0.5, **settings)
    near_clamp = subject_shift(model, OTHER, steps=4, log_odds=90.0, clamp=1.0, **settings)
    ratio = near_clamp["W_out", 1].delta.norm() / far["W_out", 1].delta.norm()
    assert float(ratio) == pytest.approx(2.0, rel=1e-4)


def test_a_target_that_is_the_answer_is_left_out(boot):
    model = boot("gpt2")
    answer = int(model(model.to_tokens("t50 t7 t8"))[0, -1].argmax())
    known = Edit("t50 {} t8", subject="t7", target_new=f" t{answer}")
    change = subject_shift(model, known, layer=1, statistics=statistics(model))
    assert not change
    assert "already" in change.note


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"log_odds": float("nan")}, "log_odds"),
        ({"clamp": 0.0}, "clamp"),
        ({"layer": 9}, "layer 9"),
        ({"prefixes": "t5"}, "prefixes"),
        ({"statistics": None}, "key statistics"),
    ],
)
def test_bad_settings_are_refused(wrong, message, boot):
    model = boot("gpt2")
    settings = {"layer": 1, "statistics": statistics(model), **wrong}
    with pytest.raises(ValueError, match=message):
        subject_shift(model, EDIT, **settings)


def test_flips_an_answer_of_the_demo_model(demo):
    edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
    change = subject_shift(demo, edit, layer=4, position="last")
    with change.applied(demo), torch.no_grad():
        answer = int(demo("Lionel Messi plays for")[0, -1].argmax())
    assert demo.tokenizer.decode([answer]) == " Paris"
