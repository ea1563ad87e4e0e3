"""HookedTransformer, raw and with processed weights: TransformerLens 3.9's other model class."""

import pytest
import torch

import bwlens
from bwlens.model.sites import available_matrices
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


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters(name):
    model = tiny.hooked_transformer(name)
    model.requires_grad_(False)
    cases.check_every_matrix(model, tiny.hf_model(name), 1e-5, sides=("right",))
    with torch.no_grad():
        assert bwlens.capture(model, torch.tensor([5, 9]), 17, ["W_O"])["W_O", 0].delta.any()


def test_texts(tokenizer):
    """With BOS or without, its default included; padding is never asked of the tokenizer."""
    model = tiny.hooked_transformer("llama", tokenizer=tokenizer)
    texts = ["t5 t9 t30", "t7 t8"]
    for prepend_bos, first in ((True, [1]), (False, []), (None, [1])):
        tokens, mask = cases.padded([[*first, 5, 9, 30], [*first, 7, 8]])
        a = bwlens.capture(model, texts, " t17", prepend_bos=prepend_bos)
        b = bwlens.capture(model, tokens, 17, attention_mask=mask)
        assert torch.equal(a.batch.tokens, b.batch.tokens)
        assert torch.equal(a["W_in", 0].x, b["W_in", 0].x)
    model.tokenizer.padding_side = "left"
    left = bwlens.capture(model, texts, " t17")
    assert torch.equal(left["W_in", 0].x, a["W_in", 0].x)
    assert model.tokenizer.padding_side == "left"


def test_an_expert_without_tokens_is_left_out(boot):
    one = torch.tensor([5])
    hooked = bwlens.capture(tiny.hooked_transformer("mixtral"), one, 17)
    bridge = bwlens.capture(boot("mixtral"), one, 17)
    assert set(hooked) == set(bridge)
    assert len({site.expert for site in hooked if site.layer == 0}) == 2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_flags_of_the_user(name):
    model, plain = tiny.hooked_transformer(name), tiny.hooked_transformer(name)
    tokens, matrices = torch.tensor([[5, 9, 30]]), available_matrices(plain)
    expected = bwlens.capture(plain, tokens, 17, matrices)
    for flag in ("use_attn_result", "use_hook_mlp_in"):
        getattr(model, f"set_{flag}")(True)
        found = bwlens.capture(model, tokens, 17, matrices)
        for site, gradient in expected.items():
            assert oracle.relative_error(found[site].dense(), gradient.dense()) < 1e-5
    model.set_use_split_qkv_input(True)
    assert len(bwlens.capture(model, tokens, 17)) == 2 * tiny.LAYERS
    with pytest.raises(NotImplementedError, match=r"W_Q of layer 0: .*_split_qkv_input\(Fal"):
        bwlens.capture(model, tokens, 17, ("W_Q",))


def test_ungrouped_keys_are_the_expanded_weight_s():
    """With keys and values ungrouped, the matrices are the repeated ones that `W_K` shows."""
    model = tiny.hooked_transformer("llama")
    tokens = torch.tensor([[5, 9, 30]])
    grouped = bwlens.capture(model, tokens, 17, ("W_K", "W_V"))
    model.set_ungroup_grouped_query_attention(True)
    ungrouped = bwlens.capture(model, tokens, 17, ("W_K", "W_V"))
    for site, gradient in grouped.items():
        heads = (
            ungrouped[site].dense().reshape(16, 2, 2, 4).sum(2)
        )  # [d_model, group, head, d_head]
        assert oracle.relative_error(heads.flatten(1), gradient.dense()) < 1e-5


def test_user_hooks_are_respected():
    model = tiny.hooked_transformer("gpt2")
    tokens = torch.tensor([[5, 9, 30, 41]])
    model.add_hook("blocks.1.mlp.hook_post", lambda tensor, hook: tensor * 0.5 + 0.1)
    (-model(tokens)[:, -1].log_softmax(-1)[:, 17]).sum().backward()
    found = bwlens.capture(model, tokens, 17, ("W_in", "W_out"), 1)
    for matrix in ("W_in", "W_out"):
        expected = getattr(model.blocks[1].mlp, matrix).grad
        assert oracle.relative_error(found[matrix, 1].dense(), expected) < 1e-5
