"""circuitsvis' widgets of a lens: right values, one script, silent and inert in a browser."""

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
        circuits.moved_neurons(lens, top_k=3),
    ]


@pytest.mark.usefixtures("offline")
def test_each_is_circuitsvis_own_and_carries_its_script(lens):
    for widget in all_widgets(lens):
        assert isinstance(widget, render.RenderedHTML)
        html = widget._repr_html_()
        assert widget.show_code() == str(widget) == html
        assert 'style="margin: 15px 0;"></div>' in html
        assert "unpkg" not in html
        assert "https://" not in html.rpartition("CircuitsVis.render(")[2]


def test_ten_widgets_share_one_script(lens):
    html = circuits.page(["<h1>ten</h1>", *(all_widgets(lens) * 4)[:10]])
    assert len(html) <= 1.5e6
    assert html.count("var CircuitsVis=") == 1
    assert html.count("CircuitsVis.render(") == 10


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


def test_numbers_are_plain(lens):
    """numpy scalars make circuitsvis raise; everything handed over is a list or a tensor."""
    widget = circuits.token_norms(lens)
    values = re.search(r'"values": (\[\[.*?\]\])', widget.local_src)
    assert values is not None
    found = torch.tensor(eval(values[1]))
    torch.testing.assert_close(found, lens.norms().T, rtol=1e-5, atol=1e-6)


def test_reports_of_long_prompts_are_quick_and_whole():
    lens = fake_lens(words_alike(900), 30, 121, silent=False, target=7)
    start = time.process_time()
    text = report(lens)
    assert time.process_time() - start < 5
    assert text.count('scope="col"') == 1 + 121
    model = replace(lens, settings={"model": "/home/me/secret/Llama-3"})
    assert "secret" not in report(model)
