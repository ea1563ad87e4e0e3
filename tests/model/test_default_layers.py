"""Where each method writes by default: the papers' layers in a model as deep as theirs."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bwlens import Edit, edit
from bwlens.edit.counting import key_statistics
from tests import tiny

FACT = Edit("{} t9 t30 t41", subject="t5 t6", target_new=" t17", target_true=" t23")
TEXTS = [" ".join(f"t{4 + (7 * i + 3 * j * j) % 57}" for j in range(40)) for i in range(3)]

LAYERS = {
    8: {"forward_pass_shift": [5], "rome": [2], "memit": [1, 2]},
    30: {"forward_pass_shift": [21], "rome": [10], "memit": [8, 9, 10]},
    # GPT-2 xl's.
    48: {"forward_pass_shift": [35], "rome": [17], "memit": [13, 14, 15, 16, 17]},
}


def deep(n_layer):
    torch.manual_seed(0)
    size = {"vocab_size": tiny.VOCAB, "n_embd": 16, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**size, n_layer=n_layer, architectures=["GPT2LMHeadModel"])
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("depth", LAYERS)
def test_layers_by_depth(depth, tokenizer):
    model = tiny.bridge("gpt2", tokenizer, hf=deep(depth))
    settings = {"steps": 1, "prefixes": ()}
    settings |= {"statistics": key_statistics(model, TEXTS, cache=False)}
    found = {
        "forward_pass_shift": edit.forward_pass_shift(model, FACT, lr=1.0),
        "rome": edit.rome(model, FACT, **settings),
        "memit": edit.memit(model, FACT, **settings),
    }
    assert {name: [site.layer for site in change] for name, change in found.items()} == (
        LAYERS[depth]
    )
    assert {site.matrix for change in found.values() for site in change} == {"W_out"}
