"""HookedTransformer, raw and with processed weights: TransformerLens 3.9's other model class."""

import pytest
import torch

import bwlens
from bwlens.sites import available_matrices
from tests import cases, oracle, tiny

pytestmark = pytest.mark.skipif(
    not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no HookedTransformer"
)
NAMES = ("gpt2", "llama", "gemma2", "mixtral")


@pytest.mark.parametrize("name", NAMES)
def test_raw_against_hugging_face(name):
    cases.check_every_matrix(tiny.hooked_transformer(name), tiny.hf_model(name), 1e-5)


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_against_its_own_parameters(name, processed):
    """`loss.backward()` fills `.grad` of the very weights the user holds, folded or not."""
    model = tiny.hooked_transformer(name, processed)
    tokens, _, loss = cases.teacher_forced_nll()
    loss(model(tokens)).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    prompts, mask = cases.padded(cases.PROMPTS)
    objective = bwlens.NLL(cases.TARGETS)
    grads = bwlens.capture(
        model, prompts, objective, available_matrices(model), attention_mask=mask
    )
    assert len(grads) >= 6 * tiny.LAYERS
    for site, gradient in grads.items():
        error = oracle.relative_error(gradient.dense(), own_gradient(expected, site))
        assert error <= 1e-5, f"{site}: {error:.1e}"
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name])


def own_gradient(grads, site):
    """[d_in, d_out] out of TransformerLens' shapes."""
    block = f"blocks.{site.layer}"
    if site.expert is not None:  # nn.Linear: [d_out, d_in]
        return grads[f"{block}.mlp.experts.{site.expert}.{site.matrix}.weight"].T
    if site.matrix in ("W_in", "W_gate", "W_out"):
        return grads[f"{block}.mlp.{site.matrix}"]
    name = f"{block}.attn.{site.matrix}"
    grad = grads[name] if name in grads else grads[f"{block}.attn._{site.matrix}"]
    if site.matrix == "W_O":  # [head, d_head, d_model]
        return grad.flatten(0, 1)
    return grad.movedim(0, 1).flatten(1)  # [head, d_model, d_head]


@pytest.mark.parametrize("name", NAMES)
def test_same_as_the_bridge(name, boot):
    """Two model classes, one set of weights: the same x and delta, row by row."""
    prompts, mask = cases.padded(cases.PROMPTS, "left")
    a, b = (
        bwlens.capture(model, prompts, 17, available_matrices(model), attention_mask=mask)
        for model in (tiny.hooked_transformer(name), boot(name))
    )
    assert set(a) == set(b)
    for site in a:
        assert torch.equal(a[site].prompt, b[site].prompt)
        assert torch.equal(a[site].pos, b[site].pos)
        assert oracle.relative_error(a[site].x, b[site].x) < 1e-5
        assert oracle.relative_error(a[site].delta, b[site].delta) < 1e-5
    torch.testing.assert_close(a.next_logits.log_softmax(-1), b.next_logits.log_softmax(-1))
