"""circuitsvis' widgets of a lens: right values, one script, silent and inert in a browser."""

import json
import re
import time
from dataclasses import replace

import pytest
import torch
from circuitsvis.utils import render

from bwlens.show import circuits
from bwlens.show.report import report
from bwlens.show.words import visible
from tests.fake_lens import HOSTILE, fake_lens, words_alike


@pytest.fixture(scope="module")
def lens():
    return fake_lens(200, 4, 5, ("W_in", "W_out", "W_O"))


@pytest.fixture
def offline(monkeypatch):
    """circuitsvis' own notebook output asks the network first; ours must not."""

    def asked():
        raise AssertionError("asked the network")

    monkeypatch.setattr(render, "internet_on", asked)


def all_widgets(lens):
    return [
        circuits.top_words(lens, 1, 2),
        circuits.token_norms(lens),
        circuits.token_places(lens, layers=[1, -1]),
        circuits.moved_neurons(lens, top_k=3),
        circuits.attention_maps(lens.tokens, torch.randn(2, 3, 5, 5)),
    ]


@pytest.mark.usefixtures("offline")
def test_each_is_circuitsvis_own_and_carries_its_script(lens):
    for widget in all_widgets(lens):
        assert isinstance(widget, render.RenderedHTML)
        html = widget._repr_html_()
        assert widget.show_code() == str(widget) == html
        assert "/>" not in html.partition("<script")[0]
        assert "unpkg" not in html
        assert "https://" not in html.rpartition("CircuitsVis.render(")[2]


def test_ten_widgets_share_one_script(lens):
    html = circuits.page(["<h1>ten</h1>", *(all_widgets(lens) * 4)[:10]])
    assert len(html) <= 6e5
    assert html.count("DecompressionStream") == 1
    calls = [widget.calls.count("CircuitsVis.render(") for widget in (all_widgets(lens) * 4)[:10]]
    assert html.count("CircuitsVis.render(") == sum(calls) >= 10


def test_neurons_are_those_that_the_dense_gradient_moves_most(lens):
    for matrix, axis in (("W_out", 1), ("W_in", 0)):
        html = circuits.moved_neurons(lens, matrix, top_k=3).local_src
        named = re.findall(r"(\d) \(neurons ([\d, ]+)\)", html)
        assert [int(layer) for layer, _ in named] == [0, 1, 2, 3]
        for layer, neurons in named:
            sizes = lens.gradient(matrix, int(layer)).dense().norm(dim=axis)
            assert [int(n) for n in neurons.split(",")] == sizes.topk(3).indices.tolist()


def test_strongest_cells(lens):
    norms = lens.norms()
    (layer, pos), *rest = circuits.strongest_cells(lens, top_k=20)
    assert norms[layer, pos] == norms.max()
    assert len(rest) == int((norms > 0).sum()) - 1  # never one without gradient


def test_bad_input(lens):
    with pytest.raises(ValueError, match="no gradient in layer 3 at position 0"):
        circuits.top_words(lens, 3, 0)
    with pytest.raises(ValueError, match=r"layer 9 was not read"):
        circuits.top_words(lens, 9, 0)
    with pytest.raises(ValueError, match="outside the 5 tokens"):
        circuits.top_words(lens, 0, 5)
    with pytest.raises(ValueError, match="'W_O' has no neurons"):
        circuits.moved_neurons(lens, "W_O")


def opened(chromium, html, scheme="light"):
    """A page with the errors it reported and the addresses it asked for."""
    page = chromium.new_page(color_scheme=scheme)
    page.set_default_timeout(15_000)
    said, asked = [], []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda note: said.append(note.text) if note.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.set_content(html)
    return page, said, asked


def outside(asked):
    return [url for url in asked if not url.startswith(("data:", "about:", "blob:"))]


def test_drawn_in_a_browser(chromium, lens):
    html = circuits.page(["<p>before</p>", *all_widgets(lens), "<p>after</p>"])
    page, said, asked = opened(chromium, html)
    page.wait_for_selector("text=Samples per page")
    text = page.inner_text("body")
    for which in ("promoted", "suppressed"):
        for word in lens.words(which)[1][2]:
            assert visible(word) in text
    assert text.index("before") < text.index("Samples") < text.index("after")
    assert (said, outside(asked)) == ([], [])
    page.close()


def test_hostile_tokens_stay_inert(chromium):
    lens = fake_lens(HOSTILE, 3, len(HOSTILE), tokens=HOSTILE, target=2)
    html = circuits.page([circuits.token_norms(lens), circuits.top_words(lens, 0, 0)])
    page, said, asked = opened(chromium, html)
    page.wait_for_selector("text=Samples per page")
    assert page.evaluate("window.hacked") is None
    shown = page.inner_text("body").replace("\xa0", " ")
    assert "<img src=x onerror=window.hacked=1>" in shown
    assert (said, outside(asked)) == ([], [])
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_is_whole_and_silent(chromium, lens, scheme, tmp_path):
    path = tmp_path / "report.html"
    html = lens.report(path).read_text(encoding="utf-8")
    assert len(html.encode()) <= 3e6
    page, said, asked = opened(chromium, html, scheme)
    page.wait_for_selector("text=Norm of delta over the prompt")
    page.wait_for_selector(".bw-grid")
    for part in ("the subject", "the last token", "mean norm"):
        assert part in page.inner_text("table:not([class])")
    assert page.locator("figure svg").count() == 3
    for part in ("How to read it", "imprint", "shift", "To make this again", "NextToken"):
        assert part in page.inner_text("body")
    wide = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(wide)
    page.set_viewport_size({"width": 700, "height": 900})
    assert page.evaluate(wide)
    assert (said, outside(asked)) == ([], [])
    page.close()


def test_report_of_hostile_tokens(chromium):
    lens = fake_lens(HOSTILE, 3, len(HOSTILE), tokens=HOSTILE, target=2)
    page, said, _ = opened(chromium, report(lens))
    page.wait_for_selector(".bw-grid")
    assert page.evaluate("window.hacked") is None
    assert said == []
    page.close()


def props(widget):
    """What circuitsvis is handed by each call, in order."""
    found = re.findall(r"CircuitsVis\.\w+,\s*(\{.*?\})\s*\)(?:;|$)", widget.calls, flags=re.DOTALL)
    return [json.loads(text) for text in found]


def test_lines_of_tokens_have_one_scale(lens):
    lines = props(circuits.token_norms(lens))
    norms = lens.norms()
    values = torch.tensor([line["values"] for line in lines])
    torch.testing.assert_close(values, norms, rtol=5e-3, atol=1e-6)
    assert {line["maxValue"] for line in lines} == {float(norms.max())}
    places = lens.target_places()
    lines = props(circuits.token_places(lens, layers=[1, 2]))
    for line, row in zip(lines, places[1:3].tolist(), strict=True):
        for value, place in zip(line["values"], row, strict=True):
            assert (value > 0) == (0 < place < lens.d_vocab / 2)
            assert (value == 1) == (place == 1)
    with pytest.raises(ValueError, match=r"follow=\[' x'\]"):
        circuits.token_places(lens, word=" x")


def test_signed_maps_have_one_symmetric_scale_and_short_numbers():
    maps = torch.randn(2, 3, 4, 4) / 3
    maps[1, 2, 3, 0] = -7.123456
    names = ["a", "b", "</script>", "<d>"]
    (drawn,) = props(circuits.attention_maps(names, maps))
    assert drawn["attentionHeadNames"][0] == "L0 H0"
    assert (drawn["minValue"], drawn["maxValue"]) == pytest.approx((-7.123456, 7.123456))
    kept = torch.tensor(drawn["attention"])
    torch.testing.assert_close(kept, maps.flatten(0, 1).tril(), rtol=5e-3, atol=1e-6)
    assert max(len(str(v)) for head in drawn["attention"] for row in head for v in row) <= 9
    (drawn,) = props(circuits.attention_maps(names, maps, causal=False, top_k=1))
    assert drawn["attentionHeadNames"] == ["L1 H2"]
    assert "1 of 6 maps" in circuits.attention_maps(names, maps, top_k=1).body
    (many,) = props(circuits.attention_maps(names, torch.randn(40, 4, 4)))
    assert len(many["attention"]) == circuits.MAPS
    for bad, why in (
        ((names[:3], maps), r"expected \[head, 3, 3\]"),
        ((names, maps, ["one"]), "1 labels for 6 maps"),
        ((names, maps / 0), "not finite"),
    ):
        with pytest.raises(ValueError, match=why):
            circuits.attention_maps(*bad)


def test_widgets_of_several_outputs_share_what_runs(chromium, lens):
    """Each output of a notebook stands alone; on a dark page its text is dark on white."""
    maps = circuits.attention_maps(lens.tokens, torch.randn(2, 5, 5))
    html = f"<body style='background:#111'>{maps.local_src}{circuits.token_norms(lens).local_src}"
    page, said, _ = opened(chromium, html, "dark")
    page.wait_for_selector(".colored-tokens span span")
    page.wait_for_selector("canvas")
    assert page.evaluate("document.head.querySelectorAll('script').length") == 1
    for text in ("layer 1", "Head Selector"):
        inks = page.get_by_text(text).first.evaluate("""e => { let box = e;
            while (/, 0\\)$/.test(getComputedStyle(box).backgroundColor)) box = box.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(box).backgroundColor]; }""")
        assert inks == ["rgb(17, 17, 17)", "rgb(255, 255, 255)"]
    assert said == []
    page.close()


def test_reports_of_long_prompts_are_quick_and_whole():
    lens = fake_lens(words_alike(900), 30, 121, silent=False, target=7)
    start = time.process_time()
    text = report(lens)
    assert time.process_time() - start < 5
    assert text.count('scope="col"') == 1 + 121
    model = replace(lens, settings={"model": "/home/me/secret/Llama-3"})
    assert "secret" not in report(model)
