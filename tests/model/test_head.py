"""The head is measured: whatever stands between the last block and the logits is seen."""

import gc
import weakref

import pytest
import torch
from torch import nn

import bwlens
from bwlens.model.head import head_of
from tests import heads, tiny

TOKENS = torch.tensor([[5, 9, 30, 41]])


def model_of(config, tokenizer, **options):
    return tiny.bridge("as given", tokenizer, hf=tiny.hf_of(config), **options)


def says_its_own_logits(model, tolerance=1e-4):
    """`readout` of the last stream, against the logits of the model itself."""
    kept = {}
    hook = model.blocks[-1].register_forward_hook(lambda m, a, out: kept.update(out=out))
    with torch.no_grad():
        logits = model(TOKENS)[0].float()
    hook.remove()
    stream = kept["out"][0] if isinstance(kept["out"], tuple | list) else kept["out"]
    read = bwlens.readout(model, stream[0], top_k=tiny.VOCAB)
    expected = logits.gather(1, read.top_ids)
    return float((read.top_scores - expected).norm() / logits.std()) <= tolerance


@pytest.mark.parametrize("name", heads.READABLE)
def test_scale_and_cap_are_those_that_the_model_uses(name, tokenizer):
    config, scale, cap, centred = heads.READABLE[name]
    try:
        model = model_of(config(), tokenizer)
    except ValueError as error:
        pytest.skip(f"this version of TransformerLens does not know it: {str(error)[:60]}")
    head = head_of(model)
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert head.soft_cap == (None if cap is None else pytest.approx(cap, rel=1e-3))
    assert head.centred == centred
    assert says_its_own_logits(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["granite", "cohere", "mpt"])
def test_half_precision(name, dtype, tokenizer):
    config, scale, _, _ = heads.READABLE[name]
    model = tiny.bridge("x", tokenizer, dtype, hf=tiny.hf_of(config(), dtype))
    assert head_of(model).scale == pytest.approx(scale, rel=2e-3)


@pytest.mark.parametrize("compatibility", [False, True], ids=["raw", "compatible"])
def test_compatibility_mode(compatibility, tokenizer):
    config = heads.READABLE["granite"][0]()
    model = model_of(config, tokenizer, compatibility=compatibility)
    assert head_of(model).scale == 0.125
    assert says_its_own_logits(model)


class Capped(nn.Linear):
    """An unembedding with a multiplier, a bias that it leaves alone, and a cap, all its own."""

    def forward(self, input):
        return 9 * torch.tanh((0.3 * nn.functional.linear(input, self.weight) + self.bias) / 9)


def test_a_multiplier_a_bias_and_a_cap_that_no_config_names(tokenizer):
    hf = tiny.hf_model("llama")
    plain, hf.lm_head = hf.lm_head, Capped(16, tiny.VOCAB)
    hf.lm_head.load_state_dict({"weight": plain.weight, "bias": torch.linspace(-1, 1, tiny.VOCAB)})
    model = tiny.bridge("llama", tokenizer, hf=hf)
    head = head_of(model)
    assert head.scale == pytest.approx(0.3, rel=1e-5)
    assert head.soft_cap == pytest.approx(9, rel=1e-3)
    assert says_its_own_logits(model, 2e-3)


# What has no head.


def test_a_projection_behind_the_blocks(tokenizer):
    model = model_of(heads.opt(), tokenizer)
    with pytest.raises(NotImplementedError, match=r"16 entries, .* takes 8: a projection"):
        head_of(model)
    assert len(bwlens.capture(model, TOKENS, 17)) == 2 * 2


class Transformed(nn.Linear):
    """A prediction head: dense, activation, norm, and then the vocabulary."""

    mixed: torch.Tensor

    def forward(self, input):
        return nn.functional.linear(torch.relu(input @ self.mixed), self.weight)


def test_a_prediction_head_is_refused_with_figures(tokenizer):
    hf = tiny.hf_model("llama")
    weight = hf.lm_head.weight
    hf.lm_head = Transformed(16, tiny.VOCAB, bias=False)
    hf.lm_head.weight = weight
    hf.lm_head.register_buffer("mixed", torch.randn(16, 16))
    model = tiny.bridge("llama", tokenizer, hf=hf)
    with pytest.raises(NotImplementedError, match=r"off by \d+\.\d% of their spread.*expected cap"):
        bwlens.readout(model, torch.randn(2, 16))
    report = bwlens.check(model, TOKENS[0], progress=False)
    assert report["head"].verdict == "not checked"
    assert "closest reading" in report["head"].meaning


def test_a_norm_that_the_model_does_not_use_is_not_read_through(boot):
    model = boot("llama")
    model.ln_final = nn.LayerNorm(16)  # the wrapped model goes on with its own
    with pytest.raises(NotImplementedError, match="closest reading is off"):
        head_of(model)


# The user's hooks, and the user's own norm.


@pytest.mark.parametrize(
    "place", ["ln_final.hook_normalized", "ln_final.hook_out", "unembed.hook_out"]
)
def test_hooks_of_the_user_are_off_and_stay(place, boot):
    model, vectors = boot("gpt2"), torch.randn(3, 16)
    expected = bwlens.readout(model, vectors, top_k=5)
    calls = []

    def double(value, hook):
        calls.append(hook.name)
        return 2 * value

    point = model
    for part in place.split("."):
        point = getattr(point, part)
    point.add_hook(double)
    found = bwlens.readout(model, vectors, top_k=5)
    assert torch.equal(found.top_scores, expected.top_scores)
    assert not calls
    with torch.no_grad():
        model(TOKENS)
    assert calls


def test_hooks_of_the_user_from_the_start(tokenizer):
    expected = head_of(tiny.bridge("gpt2", tokenizer))
    model = tiny.bridge("gpt2", tokenizer)
    model.ln_final.register_forward_hook(lambda module, args, out: 2 * out)
    model.unembed.hook_in.add_perma_hook(lambda value, hook: 3 * value)
    head, vector = head_of(model), torch.randn(2, 1, 16)
    assert head.scale == 1
    with torch.no_grad():
        assert torch.equal(head.norm(vector), expected.norm(vector))


def test_a_patched_norm_is_the_model_s_own(boot):
    model = boot("llama")
    head_of(model)
    norm = model.ln_final.original_component
    forward = norm.forward
    norm.forward = lambda *args, **kwargs: 3 - forward(*args, **kwargs)
    assert says_its_own_logits(model)


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has one class")
@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
def test_hooked_transformer(processed):
    model = tiny.hooked_transformer("gpt2", processed)
    assert says_its_own_logits(model)
    before = head_of(model).norm(torch.ones(1, 1, 16).cumsum(-1))
    model.ln_final.hook_scale.add_hook(lambda value, hook: 5 * value)
    assert torch.equal(head_of(model).norm(torch.ones(1, 1, 16).cumsum(-1)), before)


def test_measuring_changes_nothing_and_keeps_no_model(tokenizer):
    model = tiny.bridge("llama", tokenizer)
    model.train()
    with torch.no_grad():
        model(TOKENS)
    state = torch.get_rng_state()
    head_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
