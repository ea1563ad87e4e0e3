"""The table where others show it: on paper, beside foreign styles, without scripts."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from bwlens.show import compare
from bwlens.show.colors import contrast
from bwlens.show.table import assets, page, table
from tests.fake_lens import fake_lens, words_alike

DEEP = 30  # layers of a real model


def rgb(text):
    red, green, blue = (int(part) for part in re.findall(r"\d+", text)[:3])
    return red, green, blue


def without(html, tag):
    return re.sub(rf"<{tag}.*?</{tag}>", "", html, flags=re.DOTALL)


BOXES = """() => [".bw-head", ".bw-bar", ".bw-grid", ".bw-legend", ".bw-cell",
    ".bw-words", ".bw-about"].flatMap(name => [...document.querySelectorAll(name)]).map(e => {
        const { left, right, top, bottom } = e.getBoundingClientRect();
        return [left, top, right, bottom, e.className]; }).filter(([a, b, c, d]) => c > a && d > b)
"""


def on_paper(view):
    """As printed: a printer waits for what pages do before; an emulation for a frame."""
    view.emulate_media(media="print")
    view.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def overlapping(view):
    boxes = view.evaluate(BOXES)
    return [
        (one[4], other[4])
        for at, one in enumerate(boxes)
        for other in boxes[:at]
        if min(one[2], other[2]) - max(one[0], other[0]) > 1
        and min(one[3], other[3]) - max(one[1], other[1]) > 1
    ]


SEEN_CELLS = """() => [...document.querySelectorAll(".bw-grid")].filter(e => e.offsetWidth).map(
    table => [table.getBoundingClientRect().right, [...table.tHead.rows[0].cells].slice(1).map(
        cell => cell.innerText)])"""


@pytest.mark.parametrize("n_pos", [6, 121])
def test_on_paper_nothing_is_cut_and_nothing_lies_on_the_table(show, n_pos):
    lens = fake_lens(words_alike(900), DEEP, n_pos, silent=False)
    view = show(page(lens), width=718)
    on_paper(view)
    tables = view.evaluate(SEEN_CELLS)
    assert all(right <= 718 for right, _ in tables)
    heads = [head for _, heads in tables for head in heads]
    assert len(heads) == n_pos
    assert overlapping(view) == []
    view.emulate_media(media="screen")
    view.locator(".bw-paper").wait_for(state="detached")
    assert len(view.evaluate(SEEN_CELLS)) == 1


def test_a_printed_table_of_thirty_layers_is_on_one_page(show):
    view = show(page(fake_lens(words_alike(900), DEEP, 6, silent=False)), "dark")
    pdf = view.pdf(format="A4", margin=dict.fromkeys(("top", "bottom", "left", "right"), "10mm"))
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1


def test_two_lenses_on_paper(show):
    names = [f" token{at}" for at in range(9)]
    lens = fake_lens(300, DEEP, 9, tokens=names)
    view = show(compare(lens, lens)._repr_html_(), width=718)
    on_paper(view)
    assert all(right <= 718 for right, _ in view.evaluate(SEEN_CELLS))
    heads = [head for _, heads in view.evaluate(SEEN_CELLS) for head in heads]
    assert sorted(heads) == sorted([name.strip() for name in names] * 2)
    assert overlapping(view) == []


def test_keys_are_the_tables_and_not_the_notebooks(show):
    """JupyterLab and Notebook ask the focused element first, then its ancestors."""
    view = show(f"<main tabindex=-1>{table(fake_lens(both=True))}</main>")
    asks = """e => { for (; e && !e.hasAttribute("data-lm-suppress-shortcuts"); e = e.parentElement)
        if (e.matches("main *:focus, main")) return false;
        return true; }"""
    kinds = "td, input[type=radio], input[type=search], button, summary"
    for at in view.locator(".bwlens").locator(kinds).all()[:60]:
        if not at.is_visible():
            continue
        at.focus()
        if at.evaluate("e => e === document.activeElement"):
            assert at.evaluate(asks), at.evaluate("e => e.outerHTML")
    view.locator(".bw-grid td").nth(3).click()
    assert view.evaluate("document.activeElement.tagName") == "TD"
    assert view.locator(":focus").evaluate(asks)


HOSTS = {
    "JupyterLab": ('<body data-jp-theme-light="{no}">', "#111"),
    "VS Code": ('<body class="vscode-{dark}">', "#1e1e1e"),
    "mkdocs-material": ('<body data-md-color-scheme="{slate}">', "#1e2129"),
    "Quarto": ('<body class="quarto-{dark}">', "#222"),
    "Bootstrap": ('<body data-bs-theme="{dark}">', "#212529"),
    "a class": ('<body class="{dark}">', "#0b0f19"),
    "Sphinx": ('<body data-theme="{dark}">', "#131416"),
    "color-scheme": ('<style>:root {{ color-scheme: {dark} }}</style><body class="x">', ""),
}


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_the_page_says_whether_it_is_dark(show, host, scripts):
    lens = fake_lens()
    html = table(lens) if scripts else without(table(lens), "script")
    start, back = HOSTS[host]
    for dark in (True, False):
        words = {"no": "false" if dark else "true", "dark": "dark" if dark else "light"}
        body = start.format(**words, slate="slate" if dark else "default")
        paint = f"<style>body {{ background: {back if dark else '#fff'} }}</style>" if back else ""
        # The system says the opposite.
        view = show(f"{paint}{body}{html}", "light" if dark else "dark")
        style = "getComputedStyle(document.querySelector('.bwlens'))"
        paper, ink = (
            rgb(view.evaluate(f"{style}.{name}")) for name in ("backgroundColor", "color")
        )
        assert (sum(paper) < 200) == dark, host
        assert contrast(paper, ink) > 7


def test_a_page_that_turns_dark_takes_the_table_along(show):
    view = show(f"<style>.night {{ background: #101010 }}</style><body>{table(fake_lens())}")
    back = "getComputedStyle(document.querySelector('.bwlens')).backgroundColor"
    assert rgb(view.evaluate(back)) == (255, 255, 255)
    view.evaluate("document.body.className = 'night'")
    view.wait_for_function(f"{back} === 'rgb(16, 16, 16)'")
    view.evaluate("document.body.className = ''")


def test_forced_colours_leave_the_shades_and_their_ink(show):
    view = show(page(fake_lens(silent=False)))
    view.emulate_media(forced_colors="active")
    colors = view.evaluate("""() => [...document.querySelectorAll(".bw-grid td")].map(e => [
        getComputedStyle(e).color, getComputedStyle(e).backgroundColor])""")
    assert len({back for _, back in colors}) > 5
    assert min(contrast(rgb(front), rgb(back)) for front, back in colors) >= 4.5


@pytest.mark.parametrize("forced", ["none", "active"])
@pytest.mark.parametrize("n_layers", [6, 30])
def test_the_target_and_a_followed_word_have_marks_of_their_own(show, n_layers, forced):
    lens = fake_lens(40, n_layers, 5, silent=False)
    view = show(page(lens))
    view.emulate_media(forced_colors=forced)
    view.get_by_role("combobox").fill(lens.target)
    colors = view.evaluate("""() => ["--target", "--mark"].map(name => {
        const probe = document.querySelector(".bwlens").appendChild(document.createElement("i"));
        probe.style.cssText = `color: var(${name}); forced-color-adjust: none`;
        return getComputedStyle(probe).color; })""")
    marks = view.locator(".bw-grid td.bw-hit.bw-up").evaluate_all("""cells => cells.map(cell => {
        const { boxShadow, borderTopColor, backgroundImage } = getComputedStyle(cell);
        return [boxShadow + borderTopColor, backgroundImage]; })""")
    assert len(marks) >= 2
    for frame, image in marks:
        assert colors[0] in frame
        assert colors[1] not in frame
        assert colors[1] in image
    promoted, suppressed = (
        view.locator(f".bw-grid .bw-{name}").first.evaluate(
            "e => getComputedStyle(e).backgroundImage"
        )
        for name in ("up", "down")
    )
    assert promoted != suppressed
    style = "e => { const s = getComputedStyle(e); return [s.color, s.backgroundColor]; }"
    for heading in view.locator(".bw-grid th.bw-here").all():
        assert contrast(*map(rgb, heading.evaluate(style))) >= 4.5


def test_right_to_left_pages_keep_the_order_of_tokens(show):
    for html in (table(fake_lens()), without(table(fake_lens()), "script")):
        view = show(f'<html dir="rtl"><body>{html}')
        lefts = view.evaluate("""[...document.querySelectorAll("thead th")].map(
            e => e.getBoundingClientRect().left)""")
        assert lefts[:6] == sorted(lefts[:6])
        assert view.evaluate("getComputedStyle(document.querySelector('.bw-prompt')).direction")


SHAPE = """() => [...document.querySelectorAll(".bw-grid :is(th, td), .bw-legend, .bw-bar label")]
    .map(e => { const { width, height } = e.getBoundingClientRect();
        return [Math.round(width), Math.round(height)]; })"""


def test_resets_of_the_host_move_nothing(show):
    html = table(fake_lens(n_layers=8))
    plain = show(f"<body style='margin:0'>{html}").evaluate(SHAPE)
    for reset in (
        "*, *::before, *::after { box-sizing: border-box }",
        "*, *::before, *::after { box-sizing: content-box }",
        "* { font-family: 'DejaVu Serif', serif; letter-spacing: 2px }",
        "table { width: 100%; display: block } th, td { padding: 12px; border: 3px solid }",
        "button, input { padding: 20px; margin: 20px } p, dl { margin: 1em }",
    ):
        view = show(f"<style>{reset}</style><body style='margin:0'>{html}")
        assert view.evaluate(SHAPE) == plain, reset


DARK_HOST = """<style>body { background: #0b0f19; color: #e6e6e6 } b, i, td, th, p, u, span {
    color: #f3f4f6 } td, th { padding: 0 } table { border-collapse: collapse }</style>"""


def test_hosts_that_run_no_scripts_show_words_apart_and_readable(show):
    lens = fake_lens(words_alike(900), 8, 40)
    stripped = without(without(table(lens), "script"), "style")
    for html in (without(table(lens), "script"), stripped):
        view = show(f"{DARK_HOST}<body>{html}", width=700)
        words = view.evaluate("""[...document.querySelectorAll("tbody tr")].map(row =>
            [...row.cells].slice(1).map(cell => {
                const range = document.createRange();
                range.selectNodeContents(cell);
                const { left, right } = range.getBoundingClientRect();
                const style = getComputedStyle(cell);
                return [left, right, style.color, style.backgroundColor]; }))""")
        for row in words:
            assert all(b[0] - a[1] >= 5 for a, b in pairwise(row))
            for _, _, front, back in row:
                if "0, 0, 0, 0" not in back:
                    assert contrast(rgb(front), rgb(back)) >= 4.5
        target = view.locator(".bw-prompt b").first.evaluate("e => getComputedStyle(e).color")
        page_back = (11, 15, 25)
        assert contrast(rgb(target), page_back) >= 3.5 or html != stripped
        assert view.evaluate("document.scrollingElement.scrollWidth") <= 700
        assert view.evaluate("""(() => { const e = document.querySelector("table").parentElement;
            return e.scrollWidth > e.clientWidth && /auto|scroll/.test(
                getComputedStyle(e).overflowX); })()""")


def test_a_shadow_root_without_scripts(show):
    lens = fake_lens()
    view = show("<body><div id=host></div>")
    view.evaluate(
        "html => document.getElementById('host').attachShadow({mode: 'open'}).innerHTML = html",
        table(lens),
    )
    cells = view.locator("#host td").all_inner_texts()
    assert len(cells) == 20
    assert assets()
