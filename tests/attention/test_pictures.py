"""Pictures of heads, the lens that holds them, the command, the experiment."""

import re

import pytest
import torch
from typer.testing import CliRunner

import bwlens
from bwlens.cli import app
from bwlens.experiments._head_ranking import in_context, induction
from bwlens.show.heads import head_maps, head_maps_figure, head_scores_figure, head_table

PROMPT = [5, 9, 30, 41]


def test_a_table_of_heads_has_every_head_and_its_maps(bridge):
    model = bridge("llama")
    maps = bwlens.reversed_attention(model, PROMPT, 17)
    html = head_table(maps)._repr_html_()
    norms = maps.norms()[0]
    assert html.count("<td") == 12
    assert html.count("data:image/png") == 24
    shown = [int(n) for n in re.findall(r'">(\d+)<div class="pop">', html)]
    expected = (100 * norms.flip(0) / norms.max()).round().int().flatten().tolist()
    assert shown == expected
    assert not re.search(r"(src|href)=.https?:", head_table(maps).page())
    scores = bwlens.head_scores(model, [PROMPT], [17])
    assert head_table(scores, "forward")._repr_html_().count("<td") == 12


def test_figures_and_widgets(bridge):
    model = bridge("llama")
    maps = bwlens.reversed_attention(model, PROMPT, 17)
    figure = head_maps_figure(maps, [(1, 2), (0, 0)])
    drawn = figure.axes[0].images[0].get_array()
    assert torch.allclose(torch.tensor(drawn.data), maps.map(1, 2))
    low, high = figure.axes[0].images[0].get_clim()
    assert -low == high
    scores = bwlens.head_scores(model, [PROMPT], [17])
    drawn = head_scores_figure(scores).axes[0].images[0].get_array()
    assert torch.allclose(torch.tensor(drawn.data), scores.mean())
    widget = head_maps(maps, top_k=2)._repr_html_()
    layer, head = maps.strongest(1)[0]
    assert f"L{layer} H{head}" in widget
    assert "Reversed" in widget
    assert "Forward" in widget


def test_a_lens_holds_its_heads(bridge):
    model = bridge("llama")
    lens = bwlens.backward_lens(model, torch.tensor(PROMPT), 17, attention=True)
    maps = bwlens.reversed_attention(model, PROMPT, 17)
    assert torch.equal(lens.reversed_attention(-1, 2), maps.map(2, 2))
    assert [place[:2] for place in lens.heads(3)] == maps.strongest(3)
    plain = bwlens.backward_lens(model, torch.tensor(PROMPT), 17)
    with pytest.raises(ValueError, match="attention=True"):
        plain.heads()


def test_the_command_prints_heads_and_writes_the_picture(tmp_path):
    page = tmp_path / "heads.html"
    done = CliRunner().invoke(
        app, ["heads", "Alice lives in", "--target", " Paris", "--top-k", "2", "--html", str(page)]
    )
    assert done.exit_code == 0, done.output
    assert done.output.count("H") >= 2
    assert "bwlens-heads" in page.read_text(encoding="utf-8")
    done = CliRunner().invoke(app, ["heads", " ", "--target", " Paris"])
    assert done.exit_code == 1
    assert "need some text" in done.output


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
        from bwlens.attention.patching import without_heads

        with without_heads(model, [place]), torch.no_grad():
            out = model(torch.tensor(prompts[:2]))[:, -1].log_softmax(-1)
        rises[place] = -float(out.gather(1, torch.tensor(targets[:2])).sum())
    ablation = result.orders["ablation"]
    assert ablation[0] == max(rises, key=rises.get)
    assert ablation[-1] == min(rises, key=rises.get)
    again = bwlens.experiments.head_ranking(model, prompts, targets, **settings, out=tmp_path)
    assert again.orders == result.orders
    assert again.area().equals(result.area()) or len(again.area()) == len(result.area())
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
