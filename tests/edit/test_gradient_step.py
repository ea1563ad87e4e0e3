"""Gradient steps are those of torch.optim.SGD on an unbridged model."""

import pytest
import torch

import bwlens
from bwlens import Edit, Site
from bwlens.edit import gradient_step
from bwlens.model.weights import weight_of
from tests import cases, oracle, tiny

EDITS = [
    Edit("{} t9 t30 t41", subject="t5", target_new=" t17"),
    Edit("{} t8", subject="t7", target_new=" t23 t44 t10"),
    Edit("t12 {} t6 t21 t50 t11", subject="t33", target_new=" t9 t9"),
]
"""The shared batch of prompts and targets, as edits."""


def trained(hf, optimizer_of, steps):
    """Train a Hugging Face model on the edits; leaves in `.grad` how far each weight moved."""
    before = {name: p.detach().clone() for name, p in hf.named_parameters()}
    optimizer = optimizer_of(hf.parameters())
    tokens, mask, loss = cases.teacher_forced_nll()
    losses = []
    for _ in range(steps):
        losses.append(oracle.backward(hf, tokens, mask, lambda logits: loss(logits) / 3).sum())
        optimizer.step()
    for name, parameter in hf.named_parameters():
        parameter.grad = parameter.detach() - before[name]
    return losses


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "phi3", "mixtral"])
def test_against_sgd(name, steps, boot):
    """Every matrix moves as under torch.optim.SGD with the rest of the model frozen."""
    matrices = ("W_in", "W_out", "W_V", "W_O")
    model, hf = boot(name), tiny.hf_model(name)
    change = gradient_step(model, EDITS, lr=0.05, matrices=matrices, steps=1, prepend_bos=False)
    losses = trained(hf, lambda p: torch.optim.SGD(p, lr=0.05), 1)
    assert change.details["losses"] == pytest.approx([float(loss) for loss in losses], rel=1e-5)
    for site, part in change.items():
        moved = oracle.dense(hf, site.matrix, site.layer, site.expert)
        assert oracle.relative_error(part.dense(), moved) < 1e-4, site
    if steps > 1 and name in ("gpt2", "llama", "gemma2"):  # one matrix alone, several steps
        hf = tiny.hf_model(name)
        hf.requires_grad_(False)
        module = {"gpt2": "mlp.c_proj"}.get(name, "mlp.down_proj")
        weight = oracle.layers(hf)[1].get_submodule(module).weight.requires_grad_()
        start = weight.detach().clone()
        optimizer = torch.optim.SGD([weight], lr=0.05)
        tokens, mask, loss = cases.teacher_forced_nll()
        for _ in range(steps):
            oracle.backward(hf, tokens, mask, lambda logits: loss(logits) / 3)
            optimizer.step()
        moved = weight.detach() - start
        found = gradient_step(model, EDITS, lr=0.05, layers=1, steps=steps, prepend_bos=False)[
            "W_out", 1
        ].dense()
        expected = moved if name == "gpt2" else moved.T
        assert oracle.relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_against_sgd_in_float64(name, boot):
    """To 1e-10 where rounding does not hide the difference."""
    with oracle.TrueFloat64():
        model, hf = boot(name, torch.float64), tiny.hf_model(name, torch.float64)
        change = gradient_step(model, EDITS, lr=0.05, matrices=("W_in", "W_out"), prepend_bos=False)
        trained(hf, lambda p: torch.optim.SGD(p, lr=0.05), 1)
    for site, part in change.items():
        moved = oracle.dense(hf, site.matrix, site.layer)
        assert oracle.relative_error(part.dense(), moved) < 1e-10, site


def test_the_loss_falls_and_the_model_stays(boot):
    model = boot("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change = gradient_step(model, EDITS, lr=0.02, layers=[1, 2], steps=4, prepend_bos=False)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in model.original_model.parameters())
    losses = change.details["losses"]
    assert losses == sorted(losses, reverse=True)
    assert list(change) == [Site("W_out", 1), Site("W_out", 2)]
    assert change["W_out", 1].n == 4 * (4 + 4 + 7)  # rows are the tokens, targets' included


def test_one_edit_is_one_capture(boot):
    model = boot("gpt2")
    change = gradient_step(model, EDITS[0], lr=0.1, layers=iter([2]), prepend_bos=False)
    grads = bwlens.capture(model, torch.tensor([[5, 9, 30, 41]]), 17, ("W_out",), 2)
    torch.testing.assert_close(change["W_out", 2].dense(), -0.1 * grads["W_out", 2].dense())


def test_steps_that_explode(boot):
    model = boot("gpt2")
    before = weight_of(model, Site("W_out", 1)).read()
    with pytest.raises(ValueError, match=r"nan|inf|not finite"):
        gradient_step(model, EDITS, lr=1e300, layers=1, steps=4, prepend_bos=False)
    assert torch.equal(weight_of(model, Site("W_out", 1)).read(), before)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": float("nan")}, "lr is nan; expected a finite lr"),
        ({"lr": "0.1"}, r"lr is '0\.1'; expected a finite lr"),
        ({"lr": 0.1, "steps": 0}, "steps is 0; expected at least one step"),
        ({"lr": 0.1, "steps": 1.5}, r"steps is 1\.5; expected at least one step"),
        ({"lr": 0.1, "matrices": "W_out2"}, "W_out2"),
    ],
    ids=str,
)
def test_bad_settings(settings, message, bridge):
    with pytest.raises(ValueError, match=message):
        gradient_step(bridge("gpt2"), EDITS, **settings)
