"""Which matrices a model has, and what is said of models and requests out of scope."""

import pytest
import torch
from torch import nn

import bwlens
from bwlens.model.head import head_of
from bwlens.model.sites import (
    ExpertTap,
    Site,
    Tap,
    available_matrices,
    check_model,
    find_taps,
    plain_taps,
    resolve_layers,
    resolve_matrices,
)
from tests import tiny

TOKENS = torch.tensor([[5, 9, 30, 41]])
DENSE = ("W_in", "W_out", "W_Q", "W_K", "W_V", "W_O")


# What a model has.


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_matrices(name, bridge):
    plain = name in ("gpt2", "gpt_neox", "gptj", "opt")
    expected = DENSE if plain else bwlens.MATRICES
    assert available_matrices(bridge(name)) == expected


def test_matrices_of_a_model_without_some(boot):
    assert available_matrices(boot("deepseek_v3")) == ("W_in", "W_gate", "W_out", "W_O")
    assert available_matrices(boot("mamba")) == ()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_taps_come_layer_by_layer(name, bridge):
    taps = find_taps(bridge(name), ("W_Q", "W_in"), (2, -3))
    assert all(isinstance(tap, Tap) for tap in taps)
    assert [tap.site for tap in taps if isinstance(tap, Tap)] == [
        Site("W_in", 0), Site("W_Q", 0), Site("W_in", 2), Site("W_Q", 2)
    ]  # fmt: skip


def test_taps_of_a_mixture(bridge):
    """Only the parameters that hold a matrix asked for are followed; the router is no W_gate."""
    model = bridge("mixtral")
    for matrix, parameter in (("W_out", "down_proj"), ("W_gate", "gate_up_proj")):
        (tap,) = find_taps(model, [matrix], 1)
        assert isinstance(tap, ExpertTap)
        assert list(tap.weights) == [parameter]


def test_a_gate_alone_is_a_router(boot):
    """W_gate is a gate only beside a W_in."""
    model = boot("llama")
    for block in model.blocks:
        del block.mlp._modules["in"]
    assert available_matrices(model) == ("W_out", "W_Q", "W_K", "W_V", "W_O")


def test_sites_read_well_and_sort():
    assert str(Site("W_in", 3)) == "W_in of layer 3"
    assert str(Site("W_in", 3, 7)) == "W_in of layer 3, expert 7"
    assert sorted([Site("W_out", 0), Site("W_in", 2), Site("W_in", 1)])[0] == Site("W_in", 1)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2]),
        (1, [1]),
        (-1, [2]),
        ([2, 0, -1], [0, 2]),
        (range(2), [0, 1]),
        ((-3,), [0]),
        (slice(None), [0, 1, 2]),
        (slice(-2, None), [1, 2]),
    ],
)
def test_layers(layers, expected, bridge):
    assert resolve_layers(bridge("gpt2"), layers) == expected


# What a request may not ask for.


@pytest.mark.parametrize(
    ("matrices", "layers", "error"),
    [
        (["W_in", "W_up"], None, r"matrices must be among W_in, .*, W_O; found 'W_up'"),
        ([], None, "matrices must be among .* found an empty list"),
        ("W_up", None, r"matrices must be among .* found 'W_up'$"),
        (
            ["W_gate"],
            None,
            "W_gate: no such matrix in layers 0-2 of this model; it has W_in, W_out",
        ),
        (["W_gate", "W_in"], [1], "W_gate: no such matrix in layer 1 of this model"),
        (["W_in"], [3], r"layer 3 asked for, but this model has layers 0 to 2 \(or -3 to -1 from"),
        (["W_in"], -4, "layer -4 asked for"),
        (["W_in"], [], "an empty list of layers asked for, but this model has layers 0 to 2"),
        (["W_in"], slice(7, None), "an empty list of layers asked for"),
        (["W_in"], slice("a", None), r"layers slice\('a', None, None\) asked for; this model has"),
        (["W_in"], [0, True], "layer True asked for; expected whole numbers, this model has"),
        (["W_in"], "1", "layer '1' asked for; expected whole numbers, this model has layers 0 to"),
    ],
    ids=str,
)
def test_bad_requests(matrices, layers, error, bridge, unchecked):
    with pytest.raises(ValueError, match=error):
        bwlens.capture(bridge("gpt2"), TOKENS, 17, matrices, layers)


def test_names_of_matrices(unchecked):
    assert resolve_matrices("W_out") == ("W_out",)
    assert resolve_matrices(["W_out", "W_in", "W_out"]) == ("W_out", "W_in")
    for odd in (5, None, ["W_in", 3]):
        with pytest.raises(TypeError, match=r"names among W_in, .*; found"):
            resolve_matrices(odd)  # pyright: ignore[reportArgumentType]


def test_one_name_is_a_list_of_one(bridge):
    grads = bwlens.capture(bridge("gpt2"), TOKENS, 17, "W_out", layers=slice(-1, None))
    assert list(grads) == [Site("W_out", 2)]


def test_a_layer_without_an_mlp(boot):
    """A block may lack the part; only where no layer asked for has it is that an error."""
    model = boot("gpt2")
    del model.blocks[1]._modules["mlp"]
    with pytest.raises(ValueError, match=r"W_in: no such matrix in layer 1 .* it has W_in, W_out"):
        find_taps(model, ("W_in",), 1)
    assert len(find_taps(model, ("W_in",))) == 2
    for layer in (0, 2):
        del model.blocks[layer]._modules["mlp"]
    with pytest.raises(ValueError, match="in layers 0-2 of this model; it has W_Q, W_K, W_V, W_O"):
        find_taps(model, ("W_in", "W_Q"))


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has one class")
def test_attention_only_hooked_transformer():
    model = tiny.attention_only()
    assert available_matrices(model) == ("W_Q", "W_K", "W_V", "W_O")
    with pytest.raises(
        ValueError, match=r"W_in, W_out: no such matrix .* it has W_Q, W_K, W_V, W_O"
    ):
        bwlens.capture(model, TOKENS, 17)
    assert len(bwlens.capture(model, TOKENS, 17, ("W_O",))) == len(model.blocks)
    found = bwlens.vjps(model, TOKENS, 17, lambda name: True)
    assert "blocks.1.attn.hook_q" in found


def test_a_mixture_kept_in_another_form(boot):
    model = boot("gpt_oss")
    error = r"GptOssExperts keeps .* in down_proj, gate_up_proj \(transposed or interleaved\)"
    with pytest.raises(NotImplementedError, match=error):
        bwlens.capture(model, TOKENS, 17)
    assert len(bwlens.capture(model, TOKENS, 17, ("W_O",))) == len(model.blocks)


def test_a_state_space_model_has_none_of_them(boot):
    with pytest.raises(
        ValueError,
        match=r"W_in, W_out: no such .* blocks are made of norm .*, mixer \(MambaMixer\)",
    ):
        bwlens.capture(boot("mamba"), TOKENS, 17)


def test_where_no_matrix_is_named_and_no_mlp_can_be_read(boot):
    with pytest.raises(
        NotImplementedError, match=r"finds none .* it has none of those bwlens knows"
    ):
        bwlens.backward_lens(boot("mamba"), TOKENS[0], 17)
    with pytest.raises(
        NotImplementedError, match=r"finds none .* \(GptOssExperts keeps .* it has W_Q"
    ):
        bwlens.backward_lens(boot("gpt_oss"), TOKENS[0], 17)
    with pytest.raises(NotImplementedError, match=r"W_in of layer 1 cannot be read: Llama4TextExp"):
        bwlens.backward_lens(boot("llama4"), TOKENS[0], 17)
    assert len(bwlens.capture(boot("llama4"), TOKENS, 17, layers=0)) == 2  # its dense layer


def test_a_stream_that_is_projected_before_it_is_unembedded(boot):
    model = boot("opt_350m")
    assert len(bwlens.capture(model, TOKENS, 17)) == 2 * len(model.blocks)
    with pytest.raises(NotImplementedError, match=r"stream .* has 16 entries, but .* takes 8"):
        bwlens.backward_lens(model, TOKENS[0], 17)


# Matrices that share a projection, and experts that all tokens pass.


def test_a_projection_that_is_too_wide(boot):
    """What a projection gives is measured against what takes it."""
    model = boot("llama")
    model.blocks[1].attn.q.set_original_component(nn.Linear(16, 48, bias=False))
    model.blocks[1].mlp.out.set_original_component(nn.Linear(12, 16, bias=False))
    for matrix, reason in (
        ("W_Q", r"W_Q of layer 1 cannot be read: Linear gives 48 columns, but the heads hand 16"),
        ("W_in", "W_in of layer 1 cannot be read: Linear gives 24 columns, but W_out takes 12"),
        ("W_gate", "W_gate of layer 1 cannot be read: Linear gives 24 columns"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            find_taps(model, matrix)
        assert len(find_taps(model, matrix, [0, 2])) == 2


def test_two_mlps_in_one_block(boot):
    model = boot("llama")
    model.blocks[0].another = model.blocks[1].mlp
    with pytest.raises(NotImplementedError, match="has more than one part for it: LlamaMLP"):
        find_taps(model, "W_in")


def test_queries_without_their_gates(bridge):
    model = bridge("qwen3_5_full_attention")
    wide = model.blocks[0].attn.q.original_component
    grads = bwlens.capture(model, TOKENS, 17, ("W_Q", "W_O"))
    assert wide.out_features == 2 * grads["W_O", 0].x.shape[1]
    assert grads["W_Q", 0].delta.shape[1] == grads["W_O", 0].x.shape[1]
    with pytest.raises(NotImplementedError, match="W_Q of layer 0 shares its projection with gat"):
        plain_taps(model, "W_Q", None, "keys want one weight")


def test_the_shared_expert_is_one_of_its_own(bridge):
    grads = bwlens.capture(bridge("qwen2_moe"), TOKENS, 17, layers=1)
    shared = grads["W_in", 1, "shared"]
    assert shared.shape == (16, 20)
    assert shared.pos is not None
    assert shared.pos.tolist() == [0, 1, 2, 3]
    assert next(site.expert for site in grads if site.matrix == "W_in") == "shared"
    assert Site("W_in", 1, "shared") < Site("W_in", 1, 0) < Site("W_in", 1, 3)
    assert str(Site("W_in", 1, "shared")) == "W_in of layer 1, shared expert"
    numbers = [Site("W_in", 1, e).expert_number for e in (None, "shared", 0, 3)]
    assert numbers == [-1, -2, 0, 3]
    with pytest.raises(KeyError, match=r"the experts .*'shared'"):
        grads["W_in", 1]


# What is no model for bwlens.


def assert_refused(model, error, message):
    for call in (
        lambda: bwlens.capture(model, TOKENS, 17),
        lambda: bwlens.vjps(model, TOKENS, 17, "hook_embed"),
        lambda: available_matrices(model),
        lambda: head_of(model),
    ):
        with pytest.raises(error, match=message):
            call()


def test_not_a_transformer_lens_model(bridge):
    message = r"expected a TransformerLens model .* found {}; load one with bwlens\.load_model"
    assert_refused(tiny.hf_model("gpt2"), TypeError, message.format("GPT2LMHeadModel"))
    assert_refused("gpt2", TypeError, message.format("str"))
    assert_refused(None, TypeError, message.format("NoneType"))


def test_a_peft_model():
    model = Stub(peft_config={})
    assert_refused(
        model, TypeError, r"Stub is a PEFT model.*merge_and_unload\(\)\) and boot the re"
    )


def test_encoder_decoder(boot):
    message = "TransformerBridge is an encoder-decoder; bwlens reads decoder-only language models"
    assert_refused(boot("t5"), NotImplementedError, message)


def test_encoder(boot):
    model = boot("bert")
    if model.cfg.attention_dir == "causal":
        pytest.skip("this version of TransformerLens does not say that BERT's attention is not")
    assert_refused(model, NotImplementedError, "attends in both directions; bwlens reads causal")


def test_encoder_that_passes_for_causal(boot):
    """Padding then changes the result, which is noticed."""
    model = boot("bert")
    model.cfg.attention_dir = "causal"
    tokens, mask = torch.tensor([[5, 9, 30], [7, 8, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match=r"depends on padding, .* or the model is not causal"):
        bwlens.capture(model, tokens, 17, attention_mask=mask)


def test_remote_model():
    """A bridge to weights elsewhere has hook points, but is no module with parameters."""

    class RemoteBridge:
        hook_dict = {}  # noqa: RUF012

    assert_refused(RemoteBridge(), NotImplementedError, "RemoteBridge holds no weights in this pr")


class Stub(nn.Module):
    """As much of a model as is looked at."""

    def __init__(self, **parts):
        super().__init__()
        self.weight, self.hook_dict = nn.Parameter(torch.zeros(1)), {}
        for name, part in parts.items():
            setattr(self, name, part)


def test_models_without_a_needed_part():
    blocks = nn.ModuleList([nn.Identity()])
    none = "this Stub has no stack of transformer blocks"
    assert_refused(Stub(), NotImplementedError, none)
    assert_refused(Stub(blocks=nn.ModuleList()), NotImplementedError, none)
    assert_refused(Stub(blocks=blocks), NotImplementedError, "has no unembedding")
    check_model(Stub(blocks=blocks, unembed=nn.Identity()))
    empty = Stub(blocks=blocks, unembed=nn.Identity())
    del empty.weight
    assert_refused(empty, NotImplementedError, "this Stub holds no weights in this process")


# From a residual vector to the vocabulary.


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", [*tiny.CONFIGS, "granite"])
def test_head_gives_the_model_s_logits(name, processed, boot):
    """scale, norm, unembedding and soft cap, put together by hand, are the model's own."""
    model = boot(name, compatibility=processed)
    kept = {}
    model.ln_final.register_forward_pre_hook(lambda module, args: kept.update(resid=args[0]))
    with torch.no_grad():
        logits = model(TOKENS)[0]
        head = head_of(model)
        rows = head.norm(kept["resid"][0][:, None])[:, 0]
        found = rows @ head.W_U
        found = head.scale * (found if head.b_U is None else found + head.b_U)
        if head.soft_cap is not None:
            found = head.soft_cap * torch.tanh(found / head.soft_cap)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert (head.soft_cap is not None) == (name == "gemma2")
    assert (head.scale != 1) == (name == "granite")
    assert head.centred == (name in ("gpt2", "gpt_neox", "gptj", "opt"))
    assert 0 < head.eps < 1e-4


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has one class")
@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_heads_of_both_classes_agree(name, processed, boot):
    hooked = head_of(tiny.hooked_transformer(name, processed))
    bridge = head_of(boot(name, compatibility=processed))
    for field in ("soft_cap", "scale", "centred"):
        assert getattr(hooked, field) == getattr(bridge, field)
    assert hooked.eps == pytest.approx(bridge.eps)
    vector = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (head.norm(vector)[:, 0] @ head.W_U for head in (hooked, bridge))
    torch.testing.assert_close(a.log_softmax(-1), b.log_softmax(-1), rtol=1e-4, atol=1e-4)
