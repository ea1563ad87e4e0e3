"""Rankings of heads: kept all, kept none, by hand; their folder; the tasks."""

import re

import pytest
import torch

import bwlens
from bwlens.attention.ablating import losses_without
from bwlens.attention.patching import without_heads
from bwlens.experiments._head_ranking import in_context, induction
from bwlens.model.prompts import make_batch


def test_head_ranking_keeps_the_top(boot, tmp_path):
    """With all heads kept the task is done as the model does it; with none all rankings agree."""
    model = boot("llama")
    prompts, targets = induction(61, n_prompts=5, length=4, lowest=4)
    settings = {"n_ranking": 2, "kept": (0.0, 0.5, 1.0), "seeds": 2, "batch_size": 7}
    result = bwlens.experiments.head_ranking(model, prompts, targets, **settings, out=tmp_path)
    with torch.no_grad():
        logits = model(torch.tensor(prompts[2:]))[:, -1]
    goal = logits.gather(1, torch.tensor(targets[2:]))
    full = result.rows[(result.rows["kept"] == 1.0) & (result.rows["ranking"] == "reversed")]
    assert full["rank"].tolist() == (logits > goal).sum(1).tolist()
    none = result.rows[result.rows["kept"] == 0.0]
    assert none.groupby("prompt")["rank"].nunique().max() == 1
    assert result.orders["reversed"][::-1] == result.orders["reversed order"]
    scores = bwlens.head_scores(model, prompts[:2], [t[0] for t in targets[:2]])
    assert result.orders["reversed"] == scores.order()
    rises = {}
    for place in scores.order():
        with without_heads(model, [place]), torch.no_grad():
            out = model(torch.tensor(prompts[:2]))[:, -1].log_softmax(-1)
        rises[place] = -float(out.gather(1, torch.tensor(targets[:2])).sum())
    ablation = result.orders["ablation"]
    assert ablation[0] == max(rises, key=rises.get)
    assert ablation[-1] == min(rises, key=rises.get)
    again = bwlens.experiments.head_ranking(model, prompts, targets, **settings, out=tmp_path)
    assert again.orders == result.orders
    assert again.seconds == result.seconds
    assert again.area().equals(result.area())
    settings["kept"] = (0.0, 0.25, 1.0)
    with pytest.raises(ValueError, match=r"kept was \[0.0, 0.5, 1.0\]"):
        bwlens.experiments.head_ranking(model, prompts, targets, **settings, out=tmp_path)
    assert {"mean", "low", "high"} <= set(result.summary(3).columns)
    assert result.plot().axes[0].lines


def test_tasks():
    samples = [{"subject": f"s{i}", "object": f"o{i}"} for i in range(6)]
    relation = {"prompt_templates": ["{} is"], "samples": samples}
    prompts, targets = in_context([relation], n_prompts=2, shots=2)
    assert re.fullmatch(r"(s\d) is o\d\. (s\d) is o\d\. (s\d) is", prompts[0])
    assert targets[0] == " o" + re.findall(r"s(\d)", prompts[0])[-1]
    (row, *_), (target, *_) = induction(61, n_prompts=2, length=4, lowest=4)
    assert row[:3] == row[4:]
    assert target == [row[3]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rankings": ["best"]}, r"rankings \['best'\]; expected some of reversed"),
        ({"kept": [1.2]}, r"kept is 1\.2"),
        ({"n_ranking": 5}, "n_ranking is 5 of 5 prompts"),
    ],
)
def test_bad_rankings(settings, message, bridge):
    prompts, targets = induction(61, n_prompts=5, length=4, lowest=4)
    with pytest.raises(ValueError, match=message):
        bwlens.experiments.head_ranking(
            bridge("llama"), prompts, targets, **{"n_ranking": 2, **settings}
        )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_losses_without_a_head(name, boot):
    """Zero is `without_heads`; the mean is a hook of our own in front of W_O."""
    model = boot(name)
    prompts, targets = induction(61, n_prompts=3, length=4, lowest=4)
    batch = make_batch(model, prompts, targets)
    goal = torch.tensor(targets)

    def loss():
        with torch.no_grad():
            return -float(
                model(torch.tensor(prompts))[:, -1].log_softmax(-1).gather(1, goal).mean()
            )

    zero = losses_without(model, batch, batch_size=5)
    mean = losses_without(model, batch, instead="mean", batch_size=5)
    for place in [(0, 0), (1, 2), (2, 3)]:
        with without_heads(model, [place]):
            assert zero[place] == pytest.approx(loss(), abs=1e-5)
        site = model.blocks[place[0]].attn.o
        own = slice(4 * place[1], 4 * place[1] + 4)

        def put_mean(module, args, own=own):
            x = args[0].clone()
            x[..., own] = x[..., own].mean((0, 1))
            return (x, *args[1:])

        handle = site.register_forward_pre_hook(put_mean)
        assert mean[place] == pytest.approx(loss(), abs=1e-5)
        handle.remove()
        assert abs(mean[place] - zero[place]) > 1e-5
