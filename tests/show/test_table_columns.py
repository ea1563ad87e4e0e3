"""A wide table holds the columns in sight alone, and a reader misses none of the others."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from bwlens.show import compare
from bwlens.show.table import page, table
from bwlens.show.words import exact
from tests.browser import settled
from tests.fake_lens import fake_lens, words_alike
from tests.show.test_table_hosts import on_paper
from tests.show.test_table_taking import copied

LAYERS, TOKENS = 30, 120


@pytest.fixture(scope="module")
def lens():
    return fake_lens(
        words_alike(900), LAYERS, TOKENS, ("W_in", "W_out"), silent=False, follow=(50,)
    )


@pytest.fixture(scope="module")
def html(lens):
    return page(lens)


# Of each table: the position of each column that the page holds, its heading and its words from the
# last layer on, and which of them the reader can see.
HELD = """() => [...document.querySelectorAll(".bw-grid")].map(table => {
    const box = table.closest(".bw-scroll").getBoundingClientRect();
    const first = table.rows[0].cells[0].getBoundingClientRect().right;
    const rows = [...table.rows];
    return [...rows[0].cells].slice(1).map((head, at) => {
        const { left, right } = head.getBoundingClientRect();
        const name = +head.getAttribute("aria-colindex") - 2;
        return { pos: name, head: head.innerText, seen: right > first && left < box.right,
            words: rows.slice(1).map(row => row.cells[at + 1].textContent),
            marks: rows.slice(1).map(row => row.cells[at + 1].className),
            same: new Set(rows.map(row => row.cells[at + 1].getAttribute("aria-colindex"))).size,
            wide: document.querySelectorAll("col")[at + 1].style.width }; }); })"""


def held(view, at=0):
    return view.evaluate(HELD)[at]


def scroll(view, left):
    view.evaluate("left => document.querySelector('.bw-scroll').scrollTo(left, 0)", left)
    settled(view)


def check(view, lens, at=0, matrix="W_out", end="promoted"):
    """What is held is right, holds what is in sight, and is not all; the positions in sight."""
    columns = held(view, at)
    words = lens.words(end, matrix)
    for column in columns:
        assert column["head"] == lens.tokens[column["pos"]].strip()
        assert column["words"] == [row[column["pos"]][0].strip() for row in words[::-1]]
        assert column["same"] == 1
    positions = [column["pos"] for column in columns]
    assert positions == list(range(positions[0], positions[-1] + 1))
    assert len(positions) < TOKENS / 2
    seen = [column["pos"] for column in columns if column["seen"]]
    gap = view.evaluate("""at => { const scroll = document.querySelectorAll(".bw-scroll")[at];
        const [box, sheet] = [scroll, scroll.querySelector(".bw-grid")].map(
            e => e.getBoundingClientRect());
        const ends = scroll.scrollWidth - scroll.scrollLeft - scroll.clientWidth < 2;
        return [sheet.left - box.left, ends ? 0 : box.right - sheet.right]; }""", at)  # fmt: skip
    assert gap[0] <= 0 or positions[0] == 0
    assert gap[1] <= 0 or positions[-1] == TOKENS - 1
    return seen


def test_scrolling_far_and_back_shows_the_right_columns(show, lens, html):
    view = show(html)
    scroll(view, 0)
    assert check(view, lens)[0] == 0
    middle = view.evaluate("document.querySelector('.bw-scroll').scrollWidth / 2")
    for left in (300, middle, middle + 200, 1e6, middle, 250, 0):
        scroll(view, left)
        seen = check(view, lens)
        assert len(seen) >= 5
    assert seen[0] == 0
    scroll(view, 1e6)
    assert check(view, lens)[-1] == TOKENS - 1


def test_a_switch_far_from_the_beginning_writes_the_columns_in_sight(show, lens, html):
    view = show(html)
    view.locator(".bw-overview svg").click(position={"x": 5, "y": 10})
    for name, end, matrix in (
        ("W_in", "promoted", "W_in"), ("suppressed", "suppressed", "W_in"),
        ("W_out", "suppressed", "W_out"),
    ):  # fmt: skip
        scroll(view, 4000)
        view.get_by_role("radio", name=name, exact=True).check(force=True)
        settled(view)
        check(view, lens, matrix=matrix, end=end)
        scroll(view, 4000)
        check(view, lens, matrix=matrix, end=end)
    current = int(view.inner_text(".bw-cell").split("position ")[1].split()[0])
    for name in ("norm", "shade", "words"):  # other widths: the cell in focus stays in sight
        view.get_by_role("radio", name=name, exact=True).check(force=True)
        settled(view)
        assert current in [column["pos"] for column in held(view) if column["seen"]]
        assert view.locator(".bw-grid td.bw-at").count() == 1


def test_a_switch_begins_at_a_whole_column(show, lens):
    """Other widths, or the same again where the sheet is wider than its columns."""
    wide = page(lens)
    two = compare(fake_lens(words_alike(900), 30, 6, silent=False), fake_lens(
        words_alike(900), 30, 6, silent=False), ("a", "b"))  # fmt: skip
    edges = """() => [...document.querySelectorAll(".bw-grid thead")].map(head => {
        const boxes = [...head.rows[0].cells].map(cell => cell.getBoundingClientRect());
        return boxes.slice(1).some(({ left, right }) =>
            left < boxes[0].right - 2 && right > boxes[0].right + 2); })"""
    for html, names in ((wide, ("norm", "shade", "words")), (two._repr_html_(), ("log", "linear"))):
        view = show(html, width=900)
        for name in names:
            view.get_by_role("radio", name=name, exact=True).check(force=True)
            settled(view)
            assert not any(view.evaluate(edges)), name


def test_marks_and_the_selection_come_back_with_their_column(show, lens, html):
    view = show(html)
    scroll(view, 0)
    at = view.locator(".bw-grid tbody tr").nth(3).locator("td").nth(2)
    at.click()
    frame = view.locator(".bw-frame").evaluate("e => e.style.transform")
    marks = {column["pos"]: column["marks"] for column in held(view)}
    assert any("bw-up" in mark for column in marks.values() for mark in column)
    scroll(view, 1e6)
    assert view.locator(".bw-grid td.bw-at").count() == 0
    assert "position 2" in view.inner_text(".bw-cell")
    scroll(view, 0)
    again = {column["pos"]: column["marks"] for column in held(view)}
    assert {pos: again[pos] for pos in range(6)} == {pos: marks[pos] for pos in range(6)}
    box, cell = (view.locator(name).bounding_box() for name in (".bw-frame", ".bw-grid td.bw-at"))
    assert abs(box["x"] - cell["x"]) < 1.5
    assert abs(box["y"] - cell["y"]) < 1.5
    assert view.locator(".bw-frame").evaluate("e => e.style.transform") == frame
    assert view.locator(".bw-grid .bw-here").all_inner_texts() == [
        lens.tokens[2].strip(), str(LAYERS - 4)
    ]  # fmt: skip
    assert view.locator(".bw-cell em").inner_text() == "pinned"


def test_keys_go_on_from_a_cell_that_has_left_the_page(show, lens, html):
    view = show(html)
    scroll(view, 0)
    view.locator(".bw-grid tbody tr").first.locator("td").nth(3).click()
    scroll(view, 1e6)
    assert view.evaluate("document.activeElement.matches('.bw-scroll')")  # not the whole page
    view.keyboard.press("ArrowRight")
    settled(view)
    assert "position 4" in view.inner_text(".bw-cell")
    assert view.evaluate("document.activeElement.matches('td.bw-at')")
    assert 4 in check(view, lens)
    for key, pos in (
        ("End", TOKENS - 1),
        ("Home", 0),
        *(("ArrowRight", at + 1) for at in range(40)),
    ):
        view.keyboard.press(key)
        assert f"position {pos}" in view.inner_text(".bw-cell")
        assert view.evaluate("document.activeElement.matches('td.bw-at')")
    settled(view)
    assert 40 in check(view, lens)
    assert view.locator(".bw-scroll [tabindex='0'], .bw-scroll[tabindex='0']").count() == 1
    scroll(view, 0)
    scroll(view, 4000)
    assert view.locator("[tabindex='0']").count() == 1


def test_windows_that_change_their_size(show, lens, html):
    view = show(html, width=500)
    for width in (1900, 390, 1200):
        view.set_viewport_size({"width": width, "height": 800})
        settled(view)
        check(view, lens)
    view = show(f"<div id=box style='width: 420px'>{table(lens)}</div>", width=1900)
    scroll(view, 3000)
    for width in (1800, 300):
        view.evaluate(
            "width => { document.getElementById('box').style.width = width }", f"{width}px"
        )
        settled(view)
        check(view, lens)


def test_a_table_that_is_shown_later_begins_where_it_should(show, lens):
    view = show(f"<div id=tab hidden>{table(lens)}</div>")
    view.evaluate("document.getElementById('tab').hidden = false")
    settled(view)
    seen = check(view, lens)
    assert int(view.inner_text(".bw-cell").split("position ")[1].split()[0]) in seen
    box, cell = (view.locator(name).bounding_box() for name in (".bw-frame", ".bw-grid td.bw-at"))
    assert abs(box["x"] - cell["x"]) < 1.5
    assert abs(box["y"] - cell["y"]) < 1.5


def test_paper_has_every_column_and_the_screen_its_place_afterwards(show, lens, html):
    view = show(html, "dark")
    view.get_by_role("radio", name="W_in", exact=True).check(force=True)
    scroll(view, 3000)
    before = held(view)
    on_paper(view)
    heads, rows = view.evaluate("""() => { const paper = [...document.querySelectorAll(
        ".bw-paper .bw-grid")]; return [
        paper.flatMap(table => [...table.rows[0].cells].slice(1).map(cell => cell.innerText)),
        [...Array(paper[0].rows.length - 1).keys()].map(at => paper.flatMap(table =>
            [...table.rows[at + 1].cells].slice(1).map(cell => cell.textContent)))]; }""")
    assert heads == [token.strip() for token in lens.tokens]
    assert rows == [
        [cell[0].strip() for cell in row] for row in lens.words("promoted", "W_in")[::-1]
    ]
    style = "getComputedStyle(document.querySelector('.bwlens'))"
    assert view.evaluate(f"[{style}.backgroundColor, {style}.colorScheme]") == [
        "rgb(255, 255, 255)", "light",
    ]  # fmt: skip
    view.emulate_media(media="screen")
    view.locator(".bw-paper").wait_for(state="detached")
    settled(view)
    assert view.evaluate("document.querySelector('.bw-scroll').scrollLeft") == 3000
    after = held(view)
    assert [c["pos"] for c in after if c["seen"]] == [c["pos"] for c in before if c["seen"]]


def test_what_is_taken_along_is_the_whole_table(show, lens, html):
    view = show(html)
    scroll(view, 0)
    words = [[exact(cell[0]) for cell in row] for row in lens.words()[::-1]]
    heads = [exact(token) for token in lens.tokens]
    rows = [line.split("\t") for line in copied(view, "as text").split("\n")]
    assert rows == [["layer", *heads], *([str(29 - at), *row] for at, row in enumerate(words))]
    lines = copied(view, "as Markdown").split("\n")
    assert lines[0] == f"| layer | {' | '.join(heads)} |"
    assert [line.count("|") for line in lines] == [TOKENS + 2] * (LAYERS + 2)
    latex = copied(view, "as LaTeX").split("\n")
    assert latex[0] == f"\\begin{{tabular}}{{r{'l' * TOKENS}}}"
    assert [line.count("&") for line in latex if line.endswith("\\\\")] == [TOKENS] * (LAYERS + 1)
    before = held(view)
    files = {}
    for kind in ("SVG", "PNG"):
        with view.expect_download() as waiting:
            view.locator(".bw-menu summary").click()
            view.get_by_role("button", name=f"save as {kind}").click()
        files[kind] = waiting.value.path().read_bytes()
    root = ElementTree.fromstring(files["SVG"].decode())
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sorted(texts[1:]) == sorted(
        ["layer", *(head.removeprefix("␣") for head in heads), *map(str, range(LAYERS)),
         *(word for row in words for word in row)]
    )  # fmt: skip
    assert len({path.get("stroke") for path in root.iter("{http://www.w3.org/2000/svg}path")}) == 1
    image = Image.open(io.BytesIO(files["PNG"])).convert("RGB")
    assert image.width / image.height == pytest.approx(
        float(root.get("width")) / float(root.get("height")), rel=0.01
    )
    right = image.crop((image.width - 200, 0, image.width, image.height))
    assert len(right.getcolors(1 << 24)) > 20  # drawn up to its end
    after = held(view)
    assert [column["words"] for column in after] == [column["words"] for column in before]


def test_a_link_to_a_far_column_opens_there(show, lens, tmp_path):
    path = lens.save(tmp_path / "lens.html")
    view = show("")
    for cell, pos in (("5.100", 100), ("29.0", 0)):
        view.goto(f"{path.as_uri()}#cell={cell}")
        view.reload()
        settled(view)
        seen = check(view, lens)
        assert pos in seen
        assert f"layer {cell.split('.')[0]} · position {pos}" in view.inner_text(".bw-cell")
        assert view.locator(".bw-cell em").inner_text() == "pinned"


def test_two_wide_tables_do_not_disturb_each_other(show, lens, tmp_path):
    other = fake_lens(words_alike(900), LAYERS, TOKENS, ("W_out",), silent=False, seed=3)
    path = tmp_path / "two.html"
    path.write_text(page(lens, other), encoding="utf-8")
    view = show("")
    view.goto(path.as_uri())
    settled(view)
    first, second = (view.locator(".bwlens").nth(at) for at in (0, 1))
    before = held(view)
    second.locator(".bw-scroll").evaluate("e => e.scrollTo(5000, 0)")
    settled(view)
    check(view, other, at=1)
    assert held(view) == before
    second.locator(".bw-grid tbody td").nth(4).click()
    first.locator(".bw-grid tbody td").nth(9).click()
    pinned = [view.locator(".bw-cell").nth(at).inner_text() for at in (0, 1)]
    address = view.url
    assert len(re.findall("cell=", address)) == 2
    view.goto("about:blank")
    view.goto(address)
    settled(view)
    assert [view.locator(".bw-cell").nth(at).inner_text() for at in (0, 1)] == pinned
    check(view, lens)
    check(view, other, at=1)


def test_two_wide_tables_side_by_side_scroll_as_one(show, lens):
    found = compare(lens, lens, ("before", "after"))
    view = show(found._repr_html_(), width=1400)
    for left in (0, 2500, 1e6, 300):
        scroll(view, left)
        assert check(view, lens) == check(view, lens, at=1)
    view.locator(".bw-grid").nth(1).locator("tbody td").nth(7).click()
    view.keyboard.press("End")
    settled(view)
    assert TOKENS - 1 in check(view, lens)
    assert TOKENS - 1 in check(view, lens, at=1)


def test_the_followed_word_is_found_in_all_columns(show, lens, html):
    view = show(html)
    scroll(view, 0)
    word = lens.words()[7][118][4]
    view.get_by_role("combobox").fill(word)
    held_by = {
        end: [(pos, -layer) for layer, row in enumerate(lens.words(end))
              for pos, cell in enumerate(row) if word in cell]
        for end in ("promoted", "suppressed")
    }  # fmt: skip
    legend = " ".join(view.inner_text(".bw-keys").split())
    assert f"promotes {exact(word)} ({len(held_by['promoted'])})" in legend
    assert f"suppresses {exact(word)} ({len(held_by['suppressed'])})" in legend
    view.locator(".bw-grid tbody tr").first.locator("td").first.hover()
    order = sorted({*held_by["promoted"], *held_by["suppressed"]} - {(0, 1 - LAYERS)})
    assert len(order) > 10
    for key, cells in (("Enter", order), ("Shift+Enter", order[-2:-7:-1])):
        for pos, layer in cells:
            view.get_by_role("combobox").press(key)
            assert f"layer {-layer} · position {pos}" in view.inner_text(".bw-cell")
            assert view.locator(".bw-grid td.bw-at").count() == 1
    view.get_by_role("combobox").fill("nowhere")
    assert "no cell holds nowhere" in " ".join(view.inner_text(".bw-keys").split())


MIDDLE = """(element, word) => {
    const [text, range] = [element.firstChild, new Range()];
    range.setStart(text, text.data.indexOf(word));
    range.setEnd(text, range.startOffset + 1);
    const { top, height } = range.getBoundingClientRect();
    return top + height / 2; }"""


def test_the_browsers_own_search_finds_what_is_not_drawn(show, tmp_path):
    """A link to a text asks the same search as Ctrl+F."""
    lens = fake_lens(words_alike(20_000), LAYERS, TOKENS, ("W_out",), silent=False)
    path = lens.save(tmp_path / "lens.html")
    view = show("", width=1200, height=900)
    for pos in (2, 60):
        words = [row[pos][0].strip() for row in lens.words()]
        word = next(w for w in words if sum(w in c[0] for row in lens.words() for c in row) == 1)
        view.goto(path.as_uri())
        settled(view)
        scroll(view, 1e6)
        assert word not in [w for column in held(view) for w in column["words"]]
        view.goto(f"{path.as_uri()}#:~:text={word}")
        settled(view)
        view.wait_for_timeout(300)
        assert pos in check(view, lens)
        at = view.locator(".bw-unseen div:not([hidden])")
        box, cell = (
            each.bounding_box()
            for each in (at, view.locator(".bw-grid td").get_by_text(word, exact=True))
        )
        assert abs(box["x"] - cell["x"]) < 2
        line = at.evaluate(MIDDLE, word)
        assert abs(line - cell["y"] - cell["height"] / 2) < 2
        view.get_by_role("radio", name="norm", exact=True).check(force=True)
        assert view.locator(".bw-unseen div:not([hidden])").count() == 0
