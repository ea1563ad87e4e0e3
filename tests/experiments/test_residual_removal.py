"""A block without its residual: by hand, and what must be so."""

import numpy as np
import pytest
import torch

import bwlens
from bwlens.experiments import prose_edits, residual_removal, running
from tests import oracle, tiny

RECORDS = [
    bwlens.Edit("t5 {} t30", "t9", " t17", " t41"),
    bwlens.Edit("{} t33 t6 t21", "t12", " t50"),
]


TEXT = ("t3 t8 t21 t5 t9 t14 t40 t2 t0", "t17 t6 t11 t52 t30 t31 t7 t1 t19")


def mean(result, quantity, layer, condition):
    rows = result.summary.query(
        "quantity == @quantity and layer == @layer and condition == @condition"
    )
    return float(rows["mean"].iloc[0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gptj"])
def test_at_the_last_block_rescaling_changes_nothing(name, boot):
    result = residual_removal(boot(name), RECORDS, progress=False, layers=-1, reference=TEXT)
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
        boot("gpt2"), RECORDS[:1], progress=False, layers=layer, prepend_bos=False, reference=TEXT
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


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_batches_do_not_matter(part, boot, monkeypatch):
    """Neither how many prompts pass at once nor which: noise and mean are no batch's."""
    model, records = boot("llama"), [*RECORDS, *RECORDS[::-1]]
    rows = {}
    for size in (1, 4):
        monkeypatch.setattr(running, "_MOST_PROMPTS", size)
        rows[size] = residual_removal(
            model, records, part=part, progress=False, reference=TEXT
        ).rows
    for quantity in ("loss", "top_1", "kl"):
        np.testing.assert_allclose(rows[1][quantity], rows[4][quantity], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_by_hand(name, layer, boot):
    """On an unbridged copy: what its attention gives is changed so that y, or s alone, goes on."""
    result = residual_removal(
        boot(name), RECORDS[:1], part="attention", progress=False, layers=layer, prepend_bos=False,
        reference=TEXT,
    )  # fmt: skip
    hf = tiny.hf_model(name)
    block, tokens, seen = oracle.layers(hf)[layer], torch.tensor([[5, 9, 30]]), {}
    attention = block.self_attn if name == "llama" else block.attn
    block.register_forward_pre_hook(lambda m, args: seen.update(s=args[0]))
    # In GPT-J the feed-forward part stands beside attention: its product is of the stream as well.
    block.mlp.register_forward_hook(lambda m, args, out: seen.update(mlp=out))
    losses = {"as it is": hf(tokens).logits}
    passing_by = seen["s"] + (seen["mlp"] if name == "gptj" else 0)
    for condition, change in (
        ("stream alone", lambda y: 0 * y),
        ("product alone", lambda y: y - passing_by),
    ):
        handle = attention.register_forward_hook(
            lambda m, args, out, change=change: (change(out[0]), *out[1:])
        )
        losses[condition] = hf(tokens).logits
        handle.remove()
    for condition, logits in losses.items():
        expected = -logits[0, -1].log_softmax(-1)[41]
        assert mean(result, "loss", layer, condition) == pytest.approx(expected.item(), rel=1e-4)


def test_mean_product_is_that_of_the_text(boot):
    """On an unbridged copy, over all tokens of the reference."""
    result = residual_removal(
        boot("gpt2"), RECORDS[:1], progress=False, layers=1, prepend_bos=False, reference=TEXT
    )
    hf, seen = tiny.hf_model("gpt2"), []
    block = oracle.layers(hf)[1]
    handle = block.mlp.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    for ids in ([3, 8, 21, 5, 9, 14, 40, 2, 0], [17, 6, 11, 52, 30, 31, 7, 1, 19]):
        hf(torch.tensor([ids]))
    handle.remove()
    mean_product = torch.cat(seen).mean(0)
    block.mlp.register_forward_hook(lambda m, a, out: mean_product.expand_as(out))
    expected = -hf(torch.tensor([[5, 9, 30]])).logits[0, -1].log_softmax(-1)[41]
    found = mean(result, "loss", 1, "mean product")
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_text_that_the_tokenizer_does_not_read(boot):
    with pytest.raises(ValueError, match="no mean product of reference='demo'"):
        residual_removal(boot("gpt2"), RECORDS[:1])


def test_attention_behind_a_norm_is_refused(boot):
    with pytest.raises(NotImplementedError, match="does not meet the stream as it is"):
        residual_removal(boot("gemma2"), RECORDS[:1], part="attention", reference=TEXT)


@pytest.mark.usefixtures("unchecked")
def test_no_such_part(boot):
    with pytest.raises(ValueError, match="part is 'heads'; expected one of mlp, attention"):
        residual_removal(boot("gpt2"), RECORDS[:1], part="heads")
