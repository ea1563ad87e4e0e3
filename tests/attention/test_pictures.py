"""Pictures of heads, the lens that holds them, the command, the experiment."""

import re

import pytest
import torch
from typer.testing import CliRunner

import bwlens
from bwlens.cli import app
from bwlens.show.heads import head_maps, head_maps_figure, head_scores_figure, head_table
from bwlens.show.report import report

PROMPT = [5, 9, 30, 41]


def test_a_report_shows_the_heads_that_its_lens_holds(bridge):
    with_heads = report(bwlens.backward_lens(bridge("llama"), PROMPT, 17, attention=True))
    assert with_heads.count("<td tabindex") == 12
    assert "<h2>Heads</h2>" in with_heads
    assert not re.search(r"(src|href)=.https?:", with_heads)
    assert "Heads</h2>" not in report(bwlens.backward_lens(bridge("llama"), PROMPT, 17))


def test_a_table_of_heads_has_every_head_and_its_maps(bridge):
    model = bridge("llama")
    maps = bwlens.reversed_attention(model, PROMPT, 17)
    html = head_table(maps)._repr_html_()
    assert "color-scheme" not in html  # the host page's to say
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "falcon_h1", "jamba"])
def test_a_lens_holds_its_heads(name, bridge):
    """One pass gives both, and neither's numbers are others than by itself."""
    model, passes = bridge(name), []
    prompt, settings = torch.tensor(PROMPT), {"trust": name not in ("mixtral", "jamba")}
    bwlens.backward_lens(model, prompt, 17, **settings)  # what is seen to once a model
    handle = model.embed.register_forward_hook(lambda *args: passes.append(args))
    plain = bwlens.backward_lens(model, prompt, 17, **settings)
    alone = len(passes)
    maps = bwlens.reversed_attention(model, PROMPT, 17)
    passes.clear()
    lens = bwlens.backward_lens(model, prompt, 17, **settings, attention=True)
    handle.remove()
    assert len(passes) == alone
    assert lens.attention.layers == maps.layers
    # By themselves, maps unembed the answers alone: no other sums, but in another order.
    same = {"rtol": 1e-4, "atol": 1e-8}
    torch.testing.assert_close(lens.attention.reversed, maps.reversed, **same)
    assert torch.equal(lens.attention.forward, maps.forward)
    assert [place[:2] for place in lens.heads(3)] == maps.strongest(3)
    for site, gradient in plain.gradients.items():
        assert torch.equal(lens.gradients[site].delta, gradient.delta)
        assert torch.equal(lens.gradients[site].x, gradient.x)
    layer = maps.layers[-1]
    some = bwlens.backward_lens(model, prompt, 17, layers=[layer], attention=True)
    torch.testing.assert_close(some.reversed_attention(layer, 2), maps.map(layer, 2), **same)
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
