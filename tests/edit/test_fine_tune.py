"""Fine-tuning is torch.optim.Adam on an unbridged model, and ROME's bound."""

import pytest
import torch

from bwlens import Edit, Site
from bwlens.edit import fine_tune
from bwlens.model.weights import weight_of
from tests import cases, oracle, tiny

EDITS = [
    Edit("{} t9 t30 t41", subject="t5", target_new=" t17"),
    Edit("{} t8", subject="t7", target_new=" t23 t44 t10"),
    Edit("t12 {} t6 t21 t50 t11", subject="t33", target_new=" t9 t9"),
]
W_OUT = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "gemma2": "mlp.down_proj", "opt": "fc2"}


def adam_loop(name, lr, steps, stop_loss=1e-2, bound=None, layer=1):
    """Train W_out of one layer of a Hugging Face model; the trained weight [d_in, d_out]."""
    hf = tiny.hf_model(name)
    hf.requires_grad_(False)
    weight = oracle.layers(hf)[layer].get_submodule(W_OUT[name]).weight.requires_grad_()
    start = weight.detach().clone()
    most = None if bound is None else bound * start.square().mean().sqrt()
    optimizer = torch.optim.Adam([weight], lr=lr)
    tokens, mask, loss = cases.teacher_forced_nll()
    losses = []
    for _ in range(steps):
        losses.append(
            float(oracle.backward(hf, tokens, mask, lambda logits: loss(logits) / 3).sum())
        )
        if losses[-1] < stop_loss:
            break
        optimizer.step()
        if most is not None:
            with torch.no_grad():
                weight.clamp_(start - most, start + most)
    moved = weight.detach() - start
    return (moved if name == "gpt2" else moved.T), losses


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in model.original_model.parameters())


@pytest.mark.parametrize("bound", [None, 0.2])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt"])
def test_against_adam(name, bound, boot):
    model = boot(name)
    before = state(model)
    change = fine_tune(model, EDITS, layers=1, lr=1e-2, steps=8, bound=bound, prepend_bos=False)
    assert_untouched(model, before)
    moved, losses = adam_loop(name, 1e-2, 8, bound=bound)
    assert change.details["losses"][:8] == pytest.approx(losses, rel=1e-4)
    assert list(change) == [Site("W_out", 1)]
    assert oracle.relative_error(change["W_out", 1].dense(), moved) < 1e-3
    if bound is not None:
        rms = weight_of(model, Site("W_out", 1)).read().square().mean().sqrt()
        share = change["W_out", 1].dense().abs().max() / rms
        assert float(share) == pytest.approx(bound, rel=1e-3)


def test_it_stops_at_a_small_loss(demo):
    edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
    change = fine_tune(demo, edit, layers=5, lr=2e-3, steps=60, stop_loss=0.2)
    losses = change.details["losses"]
    assert losses[-1] < 0.2 <= min(losses[:-1])
    assert len(losses) < 60
    with change.applied(demo), torch.no_grad():
        assert demo.to_string(demo(edit.text)[0, -1].argmax()) == " Paris"


def test_nothing_to_train(boot):
    model = boot("gpt2")
    change = fine_tune(model, EDITS[0], layers=1, stop_loss=1e3, prepend_bos=False)
    assert len(change) == 0
    assert change.note == "the loss is below stop_loss already, nothing trained"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applying_gives_the_trained_weights(dtype, boot):
    """Several matrices, each with its identity on the narrower side."""
    model = boot("gpt2", dtype)
    before = state(model)
    change = fine_tune(
        model, EDITS, layers=[0, 2], matrices=("W_in", "W_out"), steps=3, prepend_bos=False
    )
    assert_untouched(model, before)
    assert {site: part.n for site, part in change.items()} == {
        Site(matrix, layer): 16 for matrix in ("W_in", "W_out") for layer in (0, 2)
    }
    for part in change.values():
        assert float(part.dense().abs().max()) <= 3 * 5e-4 * 1.01  # Adam's steps are at most lr
        assert part.dtype == torch.float32


def test_experts_without_tokens_stay_out(boot):
    model = boot("mixtral")
    before = state(model)
    change = fine_tune(model, EDITS[1], layers=1, steps=2, prepend_bos=False)
    assert 0 < len(change) <= 4
    assert_untouched(model, before)


def test_restored_after_an_exception(boot, monkeypatch):
    model = boot("gpt2")
    before = weight_of(model, Site("W_out", 1)).read()
    real, seen = torch.optim.Adam.step, []

    def fails(self, *args):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", fails)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, EDITS, layers=1, prepend_bos=False)
    assert torch.equal(weight_of(model, Site("W_out", 1)).read(), before)


def test_training_that_explodes(boot):
    model = boot("gpt2", torch.float16)
    before = state(model)
    with pytest.raises(ValueError, match=r"nan|inf|not finite"):
        fine_tune(model, EDITS, layers=1, lr=1e6, prepend_bos=False)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"lr": 0.0}, "expected lr > 0"),
        ({"steps": 0}, "at least one step"),
        ({"bound": 0.0}, "bound is 0.0; expected a share > 0"),
        ({"layers": 5}, "layer 5 asked for"),
    ],
    ids=str,
)
def test_bad_settings(settings, error, bridge):
    with pytest.raises(ValueError, match=error):
        fine_tune(bridge("gpt2"), EDITS, **({"layers": 1} | settings))
