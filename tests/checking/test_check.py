"""`bwlens.check`: a verdict and figures for each thing that bwlens says of a model."""

import json

import pytest
import torch
from transformers import GPT2Config
from typer.testing import CliRunner

import bwlens
from bwlens.cli import app
from tests import tiny
from tests.gradient.test_guard import Lying, Quantised, Rescaled, kept, swapped

WORDS = "t5 t9 t30 t41"


def checked(model, **options):
    return bwlens.check(model, WORDS, progress=False, **options)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma2", "phi3", "mixtral", "granite"])
def test_true_models_pass(name, boot):
    report = checked(boot(name))
    assert report.ok, report
    assert report["head"].verdict == report["Hugging Face"].verdict == "ok"
    assert (report["gradient of W_in"].error or 0.0) <= 1e-5
    assert {finding.name for finding in report.findings} >= {
        "batch",
        "tokenizer",
        "step at W_O",
        "gradient of W_O",
        "left as it was",
    }


def test_compatibility_mode(boot):
    report = checked(boot("gpt2", compatibility=True))
    assert report.ok, report
    assert report["Hugging Face"].verdict == "not checked"


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has one class")
@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_hooked_transformer(name, processed):
    report = bwlens.check(tiny.hooked_transformer(name, processed), progress=False)
    assert report.ok, report
    assert report["tokenizer"].verdict == "not checked"


def test_half_precision_says_what_it_cannot_see(boot):
    report = checked(boot("llama", torch.bfloat16))
    assert report.ok, report
    assert report["step at W_in"].verdict == "not checked"
    assert "rounding" in report["step at W_in"].meaning


def test_layers_that_quantise_in_passing(tokenizer):
    report = checked(swapped(tokenizer, kept(Quantised)))
    assert not report.ok
    assert "not x times its weight" in report["step at W_in"].meaning
    assert report["gradient of W_O"].verdict == "ok"


def test_layers_that_rescale(tokenizer):
    found = checked(swapped(tokenizer, kept(Rescaled)))["gradient of W_out"]
    assert found.verdict == "fails"
    assert found.error == pytest.approx(30 / 31, rel=1e-3)  # x^T delta is the 31st part


def test_gradients_that_are_no_derivatives(tokenizer):
    report = checked(swapped(tokenizer, kept(Lying), ("down_proj",)))
    assert report["step at W_in"].verdict == "fails"
    assert "times what" in report["step at W_in"].meaning


@pytest.mark.parametrize(
    "option", [{"scale_attn_weights": False}, {"reorder_and_upcast_attn": True}]
)
def test_what_the_bridge_runs_otherwise_than_transformers(option, tokenizer):
    """GPT-2 without scaled scores is scaled by TransformerLens all the same."""
    config = GPT2Config(
        vocab_size=tiny.VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, **option
    )
    config.architectures = ["GPT2LMHeadModel"]
    hf = tiny.hf_of(config)
    model = tiny.bridge("gpt2", tokenizer, hf=hf)
    tokens = torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        plain = tiny.hf_of(config)(tokens).logits
        same = torch.allclose(model(tokens), plain, atol=1e-3)
    report = checked(model)
    assert report["Hugging Face"].verdict == ("ok" if same else "fails")
    assert report["head"].verdict == "ok"
    if "scale_attn_weights" in option:
        assert not same
        assert "otherwise than transformers" in report["Hugging Face"].meaning


def test_gemma_3_with_an_attention_soft_cap(tokenizer):
    config = tiny.CONFIGS["gemma3"]()
    config.attn_logit_softcapping = 0.5
    model = tiny.bridge("gemma3", tokenizer, hf=tiny.hf_of(config))
    tokens = torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        same = torch.allclose(model(tokens), tiny.hf_of(config)(tokens).logits, atol=1e-3)
    assert checked(model)["Hugging Face"].verdict == ("ok" if same else "fails")


def test_the_model_is_left_as_it_was(boot):
    model = boot("qwen2")
    model.train()
    frozen = list(model.blocks[1].mlp.parameters())
    for parameter in frozen:
        parameter.requires_grad_(False)
    calls = []
    model.ln_final.hook_out.add_hook(lambda value, hook: calls.append(1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert checked(model)["left as it was"].verdict == "ok"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(parameter.requires_grad for parameter in frozen)
    assert not calls
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    model(torch.tensor([[5, 9]]))
    assert calls


def test_a_tokenizer_that_does_not_know_the_words(boot):
    report = bwlens.check(boot("gpt2"), "Lionel Messi", progress=False, layers=0, matrices="W_in")
    assert report["tokenizer"].verdict == "fails"
    assert not report.ok


def test_no_tokenizer(tokenizer):
    model = tiny.bridge("gpt2", tokenizer)
    model.tokenizer = None
    report = bwlens.check(model, progress=False, layers=[0, -1], matrices=["W_in", "W_O"])
    assert report["tokenizer"].verdict == "not checked"
    assert report["gradient of W_in"].verdict == "ok"
    assert report.ok


def test_a_report_in_every_form(boot):
    report = checked(boot("gpt2"), matrices="W_out", layers=1)
    frame = report.to_dataframe()
    assert list(frame.columns[:4]) == ["name", "verdict", "figures", "meaning"]
    assert len(frame) == len(report.findings)
    assert "head" in repr(report)
    assert "<table>" in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    with pytest.raises(KeyError, match="no check 'heads'"):
        report["heads"]
    with pytest.raises(ValueError, match="has no 'W_gate'"):
        checked(boot("gpt2"), matrices=["W_gate"])
    with pytest.raises(TypeError, match="expected a TransformerLens model"):
        bwlens.check("gpt2")


def test_command(tmp_path):
    path = tmp_path / "report.json"
    options = ["--matrix", "W_out", "--layers", "0,7", "--json", str(path)]
    done = CliRunner().invoke(app, ["check", "demo", *options])
    assert done.exit_code == 0, done.output
    assert "head" in done.output
    assert json.loads(path.read_text())["ok"] is True


def test_command_where_a_check_fails():
    done = CliRunner().invoke(app, ["check", "demo", "--prompt", "日本", "--layers", "0"])
    assert done.exit_code in (0, 1)
    assert ("fails" in done.output) == bool(done.exit_code)
