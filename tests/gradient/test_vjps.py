"""Gradients at TransformerLens' hook points: against its own backward hooks, by hand, by class."""

import pytest
import torch

import bwlens
from tests import cases, oracle, tiny

TOKENS = torch.tensor([[5, 9, 30, 41], [7, 8, 13, 12]])
STREAM = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"]
INSIDE = ["hook_attn_out", "hook_mlp_out", "mlp.hook_pre", "mlp.hook_post"]
INSIDE += [f"attn.hook_{name}" for name in ("q", "k", "v", "z", "attn_scores", "pattern")]
REQUESTED = ["hook_mlp_in", "hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_result"]


def nll(logits):
    return -logits[:, -1].log_softmax(-1)[:, 17]


def full(names, layer=1):
    return [f"blocks.{layer}.{name}" for name in names]


def own_backward_hooks(model, names, tokens=TOKENS):
    """What TransformerLens' backward hooks see, in its own shapes."""
    seen = {}
    for name in names:

        def keep(grad, hook, name=name):
            seen[name] = getattr(grad, "_tensor", grad).detach().clone()

        model.hook_dict[name].add_hook(keep, dir="bwd")
    nll(model(tokens)).sum().backward()
    model.reset_hooks()
    model.zero_grad()
    return seen


def assert_close(found, expected, tolerance=1e-5):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert oracle.relative_error(found[name], value) <= tolerance, name


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox", "phi3"])
def test_against_own_backward_hooks_on_a_bridge(name, processed, boot):
    """All but hook_resid_mid, which is the MLP's branch alone to a bridge's backward hooks."""
    model = boot(name, compatibility=processed)
    names = full([*INSIDE, "hook_resid_pre", "hook_resid_post", "mlp.hook_in"])
    if name in ("llama", "gemma2", "phi3"):
        names += full(["mlp.hook_pre_linear"])
    names.append("hook_embed")
    expected = own_backward_hooks(model, names)
    assert_close(bwlens.vjps(model, TOKENS, 17, names), expected)
    branches = full(["ln2.hook_in", "attn.q.hook_in", "attn.v.hook_in"])
    for branch in branches:  # apart, as TransformerLens' hooks on one tensor share its gradient
        expected = own_backward_hooks(model, [branch])
        assert_close(bwlens.vjps(model, TOKENS, 17, branch), expected)


def hugging_face_gradients(name):
    """The residual stream of an unbridged GPT-2 or Llama, and its branches, cut open by hand."""
    hf = tiny.hf_model(name)
    layers = oracle.layers(hf)
    if name == "gpt2":
        embed, attention, ln2 = hf.transformer.wte, layers[1].attn, layers[1].ln_2
    else:
        embed, attention = hf.model.embed_tokens, layers[1].self_attn
        ln2 = layers[1].post_attention_layernorm
    kept = {}

    def keep(name, tensor):
        kept[name] = tensor
        return tensor

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def split_mid(module, args):
        keep("hook_resid_mid", args[0])
        return (keep("hook_mlp_in", args[0].view_as(args[0])),)

    def output_of(module, name):
        module.register_forward_hook(lambda m, args, out: [keep(name, first(out))].clear())

    output_of(embed, "hook_embed")
    output_of(layers[0], "hook_resid_pre")
    output_of(layers[1], "hook_resid_post")
    output_of(attention, "hook_attn_out")
    output_of(layers[1].mlp, "hook_mlp_out")
    ln2.register_forward_pre_hook(split_mid)
    return hf, kept


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_by_hand_on_hugging_face(name, processed, boot):
    hf, kept = hugging_face_gradients(name)
    grads = torch.autograd.grad(nll(hf(TOKENS).logits).sum(), list(kept.values()))
    expected = {
        key if key == "hook_embed" else f"blocks.1.{key}": grad
        for key, grad in zip(kept, grads, strict=True)
    }
    model = boot(name, compatibility=processed)
    found = bwlens.vjps(model, TOKENS, 17, list(expected))
    assert len(expected) == 7
    assert_close(found, expected)


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has one class")
@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_bridge_and_hooked_transformer_agree(name, processed, boot):
    """Every name that both have, those that fire on request among them."""
    hooked, model = tiny.hooked_transformer(name, processed), boot(name, compatibility=processed)
    names = [n for n in STREAM + INSIDE + REQUESTED if name != "mixtral" or n[:4] != "mlp."]
    names = ["hook_embed", *full(names)]
    expected = bwlens.vjps(hooked, TOKENS, 17, names)
    assert_close(bwlens.vjps(model, TOKENS, 17, names), expected)
    if name == "gpt2":  # HookedTransformer's ln1 runs three times
        for others in (["ln1.hook_normalized", "ln2.hook_normalized"], ["hook_attn_in"]):
            a, b = (bwlens.vjps(m, TOKENS, 17, full(others)) for m in (hooked, model))
            assert_close(a, b)
    once = full(STREAM + INSIDE[:2] + INSIDE[4:])  # its own hooks, where they fire once
    assert_close({n: expected[n] for n in once}, own_backward_hooks(hooked, once))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_frozen_model(name, boot):
    model = boot(name)
    names = ["hook_embed", *full([*STREAM, "attn.hook_q"])]
    expected = bwlens.vjps(model, TOKENS, 17, names)
    model.requires_grad_(False)
    assert_close(bwlens.vjps(model, TOKENS, 17, names), expected, 0)


def test_a_batch_is_its_prompts_one_by_one(bridge):
    """Padded on the right, whatever side the prompts came from, with zeros there."""
    model = bridge("gpt2")
    prompts, mask = cases.padded(cases.PROMPTS, "left")
    names = full(["hook_resid_mid", "attn.hook_q", "attn.hook_attn_scores"])
    batch = bwlens.vjps(model, prompts, bwlens.NLL(cases.TARGETS), names, attention_mask=mask)
    for i, (prompt, target) in enumerate(zip(cases.PROMPTS, cases.TARGETS, strict=True)):
        alone = bwlens.vjps(model, torch.tensor(prompt), bwlens.NLL(target), names)
        n = len(prompt) + len(target) - 1
        for name in names[:2]:
            assert oracle.relative_error(batch[name][i, :n], alone[name][0]) < 1e-5
            assert not batch[name][i, n:].any()
        scores = batch[names[2]][i]
        assert oracle.relative_error(scores[:, :n, :n], alone[names[2]][0]) < 1e-5
        assert not scores[:, n:].any()
        assert not scores[:, :, n:].any()


# Which names.


def test_names_filter(bridge):
    model = bridge("gpt2")
    name = "blocks.1.hook_resid_post"
    alone = bwlens.vjps(model, TOKENS, 17, name)
    assert list(alone) == [name]
    assert alone[name].grad_fn is None
    several = bwlens.vjps(model, TOKENS, 17, [name, "hook_embed"])
    assert list(several) == [name, "hook_embed"]
    by_predicate = bwlens.vjps(model, TOKENS, 17, lambda name: name.endswith("hook_resid_post"))
    assert list(by_predicate) == [f"blocks.{n}.hook_resid_post" for n in range(tiny.LAYERS)]
    for found in (several, by_predicate):
        assert torch.equal(found[name], alone[name])


def test_several_names_of_one_tensor(boot):
    """On a bridge the stream, the MLP's branch and the norm's input are one tensor."""
    model = boot("llama")
    names = full(["ln2.hook_in", "hook_mlp_in", "hook_resid_mid", "hook_resid_pre"])
    together = bwlens.vjps(model, TOKENS, 17, names)
    for name in names:
        alone = bwlens.vjps(model, TOKENS, 17, name)
        assert oracle.relative_error(together[name], alone[name]) < 1e-6, name
    branch, stream = together[names[1]], together[names[2]]
    out = bwlens.vjps(model, TOKENS, 17, "blocks.1.hook_resid_post")["blocks.1.hook_resid_post"]
    assert oracle.relative_error(branch + out, stream) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj", "mixtral"])
def test_a_predicate_takes_what_the_model_has(kind, boot):
    """GPT-J's bridge cannot split its attention's input; that is no reason to fail."""
    model = boot(kind)
    found = bwlens.vjps(model, TOKENS, 17, lambda name: True)
    assert {"hook_embed", *full(["hook_resid_pre", "hook_mlp_out", "attn.hook_q"])} <= set(found)
    assert ("blocks.1.attn.hook_result" in found) == (kind != "gptj")
    only = bwlens.vjps(model, TOKENS, 17, lambda name: name.endswith(("hook_q_input", "hook_z")))
    assert ("blocks.1.hook_q_input" in only) == (kind != "gptj")
    assert "blocks.1.attn.hook_z" in only
    assert not model.cfg.use_attn_result


@pytest.mark.parametrize(
    ("name", "flag", "shape"),
    [
        ("hook_mlp_in", "use_hook_mlp_in", (2, 4, 16)),
        ("hook_attn_in", "use_attn_in", (2, 4, 4, 16)),
        ("hook_q_input", "use_split_qkv_input", (2, 4, 4, 16)),
        ("hook_k_input", "use_split_qkv_input", (2, 4, 2, 16)),
        ("attn.hook_result", "use_attn_result", (2, 4, 4, 16)),
    ],
)
def test_hook_points_on_request(name, flag, shape, boot):
    """Switched on for the call; a flag that its user had set stays set."""
    model = boot("llama")
    name = f"blocks.1.{name}"
    assert not getattr(model.cfg, flag)
    first = bwlens.vjps(model, TOKENS, 17, name)
    assert first[name].shape == shape
    assert not getattr(model.cfg, flag)
    getattr(model, f"set_{flag}")(True)
    assert_close(bwlens.vjps(model, TOKENS, 17, name), first)
    assert getattr(model.cfg, flag)


def test_residual_gradients_add_up(bridge):
    """What reaches resid_pre came down the stream or through the heads' inputs."""
    model = bridge("gpt2")
    names = full(["hook_resid_pre", "hook_resid_mid", "hook_q_input", "hook_k_input"])
    names += full(["hook_v_input"])
    found = bwlens.vjps(model, TOKENS, 17, names)
    pre, mid, *heads = (found[name] for name in names)
    total = mid + sum(head.sum(2) for head in heads)
    assert oracle.relative_error(total, pre) < 1e-5


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ("blocks.1.hook_residual", r"no hook point 'blocks.1.hook_residual' in this model; there"),
        (["hook_embed", "nothing"], "no hook point 'nothing'"),
        ("blocks.7.hook_resid_mid", r"there are \['blocks.0.hook_resid_mid'"),
        ("blocks.1.ln2.hook_normalized", "only shows its tensor, off the way to the loss"),
        (lambda name: False, "no hook point that the filter lets through"),
    ],
)
def test_names_that_give_nothing(names, error, bridge):
    with pytest.raises(ValueError, match=error):
        bwlens.vjps(bridge("llama"), TOKENS, 17, names)


def test_a_name_that_never_fires(boot):
    """Per-head results are computed instead of the projection, whose own hook points are silent."""
    model = boot("gpt2")
    model.set_use_attn_result(True)
    with pytest.raises(ValueError, match=r"attn\.o\.hook_out did not fire .*names that fire"):
        bwlens.vjps(model, TOKENS, 17, "blocks.1.attn.o.hook_out")


def test_two_switches_that_exclude_each_other(boot):
    model = boot("gpt2")
    names = full(["hook_attn_in", "hook_q_input"])
    with pytest.raises(ValueError, match="mutually exclusive"):
        bwlens.vjps(model, TOKENS, 17, names)
    assert not model.cfg.use_attn_in
    assert not model.cfg.use_split_qkv_input


def test_a_point_that_fires_twice_has_both_gradients(boot):
    model, prompt = boot("gpt2"), [5, 9, 30, 41]
    first, second = names = ["blocks.1.hook_in", "blocks.2.hook_in"]
    alone = bwlens.vjps(model, prompt, 17, names)
    again = model.blocks[1].hook_in
    model.blocks[2].register_forward_pre_hook(lambda _, args: (again(args[0]), *args[1:]))
    both = bwlens.vjps(model, prompt, 17, [first])
    torch.testing.assert_close(both[first], alone[first] + alone[second])
