"""The table in a real browser: what is seen there is what the lens holds."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest

from bwlens.show import compare
from bwlens.show.colors import STEPS, contrast, css, ink, scale
from bwlens.show.table import assets, page, table, widget
from bwlens.show.words import exact as exactly
from bwlens.show.words import visible
from tests.browser import settled
from tests.fake_lens import HOSTILE, fake_lens, with_words, words_alike

LAYERS, TOKENS = 4, 5


@pytest.fixture(scope="module")
def lens():
    return fake_lens(300, LAYERS, TOKENS, ("W_in", "W_gate", "W_out"), both=True)


# Every row and cell as the page has them, the last layer first.
GRID = """at => [...document.querySelectorAll(".bwlens")[at].querySelectorAll(".bw-grid tbody tr")]
    .map(row => [...row.cells].slice(1).map(cell => ({
        text: cell.innerText, mark: cell.className, color: getComputedStyle(cell).color,
        back: getComputedStyle(cell).backgroundColor })))"""

PANEL = """() => ({
    cell: document.querySelector(".bw-cell").innerText.split("\\n"),
    facts: Object.fromEntries([...document.querySelectorAll(".bw-detail dt")].map(
        dt => [dt.innerText, dt.nextSibling.innerText])),
    rows: [...document.querySelectorAll(".bw-words tbody tr")].map(
        row => [...row.cells].map(cell => cell.innerText)),
    doubt: document.querySelector(".bw-doubt").innerText })"""


def grid(view, at=0):
    rows = view.evaluate(GRID, at)
    return rows if view.is_checked("input[value=first]") else rows[::-1]


def choose(view, *names):
    for name in names:
        view.get_by_role("radio", name=name, exact=True).first.check(force=True)
    settled(view)


def cell(view, layer, pos, at=0):
    rows = view.locator(".bwlens").nth(at).locator(".bw-grid tbody tr")
    return rows.nth(rows.count() - 1 - layer).locator("td").nth(pos)


def exact(word):
    return visible(word, trim=False) if word[:1] == " " and word.strip(" ") else visible(word)


def places_of(lens, matrix, ranks):
    """Places from the promoted end, 1 the most promoted, 0 for none."""
    places = lens.d_vocab - ranks if lens.through(matrix) == "delta" else ranks + 1
    return places.masked_fill(ranks < 0, 0)


def check_panel(view, lens, matrix, layer, pos):
    """The panel shows position, norms, ranks and both lists of this cell, as the lens has them."""
    seen = view.evaluate(PANEL)
    assert seen["cell"][0] == exact(lens.tokens[pos])
    assert seen["cell"][1] == f"layer {lens.layers[layer]} · position {pos}"
    norm = float(lens.norms(matrix)[layer, pos])
    assert float(seen["facts"]["norm of δ"]) == pytest.approx(norm, rel=5e-3)
    norm_x = float(lens.norms(matrix, "x")[layer, pos])
    assert float(seen["facts"]["norm of x"]) == pytest.approx(norm_x, rel=5e-3)
    for name, places in (
        ("target", lens.target_places(matrix)),
        ("answer", places_of(lens, matrix, lens.answer_ranks(matrix))),
    ):
        place = int(places[layer, pos])
        assert seen["facts"][name].split()[0] == (f"#{place:,}" if place else "none")
    for end, column in (("promoted", 1), ("suppressed", 3)):
        words = lens.words(end, matrix)[layer][pos]
        scores = lens.side(end, matrix)[1][layer, pos].tolist()
        shown = [row[column] for row in seen["rows"] if row[column]]
        assert shown == [exact(word) for word in words]
        numbers = [float(row[column + 1].replace("−", "-")) for row in seen["rows"] if row[column]]
        assert numbers == pytest.approx(scores[: len(words)], abs=0.011)
    assert bool(norm) != ("No gradient" in seen["doubt"])


def test_hovering_shows_the_ten_words_of_a_cell(show, lens):
    view = show(table(lens))
    for layer, pos in product((0, 1, 3), (0, 2, 4)):
        cell(view, layer, pos).hover()
        check_panel(view, lens, "W_out", layer, pos)
    choose(view, "W_in")
    cell(view, 2, 1).hover()
    check_panel(view, lens, "W_in", 2, 1)


def test_the_page_opens_on_the_strongest_cell_that_promotes_the_target(show, lens):
    view = show(table(lens))
    norms, words = lens.norms("W_out"), lens.words("promoted", "W_out")
    cells = product(range(LAYERS), range(TOKENS))
    hits = [at for at in cells if words[at[0]][at[1]][:1] == [lens.target]]
    check_panel(view, lens, "W_out", *max(hits, key=lambda at: float(norms[at])))
    assert "bw-hit" in view.locator("td.bw-at").get_attribute("class")


def test_keys_move_and_pin(show, lens):
    view = show(table(lens))
    cell(view, 2, 1).click()
    check_panel(view, lens, "W_out", 2, 1)
    assert view.locator(".bw-cell em").inner_text() == "pinned"
    cell(view, 0, 4).hover()
    check_panel(view, lens, "W_out", 2, 1)  # a pin stays
    keys = {
        "ArrowUp": (3, 1),
        "ArrowRight": (3, 2),
        "End": (3, 4),
        "ArrowDown": (2, 4),
        "PageDown": (0, 4),
        "Home": (0, 0),
        "ArrowLeft": (0, 0),
        "PageUp": (3, 0),
        "Control+End": (0, 4),
        "Control+Home": (3, 0),
    }
    for key, (layer, pos) in keys.items():
        view.keyboard.press(key)
        check_panel(view, lens, "W_out", layer, pos)
        assert view.evaluate("document.activeElement.matches('td.bw-at')")
    view.keyboard.press("Escape")
    assert view.locator(".bw-cell em").count() == 0
    view.keyboard.press("Enter")
    assert view.locator(".bw-cell em").count() == 1
    assert view.locator(".bw-grid [tabindex='0']").count() == 1
    assert "no gradient" in view.locator(".bw-spoken").inner_text()
    choose(view, "first layer")
    cell_at_top = view.locator(".bw-grid tbody tr").first.locator("td").first
    cell_at_top.click()
    view.keyboard.press("ArrowDown")
    check_panel(view, lens, "W_out", 1, 0)


def test_the_mouse_and_the_keys_find_each_other(show, lens):
    view = show(table(lens))
    cell(view, 2, 1).click()
    view.keyboard.press("Escape")
    cell(view, 1, 2).hover()
    view.keyboard.press("ArrowRight")
    check_panel(view, lens, "W_out", 1, 3)
    # Events of a mouse that rests while cells move below it, as browsers send them.
    rest = """e => e.dispatchEvent(new PointerEvent("pointerover", { bubbles: true,
        pointerType: "mouse", clientX: at.x, clientY: at.y }))"""
    box = cell(view, 1, 2).bounding_box()
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    view.evaluate("place => { window.at = place; }", place)
    view.mouse.move(place["x"], place["y"])
    view.keyboard.press("ArrowRight")
    view.wait_for_timeout(600)
    cell(view, 0, 0).evaluate(rest)
    check_panel(view, lens, "W_out", 1, 4)
    view.evaluate("at.x += 1")
    cell(view, 0, 0).evaluate(rest)
    check_panel(view, lens, "W_out", 0, 0)


def test_a_cell_says_which_neurons_the_step_moves_most_there(show, lens):
    read = {each.key: 5 for cell in lens.moved_neurons("W_out", 1, 3) for each in cell}
    view = show(table(replace(lens, _neurons=read)))
    for layer, pos in ((1, 3), (2, 0)):
        cell(view, layer, pos).click()
        said = view.locator(".bw-neuron").all_inner_texts()
        view.keyboard.press("Escape")
        moved = lens.moved_neurons("W_out", layer, 3)[pos]
        assert [text.split()[0] for text in said] == [each.name for each in moved]
        for text, each in zip(said, moved, strict=True):
            value = float(text.split()[1].replace("−", "-"))
            assert value == pytest.approx(each.value, rel=6e-3)
            assert text.split()[2:] == ["␣w5"] * (layer == 1)
        # Heads stand above what they name, beside the name of the row.
        lefts = view.locator(".bw-neurons").evaluate("""list => [...list.querySelectorAll("small"),
            ...list.querySelector(".bw-neuron").children].map(e => {
                const { left, top } = e.getBoundingClientRect(); return [left, top]; })""")
        heads, values = lefts[:3], [lefts[0], *lefts[3:]]
        assert [left for left, _ in heads[1:]] == [left for left, _ in values[1:]]
        assert values[1][1] > heads[1][1]
    large = fake_lens(words_alike(900), 30, 80, ("W_out",), silent=False)
    assert show(table(large)).locator(".bw-neuron").count() == 0  # held by no one's wish


@pytest.mark.parametrize("matrix", ["W_in", "W_gate", "W_out"])
@pytest.mark.parametrize("reading", ["plain", "normalised"])
def test_every_switch_shows_what_the_lens_holds(show, lens, matrix, reading):
    view = show(table(lens))
    spoken = lens.as_reading(reading)
    choose(view, matrix, reading)
    words = {end: spoken.words(end, matrix) for end in ("promoted", "suppressed")}
    norms, places = lens.norms(matrix), spoken.target_places(matrix)
    faint = spoken.readout(matrix).eps_regime
    first = {
        end: [[visible(at[0]) if at else "·" for at in row] for row in words[end]] for end in words
    }
    for end in ("promoted", "suppressed"):
        choose(view, end)
        cells = grid(view)
        assert [[at["text"] for at in row] for row in cells] == first[end]
        for layer, pos in product(range(LAYERS), range(TOKENS)):
            found, mark = words[end][layer][pos], cells[layer][pos]["mark"].split()
            assert ("bw-nil" in mark) == (not found)
            assert ("bw-hit" in mark) == (found[:1] == [lens.target])
            assert ("bw-own" in mark) == (found[:1] == [lens.answer])
            assert ("bw-faint" in mark) == bool(faint[layer, pos] and found)
    choose(view, "both")
    for layer, row in enumerate(grid(view)):
        for pos, at in enumerate(row):
            pair = [first[end][layer][pos] for end in ("promoted", "suppressed")]
            assert at["text"].split("\n") == (pair if words["promoted"][layer][pos] else ["·"])
    choose(view, "target rank")
    shown = [[at["text"].replace(",", "") for at in row] for row in grid(view)]
    assert shown == [[f"#{place}" if place else "·" for place in row] for row in places.tolist()]
    choose(view, "norm")
    for row, expected in zip(grid(view), norms.tolist(), strict=True):
        for at, norm in zip(row, expected, strict=True):
            assert at["text"] == "·" if not norm else float(at["text"]) == pytest.approx(norm, 5e-3)
    choose(view, "shade")
    assert {at["text"] for row in grid(view) for at in row} == {""}


def rgb(text):
    red, green, blue = (int(part) for part in re.findall(r"\d+", text)[:3])
    return red, green, blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shades_are_norms_on_either_scale(show, lens, scheme):
    view = show(page(lens), scheme)
    norms = lens.norms("W_out").double()
    alive = norms[norms > 0]
    low, high = alive.min().log(), alive.max().log()
    for name, shares in (
        ("linear", norms / norms.max()),
        ("log", (norms.log() - low) / (high - low)),
    ):
        choose(view, name)
        cells = grid(view)
        for layer, pos in product(range(LAYERS), range(TOKENS)):
            if not norms[layer, pos]:
                continue
            step = int(float(shares[layer, pos]) * (STEPS - 1) + 0.5)
            back = scale(scheme == "dark")[step]
            assert rgb(cells[layer][pos]["back"]) == back, (name, css(back))
            assert rgb(cells[layer][pos]["color"]) == ink(back)
        ticks = view.locator(".bw-ticks span").all_inner_texts()
        ends = (alive.min() if name == "log" else 0, alive.max())
        assert [float(ticks[0]), float(ticks[-1])] == pytest.approx(list(map(float, ends)), 5e-3)
    choose(view, "target rank")
    deepest = scale(scheme == "dark")[-1]
    for row, ranks in zip(grid(view), lens.target_ranks("W_out").tolist(), strict=True):
        for at, rank in zip(row, ranks, strict=True):
            if rank >= 0:
                assert (rgb(at["back"]) == deepest) == (rank == lens.d_vocab - 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_readable(show, lens, scheme):
    view = show(page(lens), scheme)
    pairs = view.evaluate("""() => {
        const out = [];
        const walker = document.createTreeWalker(document.querySelector(".bwlens"), 4);
        for (let node; (node = walker.nextNode()); ) {
            const element = node.parentElement;
            if (!node.data.trim() || !element.checkVisibility()) continue;
            let box = element;
            while (/, 0\\)$/.test(getComputedStyle(box).backgroundColor)) box = box.parentElement;
            const color = getComputedStyle(element).color;
            out.push([node.data, color, getComputedStyle(box).backgroundColor]);
        }
        return out; }""")
    assert len(pairs) > 60
    for text, front, back in pairs:
        assert contrast(rgb(front), rgb(back)) >= 4.5, (text, front, back)
    assert (rgb(view.evaluate("getComputedStyle(document.body).backgroundColor"))[0] < 99) == (
        scheme == "dark"
    )


def test_notebooks_choose_the_scheme_themselves(show, lens):
    back = "getComputedStyle(document.querySelector('.bwlens')).backgroundColor"
    for scheme, theme, dark in (("dark", "true", False), ("light", "false", True)):
        view = show(f'<body data-jp-theme-light="{theme}">{table(lens)}', scheme)
        assert (rgb(view.evaluate(back))[0] < 99) == dark


def test_hostile_tokens_stay_inert(show):
    hostile = fake_lens(HOSTILE, 3, len(HOSTILE), tokens=HOSTILE, target=0, both=True)
    view = show(page(hostile))
    names = ["img", "s", "code", "main", "script", ".bwlens"]
    count = [view.evaluate(f"document.querySelectorAll('{name}').length") for name in names]
    assert count == [0, 0, 0, 1, 3, 1]
    heads = view.locator(".bw-grid thead th").all_text_contents()[1:]
    assert heads == [visible(token) for token in HOSTILE]
    for end in ("promoted", "suppressed"):
        choose(view, end)
        texts = [[at["text"] for at in row] for row in view.evaluate(GRID, 0)][::-1]
        expected = [[visible(at[0]) if at else "·" for at in row] for row in hostile.words(end)]
        assert texts == expected
        cell(view, 1, 3).hover()
        check_panel(view, hostile, "W_out", 1, 3)
    choose(view, "both")
    assert view.evaluate("window.hacked === undefined")
    # No text node could begin a formula, not even where classes are not respected.
    nodes = """() => { const out = [], all = document.createTreeWalker(document.querySelector(
        ".bw-stage"), 4); for (let n; (n = all.nextNode()); ) out.push(n.data); return out; }"""
    assert not [
        text for text in view.evaluate(nodes) if len(text) > 1 and re.search(r"[$\\]", text)
    ]


def test_many_tables_share_a_page(show, lens):
    other = fake_lens(60, 3, 4, ("W_out",), seed=5)
    one_script = f"{assets()}{widget(lens)}{widget(other)}"
    each_its_own = f"{table(lens)}{table(other)}{table(lens)}"
    for html, many in ((one_script, 2), (each_its_own, 3)):
        view = show(html)
        assert view.locator(".bw-bar").count() == many
        view.locator(".bwlens").nth(1).get_by_role("radio", name="norm", exact=True).check(
            force=True
        )
        assert view.evaluate(GRID, 0)[-1][0]["text"] == visible(lens.words()[0][0][0])
        norm = float(other.norms()[0, 0])
        assert float(view.evaluate(GRID, 1)[-1][0]["text"]) == pytest.approx(norm, 5e-3)


def test_outputs_that_a_notebook_adds_later_come_alive(show, lens):
    """JupyterLab sets innerHTML and replaces script elements by copies, which then run."""
    view = show("<body><div id=a></div><div id=b></div>")
    for place in ("a", "b"):
        view.evaluate(
            """([place, html]) => {
                const host = document.getElementById(place);
                host.innerHTML = html;
                for (const old of host.querySelectorAll("script")) {
                    const copy = document.createElement("script");
                    for (const { name, value } of old.attributes) copy.setAttribute(name, value);
                    copy.textContent = old.textContent;
                    old.replaceWith(copy);
                }
            }""",
            [place, table(lens)],
        )
    settled(view)
    assert view.locator(".bw-bar").count() == 2
    cell(view, 0, 0, at=1).hover()
    assert view.locator("#b .bw-cell span").first.inner_text() is not None
    # Rules of notebooks about all tables do not reach in.
    view.add_style_tag(
        content=":not(.x) body div td { background: red; text-align: right; padding: 30px }"
        " body div tbody tr:nth-child(odd) { background: lime } table { margin: 50px }"
        " body div dl dt { float: left; width: 20%; display: block }"
    )
    found = view.evaluate(GRID, 0)
    assert rgb(found[0][4]["back"]) in scale()
    assert view.evaluate("getComputedStyle(document.querySelector('dt')).float") == "none"
    style = "getComputedStyle(document.querySelector('.bw-grid td'))"
    assert view.evaluate(f"{style}.paddingTop + {style}.textAlign") == "0pxcenter"


def test_without_scripts_or_styles_the_plain_table_remains(show, lens):
    stripped = re.sub(r"<(script|style).*?</\1>", "", table(lens), flags=re.DOTALL)
    for html in (stripped, re.sub(r"<script.*?</script>", "", table(lens), flags=re.DOTALL)):
        view = show(html)
        assert view.locator("input, .bw-panel").count() == 0
        norms, words = lens.norms("W_out"), lens.words("promoted", "W_out")
        rows = view.locator("tbody tr").all()[::-1]
        for layer, row in enumerate(rows):
            for pos, at in enumerate(row.locator("td").all()):
                if not words[layer][pos]:
                    assert at.inner_text() == "·"
                    continue
                assert at.inner_text() == exactly(words[layer][pos][0])
                front, back = at.evaluate(
                    "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
                )
                step = round(float(norms[layer, pos] / norms.max()) * (STEPS - 1))
                assert rgb(back) == scale()[step]
                assert contrast(rgb(front), rgb(back)) >= 4.5
        assert view.get_by_text("Shade: norm of delta").is_visible()


def test_a_browser_that_cannot_unpack_says_so_and_keeps_the_plain_table(chromium, lens):
    view = chromium.new_page()
    view.add_init_script("delete window.DecompressionStream")
    view.goto("about:blank")
    view.set_content(page(lens))
    settled(view)
    assert "DecompressionStream is not defined" in view.locator(".bw-doubt").inner_text()
    words = [exactly(cell[0]) for row in lens.words()[::-1] for cell in row if cell]
    cells = view.locator("tbody td").all()
    assert [at.inner_text() for at in cells if at.inner_text() != "·"] == words
    assert view.get_by_text("Shade: norm of delta").is_visible()
    view.close()


def test_switches_that_have_nothing_to_switch_are_absent(show):
    view = show(table(fake_lens(40, 3, 4, ("W_in",), target=None)))
    titles = view.locator(".bw-bar legend").all_inner_texts()
    assert titles == ["Words", "Cells", "Scale", "On top", "Follow"]
    choose(view, "answer rank")
    assert "Place of the answer" in view.locator(".bw-caption").inner_text()


@pytest.mark.parametrize("width", [800, 1400])
@pytest.mark.parametrize(("n_layers", "n_pos"), [(8, 6), (48, 60)])
def test_nothing_overflows_and_headings_stay(show, width, n_layers, n_pos):
    view = show(page(fake_lens(900, n_layers, n_pos)), width=width, height=900)
    assert view.evaluate("document.scrollingElement.scrollWidth") <= width
    cut = """[...document.querySelectorAll('.bw-grid :is(th, td), .bw-words td, .bw-bar *')]
        .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map(e => e.outerHTML)"""
    assert view.evaluate(cut) == []
    assert (
        view.evaluate("""() => {
        const parts = ".bw-head, .bw-bar, .bw-scroll, .bw-legend, .bw-panel";
        const boxes = [...document.querySelectorAll(parts)].map(e => e.getBoundingClientRect());
        return boxes.some((a, i) => boxes.some((b, j) => i < j && a.left < b.right - 1
            && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)); }""")
        is False
    )
    if n_layers == 48:
        box = "document.querySelector('.bw-scroll')"
        view.evaluate(f"{box}.scrollTo(900, 500)")
        settled(view)
        left, top = view.evaluate(f"""() => {{
            const at = {box}.getBoundingClientRect();
            const one = s => document.querySelector(`.bw-grid ${{s}} th`).getBoundingClientRect();
            return [one("tbody").left - at.left, one("thead").top - at.top]; }}""")
        assert 0 <= left <= 3
        assert 0 <= top <= 3


def test_two_lenses_side_by_side(show):
    names = list("abcde")
    a = fake_lens(200, tokens=names, both=True)
    b = with_words(fake_lens(200, tokens=names, both=True), {(1, 2): 55, (2, 0): 56})
    found = compare(a, b, ("before", "after"))
    view = show(found._repr_html_())
    assert view.locator(".bw-grid").count() == 2
    assert view.locator(".bw-name").all_inner_texts() == ["before", "after"]

    def marked(at):
        rows = view.locator(".bw-grid").nth(at).locator("tbody tr").all()[::-1]
        return [
            (layer, pos)
            for layer, row in enumerate(rows)
            for pos, each in enumerate(row.locator("td").all())
            if re.search("bw-other", each.get_attribute("class") or "")
        ]

    seen = [set(marked(at)) for at in (0, 1)]
    assert seen[0] | seen[1] == set(found.differing())
    assert f"({len(found.differing())} of 20 cells)" in view.locator(".bw-keys").inner_text()
    view.locator(".bw-grid").nth(1).locator("tbody tr").nth(1).locator("td").nth(2).hover()
    assert view.locator("td.bw-at").count() == 2
    shown = view.locator(".bw-detail").all()
    for lens, detail in zip((a, b), shown, strict=True):
        words = detail.locator(".bw-words tbody tr td:nth-child(2)").all_inner_texts()
        assert words == [exact(word) for word in lens.words("promoted")[2][2]]
    choose(view, "norm")
    choose(view, "normalised")
    same = show(compare(a, a)._repr_html_())
    assert "(0 of 20 cells)" in same.locator(".bw-keys").inner_text()


def test_a_saved_page_opens_from_a_file(show, lens, tmp_path):
    view, asked = show(""), []
    view.on("request", lambda request: asked.append(request.url))
    path = lens.save(tmp_path / "lens.html")
    view.goto(path.as_uri())
    settled(view)
    assert view.locator(".bw-bar").count() == 1
    assert asked == [path.as_uri()]
