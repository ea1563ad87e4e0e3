"""What a user holds: the rows that give an answer, their pictures, controls and pages."""

import re
from dataclasses import fields

import numpy as np
import pytest
import torch

import bwlens
from bwlens import knowledge
from bwlens.show import colors
from tests import tiny

PROMPT = "Lionel Messi plays for"


@pytest.fixture(scope="module")
def demo():
    return bwlens.load_model("demo")


@pytest.fixture(scope="module")
def found(demo):
    return knowledge.neurons(demo, PROMPT, step=" Paris")


def test_the_model_s_own_answer_and_what_is_left(found, demo):
    assert found.target == " Barcelona"
    logits = demo(demo.to_tokens(PROMPT, prepend_bos=False))[0, -1].detach()
    above = float(logits[found.target_id] - logits.mean())
    assert found.logit == pytest.approx(above, rel=1e-4)
    assert found.rest + float(found.mlps.sum()) == pytest.approx(found.logit)
    assert found.step_target == " Paris"


def test_the_result_holds_no_graph_and_no_model(found):
    for field in fields(found):
        value = getattr(found, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            assert not isinstance(one, torch.nn.Module)
            assert not isinstance(one, torch.Tensor) or not one.requires_grad


def test_a_row_s_words_and_log_prob_by_hand(found, demo):
    """Read behind its own block, with the stream as it enters the part."""
    row = next(row for row in found.rows if row.neuron.layer == 4)
    _, cache = demo.run_with_cache(demo.to_tokens(PROMPT, prepend_bos=False))
    stream = cache["blocks.4.hook_resid_mid"][0, -1]
    vector = row.weight * demo.blocks[4].mlp.out.original_component.weight[row.neuron.index]

    def log_p(v):
        return demo.unembed(demo.ln_final(v[None, None]))[0, 0].log_softmax(-1)

    rise = log_p(stream + vector)[found.target_id] - log_p(stream)[found.target_id]
    assert row.log_prob == pytest.approx(rise.item(), rel=1e-3, abs=1e-5)
    read = bwlens.readout(demo, vector[None].detach(), normalize=True).top_ids[0, 0]
    assert row.promoted[0] == demo.tokenizer.decode([int(read)])


def test_moved_is_the_norm_of_each_row_of_the_gradient(found, demo):
    grads = bwlens.capture(demo, PROMPT, " Paris", ("W_in", "W_out"))
    torch.testing.assert_close(found.moved[3], grads["W_out", 3].dense().norm(dim=1).float())
    torch.testing.assert_close(found.moved_keys[3], grads["W_in", 3].dense().norm(dim=0).float())


def test_orders_and_sums(found):
    shares = torch.cat(found.shares)
    assert [found.share_of(one) for one in found.top(5)] == pytest.approx(
        shares.sort(descending=True).values[:5].tolist()
    )
    curve = found.cumulative()
    assert curve[-1] + float(found.biases.sum()) == pytest.approx(float(found.mlps.sum()), abs=1e-3)
    assert np.argmax(curve) == int((shares > 0).sum()) - 1
    assert found.top(3, layers=-1) == found.top(3, layers=[7])
    table = found.agreement()
    assert set(table["of"]) == {"values", "keys"}
    assert len(table) == 16


def test_agreement_is_perfect_where_a_step_moves_what_gives(found):
    from dataclasses import replace

    same = replace(found, moved=tuple(share.abs() for share in found.shares), moved_keys=())
    table = same.agreement()
    assert table["r"].min() == pytest.approx(1.0)
    assert table["overlap"].min() == 1.0
    assert table["control"].max() < 0.9


def test_taking_the_largest_away_costs_more_than_others(found, demo):
    one = knowledge.controls(
        demo, found, n=100, draws=1, paraphrases=["Lionel Messi plays his football for"],
        others=["David Beckham plays for"], text=["The ball was red.", "He plays for Milan."],
    )  # fmt: skip
    mean = one.summary.query("quantity == 'change'").set_index(["neurons", "prompt"])["mean"]
    assert mean["largest share", "the prompt"] < -1
    assert mean["largest share", "the prompt"] < 5 * mean["random", "the prompt"]
    assert set(one.rows["prompt"]) == {"the prompt", "paraphrase", "another subject"}
    assert "log p without 100 neurons" in repr(one)
    assert one.figure().axes


def test_frequent_ones_are_as_frequent(demo):
    text = ["Lionel Messi plays for Barcelona."]
    rates = knowledge.firing_rates(demo, range(4), text)
    assert set(rates) == {(layer, None) for layer in range(4)}
    for store, rate in rates.items():
        assert float(rate.mean()) == pytest.approx(0.1, abs=0.02)
        alone = knowledge.firing_rates(demo, {store[0]}, text)
        assert torch.equal(alone[store], rate)


def test_rates_counted_before_are_taken(found, demo):
    settings = {"n": 5, "draws": 1, "text": ["The ball was red."]}
    rates = knowledge.firing_rates(demo, found.layers, settings["text"])
    one, other = (
        knowledge.controls(demo, found, **settings, **more) for more in ({}, {"rates": rates})
    )
    assert one.rows.equals(other.rows)


def test_pages(found, demo, tmp_path):
    html = found._repr_html_()
    assert "Barcelona" in html
    assert html.count("<tr>") == 9
    assert "Which rows give" in found.save(tmp_path / "a.html").read_text()
    with pytest.raises(ValueError, match=r"ends in .html"):
        found.save(tmp_path / "a.txt")
    best = found.top(1)[0]
    page = knowledge.neuron_page(demo, best, ["Lionel Messi plays for Barcelona.", "A cat."])
    weights = [abs(context.weight) for context in page.contexts]
    assert weights == sorted(weights, reverse=True)
    strongest = page.contexts[0]
    text = "".join((*strongest.before, strongest.token, *strongest.after))
    assert text in "Lionel Messi plays for Barcelona.A cat."
    row = demo.blocks[best.layer].mlp.out.original_component.weight[best.index].detach()
    read = bwlens.readout(demo, row, normalize=True).top_ids[0]
    assert page.promoted[0] == demo.tokenizer.decode([int(read)])
    assert "raises" in page.save(tmp_path / "n.html").read_text()


def test_a_page_finds_where_a_weight_is_largest(demo):
    lines = ["Lionel Messi plays for Barcelona.", "The cat sat on the mat."]
    page = knowledge.neuron_page(demo, (3, 5), lines, top_k=1)
    largest = 0.0
    for line in lines:
        _, cache = demo.run_with_cache(demo.to_tokens(line, prepend_bos=False))
        column = cache["blocks.3.mlp.hook_post"][0, :, 5]
        largest = max(largest, column.abs().max().item())
    assert abs(page.contexts[0].weight) == pytest.approx(largest, rel=1e-4)


def test_words_in_a_text_that_looks_like_html_are_escaped(demo):
    page = knowledge.neuron_page(demo, (3, 5), ["a <b>bold</b> word"])
    assert "<b>bold" not in page._repr_html_()


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "qwen2_moe"])
def test_experts_and_norms_behind_have_pages_too(name, boot):
    model = boot(name)
    one = knowledge.neurons(model, "t5 t9 t30 t41", " t17")
    assert one._repr_html_()
    page = knowledge.neuron_page(model, one.top(1)[0], ["t5 t9 t30 t41 t17", "t8 t9"])
    assert page.contexts
    assert len(one.agreement()) == 2 * len(one.stores)
    knowledge.controls(model, one, n=2, draws=1, text=["t5 t9 t30", "t7 t8"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"layers": 9}, "layer 9 asked for"),
        ({"prompt": ["a", "b"]}, "expected one prompt"),
        ({"target": ""}, "target of prompt 0 is empty"),
    ],
)
def test_bad_input_is_said(more, says, demo):
    given = {"prompt": PROMPT, **more}
    with pytest.raises(ValueError, match=says):
        knowledge.neurons(demo, **given)


def test_further_bad_input(found, demo):
    with pytest.raises(ValueError, match="expected one of share, weight, moved"):
        found.top(by="size")
    with pytest.raises(ValueError, match="layer 12 was not read"):
        found.top(layers=12)
    with pytest.raises(ValueError, match="has rows 0 to 767, found 768"):
        knowledge.neuron_page(demo, (0, 768))
    with pytest.raises(ValueError, match="no text"):
        knowledge.neuron_page(demo, (0, 1), [" "])
    with pytest.raises(ValueError, match="numbers from 1 to 6144"):
        knowledge.controls(demo, found, n=0)


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")
def test_a_model_without_feed_forward_parts():
    with pytest.raises(ValueError, match="no feed-forward part"):
        knowledge.neurons(tiny.attention_only(), [1, 2, 3], 4)


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("processed", [False, True])
def test_a_hooked_transformer_gives_the_same(name, processed, bridge, tokenizer):
    tokens = torch.tensor([[5, 9, 30, 41]])
    one = knowledge.neurons(bridge(name), tokens, 17)
    model = tiny.hooked_transformer(name, processed=processed, tokenizer=tokenizer)
    other = knowledge.neurons(model, tokens, 17)
    torch.testing.assert_close(one.mlps, other.mlps, rtol=1e-3, atol=1e-4)
    for a, b in zip(one.shares, other.shares, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_model_is_left_as_it_was(boot):
    model = boot("llama")
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    knowledge.neurons(model, [5, 9, 30], 17)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not any(m._forward_hooks for m in model.blocks)


@pytest.mark.real
@pytest.mark.xdist_group("smollm2")
def test_smollm2_says_which_rows_give_paris(smollm2):
    one = knowledge.neurons(smollm2, "The capital of France is")
    assert one.target == " Paris"
    with knowledge.ablate(smollm2, one.top(30)):
        less = knowledge.neurons(smollm2, "The capital of France is", " Paris")
    assert less.probability < one.probability


def test_the_strongest_stands_out_in_light_and_dark(found, demo):
    """Against the page's own backgrounds, more than the weakest that is shown."""
    page = knowledge.neuron_page(demo, found.top(1)[0], ["Lionel Messi plays for Barcelona."])
    assert abs(page.contexts[0].weight) > 2 * abs(page.contexts[-1].weight)
    for html in (page._repr_html_(), found._repr_html_()):
        marks = re.findall(r"background:light-dark\(#(\w+),#(\w+)\)", html)
        for side, background in ((0, (255, 255, 255)), (1, (20, 24, 29))):
            shades = [tuple(bytes.fromhex(mark[side])) for mark in marks]
            contrasts = [colors.contrast(shade, background) for shade in shades]
            assert max(contrasts) > 2 * min(contrasts)
            if html == page._repr_html_():
                assert contrasts[0] == max(contrasts)
        # Light or dark is the host page's to say; by itself it would follow the system.
        assert "color-scheme" not in html
