"""Scores of heads are the norms of their maps, prompt by prompt."""

import pytest
import torch

import bwlens
from tests import cases, tiny
from tests.attention.hugging_face import jacobian

PROMPTS = [*cases.PROMPTS, [4, 44], [9, 17, 33, 50, 2]]
TARGETS = [5, 9, 33, 21, 8]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom", "gpt_oss"])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_scores_are_the_norms_of_each_prompt_s_maps(name, batch_size, bridge):
    model = bridge(name)
    scores = bwlens.head_scores(model, PROMPTS, TARGETS, batch_size=batch_size, temperature=3.0)
    assert scores.warm.shape == scores.reversed.shape == (5, len(model.blocks), 4)
    for at, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        maps = bwlens.reversed_attention(model, prompt, target)
        for kind in ("reversed", "forward"):
            mine = scores.of(kind)[at]
            torch.testing.assert_close(mine, maps.norms(kind)[0], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(scores.losses[at], maps.losses[0])


def test_warm_score_is_the_closed_form_with_a_warmer_softmax(tokenizer):
    """From an unbridged copy: S / T is log A / T up to a constant of each row."""
    temperature, prompt = 3.0, torch.tensor([PROMPTS[2]])
    hf = tiny.hf_model("llama")
    out = hf(prompt, output_attentions=True, use_cache=False)
    loss = -out.logits[0, -1].log_softmax(-1)[33]
    gradients = torch.autograd.grad(loss, out.attentions)
    model = tiny.bridge("llama", tokenizer)
    mine = bwlens.head_scores(model, prompt, 33, temperature=temperature).warm[0]
    for layer, (a, da) in enumerate(zip(out.attentions, gradients, strict=True)):
        warmer = (a.log() / temperature).softmax(-1)
        expected = (jacobian(warmer, da) * 4**-0.5).flatten(2).norm(dim=-1)[0]
        torch.testing.assert_close(mine[layer], expected, rtol=1e-4, atol=1e-7)


def test_a_saturated_head_keeps_its_warm_score(boot):
    """With queries of 1000 times the length, R is near 0; at T = 1000 the slope is the old one."""
    model = boot("gpt2")
    with torch.no_grad():
        for parameter in model.blocks[1].attn.q.original_component.parameters():
            parameter.mul_(1000)
    scores = bwlens.head_scores(model, PROMPTS[:1], 5, layers=1, temperature=1000.0)
    assert scores.mean().max() < 0.05 * scores.mean("warm").min()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_answers_alone_are_unembedded_and_give_the_same(name, bridge):
    """Answers of several tokens and of one, against the same loss of all the logits."""
    model, targets, widths = bridge(name), [[5, 8, 3], [9], [33, 2], [21], [8]], []
    unembed = model.unembed.register_forward_hook(lambda m, x, out: widths.append(out.shape))
    loss = bwlens.NLL(targets)
    other = bwlens.LogitDifference(TARGETS, 7)
    for objective, n in ((loss, 3), (other, 1)):
        widths.clear()
        scores = bwlens.head_scores(model, PROMPTS, objective)
        assert [shape[1] for shape in widths] == [n]

        class Whole:
            """A loss of one's own, that is handed all the logits."""

            target, other = objective.target, getattr(objective, "other", None)

            def __call__(self, logits, batch, own=objective):
                return own(logits, batch)

        whole = bwlens.head_scores(model, PROMPTS, Whole())
        assert widths[1][1] > n
        torch.testing.assert_close(scores.losses, whole.losses)
        torch.testing.assert_close(scores.reversed, whole.reversed, rtol=1e-4, atol=1e-7)
    unembed.remove()


def test_order_and_frame(bridge):
    scores = bwlens.head_scores(bridge("llama"), PROMPTS, TARGETS, layers=[0, 2], heads=[1, 3])
    order, frame = scores.order(), scores.frame()
    assert sorted(order) == [(0, 1), (0, 3), (2, 1), (2, 3)]
    means = scores.mean()
    values = [means[[0, 2].index(layer), [1, 3].index(head)] for layer, head in order]
    assert values == sorted(values, reverse=True)
    assert list(zip(frame["layer"], frame["head"], strict=True)) == order
    assert f"L{order[0][0]}H{order[0][1]}" in repr(scores)


def test_a_function_of_ones_own_gets_all_prompts(bridge):
    model, seen = bridge("gpt2"), []

    def loss(logits, batch):
        seen.append(len(batch))
        return logits[torch.arange(len(batch)), batch.last, 7]

    scores = bwlens.head_scores(model, PROMPTS, loss, batch_size=2)
    assert seen == [5]
    alone = bwlens.head_scores(model, PROMPTS[1], lambda logits, batch: logits[:, 1, 7])
    torch.testing.assert_close(scores.reversed[1], alone.reversed[0], rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 1.0}, r"temperature is 1\.0; expected a number above 1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"heads": [7]}, "head 7 asked for"),
    ],
)
def test_bad_settings(settings, message, bridge):
    with pytest.raises(ValueError, match=message):
        bwlens.head_scores(bridge("gpt2"), PROMPTS, TARGETS, **settings)


@pytest.mark.usefixtures("unchecked")
def test_a_score_that_is_not_there(bridge):
    scores = bwlens.head_scores(bridge("gpt2"), PROMPTS, TARGETS)
    with pytest.raises(ValueError, match="temperature=4"):
        scores.mean("warm")
    with pytest.raises(ValueError, match="'reversed', 'warm' or 'forward'"):
        scores.order("R")
