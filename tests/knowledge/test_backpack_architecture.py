"""The Backpack is the published one, saves and loads, and TransformerLens and bwlens read it."""

import copy
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bwlens
from bwlens.knowledge import Backpack, BackpackConfig
from tests.knowledge.backpacks import ARMS, bridge, slowly, tiny, tokenizer

IDS = [17, 923, 4711, 923, 8]


@pytest.mark.parametrize("arm", ARMS)
def test_logits_are_those_of_the_formula(arm):
    model = tiny(**ARMS[arm]).double()
    with torch.no_grad():
        own = model(input_ids=torch.tensor([IDS])).logits[0]
        torch.testing.assert_close(own, slowly(model, IDS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arm", ARMS)
def test_the_bridge_gives_the_same_logits(arm):
    model = tiny(**ARMS[arm]).double()
    tokens = torch.tensor([IDS])
    own = model(input_ids=tokens).logits
    bridged = bridge(copy.deepcopy(model))(tokens)
    torch.testing.assert_close(bridged, own, rtol=1e-9, atol=1e-9)


def test_padding_on_either_side_changes_nothing():
    model, ids = tiny().double(), torch.tensor([IDS])
    alone = model(input_ids=ids).logits
    right = model(
        input_ids=torch.tensor([[*IDS, 0, 0]]), attention_mask=torch.tensor([[1] * 5 + [0] * 2])
    ).logits[:, :5]
    left = model(
        input_ids=torch.tensor([[0, 0, *IDS]]),
        attention_mask=torch.tensor([[0] * 2 + [1] * 5]),
        position_ids=torch.tensor([[0, 0, *range(5)]]),
    ).logits[:, 2:]
    torch.testing.assert_close(right, alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(left, alone, rtol=1e-9, atol=1e-9)


def test_the_loss_is_the_mean_over_next_tokens():
    model, ids = tiny(), torch.tensor([IDS])
    out = model(input_ids=ids, labels=ids)
    expected = -out.logits[0, :-1].log_softmax(-1)[range(4), IDS[1:]].mean()
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("arm", ["published", "one store"])
def test_saved_and_loaded_it_is_the_same(arm, tmp_path):
    model, ids = tiny(**ARMS[arm]), torch.tensor([IDS])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, Backpack)
    assert loaded.config.shared_senses == model.config.shared_senses
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_weights_have_the_names_of_the_published_checkpoints():
    names = {name for name, _ in tiny().named_parameters()}
    assert {
        "backpack.gpt2_model.wte.weight",
        "backpack.gpt2_model.h.0.attn.c_attn.weight",
        "backpack.gpt2_model.ln_f.weight",
        "backpack.sense_network.block.mlp.c_fc.weight",
        "backpack.sense_network.ln.weight",
        "backpack.sense_network.final_mlp.c_proj.bias",
        "backpack.sense_weight_net.c_attn.weight",
    } <= names
    # 41.7, 103.9 and 170.1 million: the three sizes of the paper.
    for d, layers, millions in ((384, 6, 41.7), (640, 8, 103.9), (768, 12, 170.1)):
        config = BackpackConfig(
            vocab_size=50264, n_positions=512, n_embd=d, n_layer=layers, n_head=layers
        )
        with torch.device("meta"):
            n = sum(p.numel() for p in Backpack(config).parameters())
        assert round(n / 1e6, 1) == millions


def test_it_writes_on():
    model = tiny()
    ids = torch.tensor([IDS])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2,
                             do_sample=False, pad_token_id=0)  # fmt: skip
    assert written[0, 5] == model(input_ids=ids).logits[0, -1].argmax()


@pytest.mark.parametrize("k", [0, 5])
def test_a_number_of_senses_that_does_not_divide_the_width_is_refused(k):
    with pytest.raises(ValueError, match=f"num_senses={k} does not divide n_embd=32"):
        tiny(num_senses=k)


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for k, said in ((8, "another shape than its config"), (5, "num_senses=5 does not divide")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_senses": k}))
        with pytest.raises(ValueError, match=said):
            bwlens.load_model(tmp_path)


def test_bwlens_reads_and_checks_it(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = bwlens.load_model(tmp_path)
    assert len(loaded.blocks) == model.config.n_layer + 1 == loaded.cfg.n_layers
    report = bwlens.check(loaded)
    assert {finding.verdict for finding in report.findings} == {"ok"}, report
    lens = bwlens.backward_lens(
        loaded, "Lionel Messi plays for", " Paris", reading=("plain", "effect"), trust=True
    )
    assert lens.layers == (0, 1, 2, 3)
    assert lens.trust.fall.isfinite().any()


def test_the_entry_point_is_the_adapter():
    from bwlens.knowledge.backpack.adapter import BackpackAdapter

    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (value,) = re.findall(r'transformer_lens.architectures"]\nBackpack = "(.*)"', pyproject)
    entry = importlib.metadata.EntryPoint("Backpack", value, "transformer_lens.architectures")
    assert entry.load() is BackpackAdapter
