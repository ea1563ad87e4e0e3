"""What a reader takes along: copies, pictures, a link; and the overview of a long prompt."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from bwlens.show import compare
from bwlens.show.table import page
from bwlens.show.words import exact
from tests.browser import settled
from tests.fake_lens import HOSTILE, fake_lens, words_alike

COPIED = """() => { window.copied = []; Object.defineProperty(navigator, "clipboard", { value: {
    writeText: text => { window.copied.push(text); return Promise.resolve(); } } }); }"""


def copied(view, name):
    view.evaluate("window.copied || (" + COPIED + ")()")
    view.locator(".bw-menu summary").click()
    view.get_by_role("button", name=name).click()
    return view.evaluate("window.copied.at(-1)")


def test_the_table_as_text_markdown_and_latex(show):
    lens = fake_lens(40, 4, 5)
    view = show(page(lens))
    words = [[exact(cell[0]) if cell else "·" for cell in row] for row in lens.words()[::-1]]
    heads = [exact(token) for token in lens.tokens]
    rows = [line.split("\t") for line in copied(view, "as text").split("\n")]
    assert rows == [["layer", *heads], *([str(3 - at), *row] for at, row in enumerate(words))]
    lines = copied(view, "as Markdown").split("\n")
    assert len(lines) == 6
    assert lines[0] == f"| layer | {' | '.join(heads)} |"
    assert any(f"**{exact(lens.target)}**" in line for line in lines)
    latex = copied(view, "as LaTeX")
    assert latex.startswith("\\begin{tabular}{rlllll}\n\\toprule\nlayer & \\textvisiblespace{}w")
    assert "\\textbf{\\textvisiblespace{}w7}" in latex
    assert latex.count("\\\\\n") == 5
    assert latex.endswith("\\bottomrule\n\\end{tabular}")
    view.locator(".bw-grid tbody tr").first.locator("td").last.click()
    cell = copied(view, "the cell")
    assert cell.startswith(f"layer 3, {heads[4]}, W_out: norm ")
    assert all(exact(word) in cell for word in lens.words()[3][4])


def test_hostile_words_are_copied_as_text(show):
    lens = fake_lens(HOSTILE, 3, len(HOSTILE), tokens=HOSTILE, target=0)
    view = show(page(lens))
    latex = copied(view, "as LaTeX")
    assert not re.search(r"(?<!\\)[#%_]", latex)
    for line in copied(view, "as Markdown").split("\n"):
        assert len(re.findall(r"(?<!\\)\|", line)) == len(HOSTILE) + 2


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_of_the_view(show, tmp_path, two, scheme):
    lens = fake_lens(HOSTILE * 3, 4, 6, tokens=list("abcdef"), target=0, both=True)
    path = compare(lens, lens).save(tmp_path / "x.html") if two else lens.save(tmp_path / "x.html")
    view = show(path.read_text(encoding="utf-8"), scheme)
    files = {}
    for kind in ("SVG", "PNG"):
        with view.expect_download() as waiting:
            view.locator(".bw-menu summary").click()
            view.get_by_role("button", name=f"save as {kind}").click()
        files[kind] = tmp_path / f"x.{kind}"
        waiting.value.save_as(files[kind])
    root = ElementTree.fromstring(files["SVG"].read_text(encoding="utf-8"))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    for word in ("a", "f", "3", "layer"):
        assert texts.count(word) >= 1 + two
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    image = files["PNG"].read_bytes()
    assert image[:4] == b"\x89PNG"
    assert int.from_bytes(image[16:20], "big") == 2 * int(float(root.get("width")))


def test_a_link_opens_the_view_as_it_was(show, tmp_path):
    lens = fake_lens(60, 6, 5, ("W_in", "W_out"), silent=False)
    path = lens.save(tmp_path / "lens.html")
    view = show("")
    view.goto(path.as_uri())
    settled(view)
    assert "#" not in view.url
    for name in ("W_in", "suppressed", "log", "first layer"):
        view.get_by_role("radio", name=name, exact=True).check(force=True)
    view.get_by_role("combobox").fill(" w12")
    view.locator(".bw-grid tbody tr").nth(2).locator("td").nth(1).click()
    seen = view.inner_text(".bw-stage")
    address = view.url
    assert "matrix=W_in" in address
    again = show("")
    again.goto(address)
    settled(again)
    assert again.inner_text(".bw-stage") == seen
    assert again.get_by_role("combobox").input_value() == " w12"
    again.goto(f"{path.as_uri()}#matrix=W_Q&cell=99.99&show=nothing&columns=-4.x")
    again.reload()
    settled(again)
    assert again.locator(".bw-grid td").count() == 30


def test_notebooks_keep_their_address(show):
    view = show(fake_lens()._repr_html_())
    before = view.url
    view.get_by_role("radio", name="log").check(force=True)
    assert view.url == before


def heads(view):
    names = view.locator(".bw-grid thead th").evaluate_all("e => e.map(e => e.title)")
    return [int(re.match(r"position (\d+)", name)[1]) for name in names[1:]]


def test_columns_of_a_long_prompt_are_chosen(show):
    lens = fake_lens(words_alike(900), 4, 60, silent=False)
    view = show(page(lens))
    assert heads(view) == list(range(60))
    view.get_by_role("button", name="subject and last").click()
    assert heads(view) == [0, 1, 2, 59]
    view.get_by_role("button", name="strongest 20").click()
    strong = lens.norms().amax(0).argsort(descending=True)[:20].tolist()
    assert heads(view) == sorted({*strong, 0, 1, 2, 59})
    assert "of 60 tokens" in view.inner_text(".bw-caption")
    words = view.locator(".bw-grid tbody tr").last.locator("td").all_inner_texts()
    assert words == [lens.words()[0][pos][0].strip() for pos in heads(view)]
    missing = next(pos for pos in range(60) if pos not in heads(view))
    strip = view.locator(".bw-overview svg")
    box = strip.bounding_box()
    at = {"x": (missing + 0.5) / 60 * box["width"], "y": 10}
    before = heads(view)
    strip.click(position=at, modifiers=["Shift"])
    assert heads(view) == sorted([*before, missing])
    assert f"position {missing}" in view.inner_text(".bw-cell")
    view.get_by_role("button", name="all", exact=True).click()
    assert heads(view) == list(range(60))
    assert show(page(fake_lens(n_pos=40))).locator(".bw-overview").count() == 0


def test_of_a_very_long_prompt_a_window_is_drawn(show):
    lens = fake_lens(words_alike(900), 4, 600, ("W_out",), silent=False)
    view = show(page(lens))
    assert len(heads(view)) == 40
    strip = view.locator(".bw-overview svg")
    box = strip.bounding_box()
    free = next(pos for pos in range(300, 600) if pos not in heads(view))
    strip.click(position={"x": (free + 0.5) / 600 * box["width"], "y": 10})
    window = heads(view)
    assert free in window
    assert window == list(range(window[0], window[0] + 30))
    view.locator(".bw-grid tbody tr").first.locator("td").last.click()
    view.keyboard.press("ArrowRight")
    assert window[-1] + 1 in heads(view)
    assert f"position {window[-1] + 1}" in view.inner_text(".bw-cell")
    assert view.evaluate("document.activeElement.matches('td.bw-at')")
