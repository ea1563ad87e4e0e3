"""Loading: the demo model, folders, both kinds, and errors that say how to mend them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bwlens
from bwlens.demo import MODEL_DIR
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny.hf_model("gpt2")
    model.config.n_ctx = model.config.n_positions  # as GPT-2's own config has it
    model.save_pretrained(path)
    tiny.tokenizer(path)
    return path


def hf_logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_a_folder_loads_raw(folder, kind):
    tokens = torch.tensor([[5, 9, 12]])
    if kind == "hooked" and not tiny.HAS_HOOKED_TRANSFORMER:
        with pytest.raises(NotImplementedError, match="removed in TransformerLens 4"):
            bwlens.load_model(folder, kind=kind)
        return
    model = bwlens.load_model(folder, kind=kind)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_logits(folder, tokens), rtol=1e-4, atol=1e-4)
    assert not model.training
    lens = bwlens.backward_lens(model, "t5 t9", "t17")
    assert lens.words()[-1][-1][0] == "t17"


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has the bridge only")
def test_both_kinds_of_the_demo_read_the_same():
    one = bwlens.backward_lens(bwlens.load_model("demo"), "Obama grew up in", " Paris")
    two = bwlens.backward_lens(
        bwlens.load_model("demo", kind="hooked"), "Obama grew up in", " Paris"
    )
    assert two.answer == " Hawaii"
    assert one.words() == two.words()
    torch.testing.assert_close(one.norms(), two.norms(), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has the bridge only")
def test_a_config_that_hooked_transformer_cannot_read(folder, tmp_path):
    for file in folder.iterdir():
        text = file.read_bytes()
        (tmp_path / file.name).write_bytes(text.replace(b'"n_ctx"', b'"other"'))
    with pytest.raises(ValueError, match=r"no attribute 'n_ctx'.*kind='bridge'"):
        bwlens.load_model(tmp_path, kind="hooked")


def test_demo_needs_no_network_and_no_bos():
    model = bwlens.load_model("demo")
    assert model.to_tokens("Lionel Messi plays for")[0, 0] != model.tokenizer.bos_token_id
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert model.cfg.d_vocab == len(tokenizer)


@pytest.mark.usefixtures("unchecked")
def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        bwlens.load_model(tmp_path)
    with pytest.raises(ValueError, match="'bridge' or 'hooked'"):
        bwlens.load_model("demo", kind="other")
    with pytest.raises(ValueError, match="could not load 'no/such-model'"):
        bwlens.load_model("no/such-model")
