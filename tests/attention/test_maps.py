"""R is an unbridged Hugging Face model's; R K is the gradient of the queries; rows sum to 0."""

from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

import bwlens
from bwlens.checking.state import State
from tests import architectures, cases, oracle, tiny
from tests.attention import hugging_face

TOKENS, MASK = cases.padded(cases.PROMPTS, "left")
OBJECTIVE = bwlens.NLL(cases.TARGETS)
NO_MAPS = {"rwkv": "a recurrence"}
FAINT = {"starcoder2"}  # R of one head is so small that float32 rounds it by 3e-5, theirs too.
NOT_GIVEN = {"recurrent_gemma": "transformers gives out something else as its pattern"}
EXACT = {torch.float32: 3e-5, torch.float64: 1e-11}


def maps_of(model, **settings):
    return bwlens.reversed_attention(model, TOKENS, OBJECTIVE, attention_mask=MASK, **settings)


def largest_error(maps, expected, side, mask):
    errors = []
    for layer, (reversed_map, pattern) in zip(maps.layers, expected, strict=True):
        for prompt, n in enumerate(mask.sum(1).tolist()):
            real = slice(0, n) if side == "right" else slice(mask.shape[1] - n, None)
            for head in maps.heads[layer]:
                for kind, given in (("reversed", reversed_map), ("forward", pattern)):
                    mine = maps.map(layer, head, kind=kind, prompt=prompt)
                    theirs = given[prompt, head, real, real]
                    errors.append(oracle.relative_error(mine, theirs))
    return max(errors)


def check_against_hugging_face(model, hf, name, dtype, sides=("right", "left")):
    for side in sides:
        tokens, mask, loss = cases.teacher_forced_nll(side)
        expected = hugging_face.reversed_attention(hf, name, tokens, mask, loss)
        prompts, prompt_mask = cases.padded(cases.PROMPTS, side)
        maps = bwlens.reversed_attention(model, prompts, OBJECTIVE, attention_mask=prompt_mask)
        # Scores are about 1, the cap of 50 takes 1e-5 of a gradient.
        tolerance = 3e-5 if name == "gemma2" else EXACT[dtype]
        assert largest_error(maps, expected, side, mask) <= tolerance


@pytest.mark.parametrize("dtype", EXACT, ids=["float32", "float64"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_head_against_hugging_face(name, dtype, boot):
    with oracle.TrueFloat64() if dtype is torch.float64 else nullcontext():
        model, hf = boot(name, dtype), tiny.hf_model(name, dtype)
        model.original_model.config._experts_implementation = "eager"  # others know no float64
        check_against_hugging_face(model, hf, name, dtype)


@pytest.mark.filterwarnings("ignore:Hook alias .* did not resolve:UserWarning")
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "name", [n for n in architectures.ARCHITECTURES if n not in NO_MAPS | NOT_GIVEN]
)
def test_further_architectures_against_hugging_face(name, boot):
    for line, why in architectures.ARCHITECTURES[name].not_on.items():
        if tiny.HAS_HOOKED_TRANSFORMER and line == "3.":
            pytest.skip(why)
    dtype = torch.float64 if name in FAINT else torch.float32
    with oracle.TrueFloat64() if name in FAINT else nullcontext():
        model, hf = boot(name, dtype), tiny.hf_model(name, dtype)
        check_against_hugging_face(model, hf, name, dtype, ("left",))


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")
@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_hooked_transformer_against_hugging_face(name, processed, tokenizer):
    # Its mixtures know no float64.
    dtype = torch.float32 if name == "mixtral" else torch.float64
    with oracle.TrueFloat64() if dtype is torch.float64 else nullcontext():
        model = tiny.hooked_transformer(name, processed, tokenizer, dtype)
        check_against_hugging_face(model, tiny.hf_model(name, dtype), name, dtype, ("right",))


def test_compatibility_mode_against_hugging_face(bridge):
    model = bridge("llama", compatibility=True)
    hf = tiny.hf_model("llama")
    check_against_hugging_face(model, hf, "llama", torch.float32, ("right",))


# R K is the gradient of the queries, R^T Q that of the keys.

WINDOW = {**tiny._LLAMA, "sliding_window": 3}
CAPPED = {**tiny._LLAMA, "head_dim": 4, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 2.0}


def configs():
    yield "full", tiny.CONFIGS["gpt2"]()
    yield "scaled before", tiny.CONFIGS["opt"]()
    yield "grouped", LlamaConfig(**tiny._LLAMA, architectures=["LlamaForCausalLM"])
    one_key = tiny._LLAMA | {"num_key_value_heads": 1}
    yield "single key", LlamaConfig(**one_key, architectures=["LlamaForCausalLM"])
    window = MistralConfig(**WINDOW, architectures=["MistralForCausalLM"])
    yield "sliding window", window
    capped = tiny.Gemma2Config(**CAPPED, sliding_window=3, architectures=["Gemma2ForCausalLM"])
    yield "soft cap", capped


@pytest.mark.parametrize(("kind", "config"), [*configs()], ids=[kind for kind, _ in configs()])
def test_r_times_keys_is_the_gradient_of_queries(kind, config, tokenizer):
    def last(names, name):
        of_layer = [n for n in names if n.startswith("blocks.1.")]
        rotated = [n for n in of_layer if n.endswith(f"hook_rot_{name}")]
        return (rotated or [n for n in of_layer if n.endswith(f".{name}.hook_out")])[-1]

    with oracle.TrueFloat64():
        hf = tiny.hf_of(config, torch.float64)
        model = tiny.bridge("gpt2", tokenizer, torch.float64, hf=hf)
        prompt = [5, 9, 30, 41, 17, 8]
        maps = bwlens.reversed_attention(model, prompt, 17, layers=1)
        queries, keys = (last(model.hook_dict, name) for name in ("q", "k"))
        if kind in ("full", "scaled before"):  # not rotated: delta of W_Q and W_K themselves
            grads = bwlens.capture(model, prompt, 17, ("W_Q", "W_K"), 1)
            gradients = [split(grads[m, 1].delta, 4) for m in ("W_Q", "W_K")]
            with torch.no_grad():
                cache = model.run_with_cache(torch.tensor([prompt]))[1]
            values = [split(cache[n].flatten(2)[0], 4) for n in (queries, keys)]
        else:
            found = bwlens.vjps(model, prompt, 17, [queries, keys])
            gradients = [heads_first(found[n][0]) for n in (queries, keys)]
            with torch.no_grad():
                cache = model.run_with_cache(torch.tensor([prompt]))[1]
            values = [heads_first(cache[n][0]) for n in (queries, keys)]
    r = maps.reversed[0, 0]
    q, k = values
    share = len(r) // len(k)
    dq, dk = r @ k.repeat_interleave(share, 0), r.mT @ q
    dk = dk.unflatten(0, (len(k), share)).sum(1)
    assert oracle.relative_error(dq, gradients[0]) <= 1e-11
    assert oracle.relative_error(dk, gradients[1]) <= 1e-11
    rows = float(r.sum(-1).abs().max() / r.abs().max())
    assert rows > 1e-3 if kind == "soft cap" else rows <= 1e-12
    if kind == "sliding window":
        assert not r.tril(-3).any()
    assert not r.triu(1).any()


def split(rows, n_heads):
    return rows.unflatten(-1, (n_heads, -1)).transpose(0, 1)


def heads_first(tensor):
    """[head, pos, d] of a hook that shows it so or as [pos, head, d]; prompts have 6 tokens."""
    return tensor if tensor.shape[1] == 6 else tensor.transpose(0, 1)


def test_rows_of_the_scores_gradient_sum_to_zero(bridge):
    for name in ("gpt2", "llama", "bloom", "falcon", "mpt"):
        r = maps_of(bridge(name)).reversed
        assert float(r.sum(-1).abs().max() / r.abs().max()) <= 1e-5, name
        assert r.norm(dim=(-2, -1)).min() > 0


# Kernels that hide scores.


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss", "falcon", "opt"])
def test_sdpa_is_taken_apart(name, bridge, tokenizer):
    config = (tiny.CONFIGS | tiny.FURTHER)[name]()
    hf = tiny.hf_of(config)
    if name != "gpt_oss":  # which has no such kernel
        hf.set_attn_implementation("sdpa")
    expected = maps_of(bridge(name))
    mine = maps_of(tiny.bridge(name, tokenizer, hf=hf))
    assert oracle.relative_error(mine.reversed, expected.reversed) <= 1e-5
    assert oracle.relative_error(mine.forward, expected.forward) <= 1e-6


def test_another_kernel_is_switched_and_put_back(boot, bridge):
    model, expected = boot("mpt"), maps_of(bridge("mpt"))
    model.original_model.config._attn_implementation = "flex_attention"
    mine = maps_of(model)
    assert torch.equal(mine.reversed, expected.reversed)
    assert model.original_model.config._attn_implementation == "flex_attention"


# Some of it.


@pytest.mark.parametrize("layers", [1, [-1], [0, 2], slice(1, None)])
@pytest.mark.parametrize("heads", [0, [-1], [1, 3], slice(2)])
def test_layers_and_heads_are_the_full_run_s(layers, heads, bridge):
    model = bridge("llama")
    some, every = maps_of(model, layers=layers, heads=heads), maps_of(model)
    for layer in some.layers:
        for head in some.heads[layer]:
            for kind in ("reversed", "forward"):
                mine = some.map(layer, head, kind=kind, prompt=2)
                full = every.map(layer, head, kind=kind, prompt=2)
                torch.testing.assert_close(mine, full, rtol=1e-5, atol=1e-8)
    assert some.norms().shape == (3, len(some.layers), len(some.heads[some.layers[0]]))


def test_hybrids_give_the_layers_that_have_maps(bridge):
    model = bridge("jamba")
    assert maps_of(model).layers == [1]
    with pytest.raises(NotImplementedError, match=r"layer 0 .*(no attention map|softmax)"):
        maps_of(model, layers=0)
    with pytest.raises(NotImplementedError, match=r"layer 0 has no attention map.*DeltaNet"):
        maps_of(bridge("olmo_hybrid"), layers=[0, 1])


@pytest.mark.parametrize("name", ["rwkv", "mamba"])
def test_models_without_attention_are_refused(name, bridge):
    with pytest.raises(NotImplementedError, match=r"no attention that bwlens can read.*made of"):
        maps_of(bridge(name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 4}, r"head 4 asked for, but layer 0 has heads 0 to 3"),
        ({"heads": [-5]}, "head -5 asked for"),
        ({"heads": 1.5}, "head 1.5 asked for"),
        ({"heads": []}, "empty list of heads"),
        ({"heads": "1"}, "head '1' asked for"),
        ({"layers": 3}, "layer 3 asked for, but this model has layers 0 to 2"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_heads_and_layers_out_of_range(settings, message, bridge):
    with pytest.raises(ValueError, match=message):
        maps_of(bridge("gpt2"), **settings)


def test_what_was_not_asked_for_is_a_key_error(bridge):
    maps = maps_of(bridge("gpt2"), layers=[1, 2], heads=[0])
    with pytest.raises(KeyError, match=r"layer 0 has no map here; there are layers \[1, 2\]"):
        maps.map(0, 0)
    with pytest.raises(KeyError, match=r"head 3 was not asked for"):
        maps.map(-1, 3)
    with pytest.raises(IndexError, match="prompt 3 asked for, but there are 3"):
        maps.map(1, 0, prompt=3)


def test_the_model_is_left_as_it_was(boot):
    model = boot("llama").train()
    model(TOKENS)  # a bridge's first pass sets it up
    before = State.of(model), [vars(module).get("forward") for module in model.modules()]
    maps_of(model)
    with pytest.raises(ValueError, match="head 9"):
        maps_of(model, heads=9)
    assert before[0].compared(State.of(model)).verdict == "ok"
    assert before[1] == [vars(module).get("forward") for module in model.modules()]


def test_frozen_parameters_and_a_loss_of_ones_own(boot):
    model = boot("gpt2")
    expected = maps_of(model).reversed
    model.requires_grad_(False)
    assert torch.equal(maps_of(model).reversed, expected)
    with pytest.raises(ValueError, match=r"does not depend|cut off"):
        bwlens.reversed_attention(model, TOKENS[2:], lambda logits, batch: logits[:, 0, 0].detach())


def test_an_earlier_position_s_loss_leaves_later_queries_alone(bridge):
    def at_2(logits, batch):
        return logits[:, 2, 5]

    r = bwlens.reversed_attention(bridge("gpt2"), TOKENS[2:], at_2).reversed
    assert r[:, :, :, 1:3].any()
    assert not r[:, :, :, 3:].any()
