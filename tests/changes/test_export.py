"""An edited model as a Hugging Face folder: reloaded, it gives the edited bridge's logits."""

from __future__ import annotations

import json

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

import bwlens
from bwlens import Site
from bwlens.changes.change import WeightChange
from bwlens.demo import MODEL_DIR
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.model.sites import available_matrices
from bwlens.model.weights import weight_of
from tests import tiny
from tests.model.test_loading import write_gguf

NAMES = ("gpt2", "gpt_neox", "bloom", "phi3", "llama", "gemma2", "opt", "mixtral", "qwen2_moe")
IDS = torch.arange(5, 13)[None]


def change_of(model, matrices, layer=1):
    """Something is added to each of these matrices, of the first expert in a mixture."""
    make = torch.Generator().manual_seed(0)
    parts = {}
    for matrix in matrices:
        try:
            weight = weight_of(model, Site(matrix, layer))
        except ValueError:
            weight = weight_of(model, Site(matrix, layer, 0))
        x, delta = (torch.randn(2, width, generator=make) for width in weight.shape)
        parts[weight.site] = LowRankGradient(x, 0.05 * delta)
    return WeightChange(parts)


def check(model, change, folder, tolerance=1e-5):
    """What was written is the edited model; the model given is as before."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert change.save_pretrained(model, folder) == folder
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        plain = model(IDS)
        with change.applied(model):
            expected = model(IDS)
        hugging_face = AutoModelForCausalLM.from_pretrained(folder).eval()
        reloaded = bwlens.load_model(folder, dtype=expected.dtype)
        found = (hugging_face(IDS).logits, reloaded(IDS))
    assert hugging_face.dtype == expected.dtype
    size = expected.abs().max()
    assert (expected - plain).abs().max() > 3 * tolerance * size
    for logits in found:
        assert (logits - expected).abs().max() <= tolerance * size
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_lands_where_it_belongs(name, boot, tmp_path):
    """Fused queries, keys and values too, which some bridges keep in copies of their own."""
    model = boot(name)
    check(model, change_of(model, available_matrices(model)), tmp_path / "out")


def test_one_of_the_fused_alone(boot, tmp_path):
    for name in ("gpt2", "gpt_neox"):
        model = boot(name)
        check(model, change_of(model, ["W_Q"]), _in(tmp_path, name))


def _in(folder, name):
    (folder / name).mkdir()
    return folder / name / "out"


def test_half_precision(boot, tmp_path):
    model = boot("llama", torch.bfloat16)
    check(model, change_of(model, ["W_out", "W_O", "W_V"]), tmp_path / "out", tolerance=0.02)


def test_the_demo_model_with_its_tokenizer(tmp_path):
    model = bwlens.load_model("demo")
    edit = bwlens.Edit("{} plays for", "Lionel Messi", " Paris")
    change = bwlens.edit.forward_pass_shift(model, edit)
    check(model, change, tmp_path / "out")
    own, saved = (AutoTokenizer.from_pretrained(folder) for folder in (MODEL_DIR, tmp_path / "out"))
    assert saved(edit.text)["input_ids"] == own(edit.text)["input_ids"]
    edited = bwlens.load_model(tmp_path / "out")
    answer = edited(edited.to_tokens(edit.text, prepend_bos=False))[0, -1].argmax()
    assert edited.to_string(answer) == " Paris"


def test_what_cannot_be_written_is_refused_before(boot, tmp_path):
    model = boot("gpt2")
    change = change_of(model, ["W_out"])
    with pytest.raises(ValueError, match="there is no folder"):
        change.save_pretrained(model, tmp_path / "no" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something already"):
        change.save_pretrained(model, tmp_path / "full")
    with pytest.raises(NotImplementedError, match="compatibility mode"):
        change.save_pretrained(boot("gpt2", compatibility=True), tmp_path / "out")
    with pytest.raises(ValueError, match="made for another model"):
        change.save_pretrained(boot("llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_copy_that_was_changed_by_hand_is_refused(boot, tmp_path):
    model = boot("gpt_neox")
    weight = weight_of(model, Site("W_Q", 1))
    weight.write(1.1 * weight.read())
    with pytest.raises(NotImplementedError, match="stands nowhere in the Hugging Face model"):
        change_of(model, ["W_Q"]).save_pretrained(model, tmp_path / "out")
    with pytest.raises(NotImplementedError, match="gives other logits"):
        change_of(model, ["W_out"]).save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")
def test_a_hooked_transformer_is_refused(tmp_path):
    model = tiny.hooked_transformer("gpt2")
    with pytest.raises(NotImplementedError, match="holds no Hugging Face model"):
        change_of(model, ["W_out"]).save_pretrained(model, tmp_path / "out")


def test_a_gguf_file_that_was_bridged_by_hand(tmp_path):
    """transformers marks it as quantised, and such a model it would not save."""
    library = pytest.importorskip("gguf", reason="the extra bwlens[gguf] is not installed")
    write_gguf(library, tmp_path / "tiny.gguf")
    inner = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    model = TransformerBridge.boot_transformers("tiny", hf_model=inner, tokenizer=tokenizer)
    assert inner.config.quantization_config
    change = change_of(model, ["W_out", "W_O", "W_V"])
    check(model, change, _in(tmp_path, "edited"), tolerance=1e-4)


@pytest.mark.real
@pytest.mark.xdist_group("smollm2")
def test_smollm2(smollm2, tmp_path):
    change = change_of(smollm2, ["W_out", "W_O", "W_V"], layer=20)
    check(smollm2, change, tmp_path / "out", tolerance=1e-4)
