"""Which model is this: fingerprints that meet every number's row and column."""

import shutil

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import bwlens
from bwlens.demo import MODEL_DIR
from bwlens.evaluation.harness import Harness
from bwlens.evaluation.measuring import Options
from bwlens.evaluation.methods import methods_of
from bwlens.evaluation.presets import table1_methods
from bwlens.model.identity import fingerprint, is_demo, model_label
from tests import tiny


def test_the_demo_model_wherever_it_lies(demo, tmp_path):
    folder = tmp_path / "somewhere"
    shutil.copytree(MODEL_DIR, folder)
    copied = bwlens.load_model(folder)
    for model in (demo, copied, bwlens.load_model(MODEL_DIR)):
        assert is_demo(model)
        assert model_label(model) == "demo"
    options = Options(prepend_bos=False)
    harness = Harness(copied, methods_of("none"), options=options)
    assert list(harness.records) == list(bwlens.read_records("demo"))
    same = Harness(demo, methods_of("none"), "demo", "demo", options)
    assert harness.settings() == same.settings()


def test_a_folder_of_its_name_is_not_the_demo_model(tmp_path):
    """The same shape, tokenizer and folder's name, other weights."""
    folder = tmp_path / MODEL_DIR.name
    shutil.copytree(MODEL_DIR, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    other = bwlens.load_model(folder)
    assert not is_demo(other)
    assert model_label(other) == str(folder)
    with pytest.raises(ValueError, match="no records given"):
        bwlens.evaluate(other, "none")
    with pytest.raises(ValueError, match=r"key statistics of .* are needed"):
        bwlens.edit.rome(other, bwlens.Edit("{} plays for", "Lionel Messi", " Paris"))
    titles = [method.name for method in table1_methods(other)]
    assert "ROME, last token" in [method.name for method in table1_methods(bwlens.load_model())]
    assert "ROME, last token" not in titles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_demo_model_in_any_dtype(dtype):
    assert is_demo(bwlens.load_model("demo", dtype=dtype))


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
def test_the_demo_model_in_any_wrapping(demo):
    folded = bwlens.load_model("demo")
    folded.enable_compatibility_mode(disable_warnings=True)
    assert is_demo(folded)
    if tiny.HAS_HOOKED_TRANSFORMER:
        assert is_demo(bwlens.load_model("demo", kind="hooked"))


def test_edits_make_no_other_model_but_training_does(demo):
    fact = bwlens.Edit("{} plays for", "Lionel Messi", " Paris")
    edited = bwlens.edit.forward_pass_shift(demo, fact).edited(demo)
    assert is_demo(edited)
    trained = bwlens.load_model("demo")
    with torch.no_grad():
        for weight in trained.original_model.parameters():
            weight += 0.05 * weight.std() * torch.randn_like(weight)
    assert not is_demo(trained)
    assert fingerprint(edited) != fingerprint(demo) != fingerprint(trained)


def test_models_of_other_kinds_are_not_the_demo_model(bridge):
    assert not any(is_demo(bridge(name)) for name in ("gpt2", "llama"))


class Weights(nn.Module):
    """Two million numbers, of which a fingerprint takes half at most."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2048, 1024), (4096, 576), (3000, 1023), (1000, 1155)])
@pytest.mark.parametrize("axis", [0, 1])
def test_no_row_or_column_goes_unseen(shape, axis):
    model = Weights(*shape)
    before = fingerprint(model)
    for place in [*range(12), shape[axis] - 1]:
        with torch.no_grad():
            model.weight.select(axis, place).fill_(1.0)
            assert fingerprint(model) != before, place
            model.weight.zero_()
    assert fingerprint(model) == before


def test_names_shapes_and_dtypes_count():
    model = Weights(4, 6)
    assert fingerprint(model) == fingerprint(Weights(4, 6))
    assert len({fingerprint(m) for m in (model, Weights(6, 4), Weights(4, 6).double())}) == 3
