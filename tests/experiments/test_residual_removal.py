"""A block without its residual: by hand, and what must be so."""

import numpy as np
import pytest
import torch

import bwlens
from bwlens.experiments import prose_edits, residual_removal
from tests import oracle, tiny

RECORDS = [
    bwlens.Edit("t5 {} t30", "t9", " t17", " t41"),
    bwlens.Edit("{} t33 t6 t21", "t12", " t50"),
]


def mean(result, quantity, layer, condition):
    rows = result.summary.query(
        "quantity == @quantity and layer == @layer and condition == @condition"
    )
    return float(rows["mean"].iloc[0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gptj"])
def test_at_the_last_block_rescaling_changes_nothing(name, boot):
    result = residual_removal(boot(name), RECORDS, progress=False, layers=-1)
    for quantity in ("loss", "kl", "top_1"):
        alone = mean(result, quantity, 2, "product alone")
        assert mean(result, quantity, 2, "product, stream's norm") == pytest.approx(alone, rel=2e-2)
        assert mean(result, quantity, 2, "random, stream's norm") != alone or quantity == "top_1"


def test_below_it_changes_something(demo):
    records = bwlens.read_records("demo")[:8]
    result = residual_removal(demo, records, progress=False, layers=[3, 7])
    alone = mean(result, "loss", 3, "product alone")
    assert mean(result, "loss", 3, "product, stream's norm") < alone - 1
    assert mean(result, "loss", 7, "product, stream's norm") == pytest.approx(
        mean(result, "loss", 7, "product alone"), rel=1e-2
    )
    assert mean(result, "loss", 3, "as it is") < 0.5
    assert mean(result, "kl", 3, "as it is") == pytest.approx(0, abs=1e-6)
    assert result.figure().axes


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_by_hand(layer, boot):
    """On an unbridged copy: a hook on the block hands on what its feed-forward part gave."""
    result = residual_removal(
        boot("gpt2"), RECORDS[:1], progress=False, layers=layer, prepend_bos=False
    )
    hf, seen = tiny.hf_model("gpt2"), {}
    block = oracle.layers(hf)[layer]
    block.mlp.register_forward_hook(lambda m, a, out: seen.update(y=out))
    block.ln_2.register_forward_pre_hook(lambda m, args: seen.update(s=args[0]))
    tokens = torch.tensor([[5, 9, 30]])
    losses = {"as it is": hf(tokens).logits}
    for name, stream in (("product alone", "y"), ("stream alone", "s")):
        handle = block.register_forward_hook(
            lambda m, a, out, stream=stream: (
                (seen[stream], *out[1:]) if isinstance(out, tuple) else seen[stream]
            )
        )
        losses[name] = hf(tokens).logits
        handle.remove()
    for name, logits in losses.items():
        expected = -logits[0, -1].log_softmax(-1)[41]  # the true answer's
        assert mean(result, "loss", layer, name) == pytest.approx(expected.item(), rel=1e-4)


def test_prose_is_cut_before_a_word():
    (edit,) = prose_edits(["too short", "one two three four {five} six seven eight nine"])
    assert edit.text == "one two three four (five) six seven"
    assert edit.target_new == " eight"


def test_a_layer_that_is_not_there(demo):
    with pytest.raises(ValueError, match="layer 9 asked for"):
        residual_removal(demo, bwlens.read_records("demo")[:1], layers=9)


def test_batches_do_not_matter(boot):
    model = boot("llama")
    both = residual_removal(model, RECORDS, progress=False).rows
    for item, record in enumerate(RECORDS):
        rows = residual_removal(model, record, progress=False).rows
        for quantity in ("loss", "kl"):
            # The mean product is the batch's and the noise is drawn for all of it.
            some = rows[rows["condition"].isin(["as it is", "product alone", "stream alone"])]
            same = both[both["condition"].isin(set(some["condition"])) & (both["item"] == item)]
            np.testing.assert_allclose(same[quantity], some[quantity], rtol=1e-3, atol=1e-5)
