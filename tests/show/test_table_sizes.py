"""What tables of real models bring: outliers, many layers, narrow pages, bytes, blanks, names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bwlens.show import picking
from bwlens.show.colors import STEPS, limit, scale
from bwlens.show.table import page, table
from bwlens.show.words import about, exact, headings, joined, prompt_pieces, readable, target_words
from tests.fake_lens import fake_lens, words_alike
from tests.show.test_table_hosts import rgb


def with_sink(n_layers=8, n_pos=6, times=10.0):
    """A lens whose first token has norms that are `times` the largest of the rest."""
    lens = fake_lens(words_alike(900), n_layers, n_pos, ("W_out",), silent=False)
    rest = lens.norms()[:, 1:].max()
    for gradient in lens.gradients.values():
        gradient.delta[0] *= times * rest / gradient.delta[0].norm()
    return lens


def test_an_outlier_does_not_turn_the_rest_white(show):
    for n_pos in (2, 3, 6, 40):
        norms = with_sink(n_pos=n_pos).norms().double()
        assert limit(norms) <= norms[:, 1:].max() * 1.01 or n_pos == 2
        assert limit(norms) > norms[:, 1:].max() * 0.4
    lens = with_sink()
    norms = lens.norms().double()
    view = show(page(lens), width=1366)
    steps = view.evaluate("""() => [...document.querySelectorAll(".bw-grid tbody tr")].map(row =>
        [...row.cells].slice(1).map(cell => [+/\\bs(\\d+)/.exec(cell.className)[1],
            cell.className.includes("bw-beyond"), cell.getAttribute("aria-label") ?? ""]))""")[::-1]
    top = limit(norms)
    for row, expected in zip(steps, norms.tolist(), strict=True):
        for (step, beyond, said), norm in zip(row, expected, strict=True):
            assert step == round(min(norm / top, 1) * (STEPS - 1))
            assert beyond == (norm > top)
            assert ("beyond the scale, norm" in said) == beyond
    assert max(step for row in steps for step, beyond, _ in row if not beyond) == STEPS - 1
    assert f"beyond the scale: up to {norms.max():.3g}" in view.inner_text(".bw-legend")
    view.locator(".bw-grid tbody td").first.hover()
    assert "beyond the scale" in view.inner_text(".bw-facts:has(dt)")
    view.get_by_role("radio", name="whole").check(force=True)
    assert view.locator(".bw-grid .bw-beyond").count() == 0
    plain = table(lens).split("<script")[0]
    assert plain.count("text-decoration:overline") == int((norms > top).sum())


def test_the_largest_norm_is_not_beyond_its_own_scale(show):
    lens = fake_lens(n_layers=8, silent=False)
    view = show(page(lens))
    layer, pos = divmod(int(lens.norms().argmax()), 5)
    view.locator(".bw-grid tbody tr").nth(7 - layer).locator("td").nth(pos).hover()
    assert f"layer {layer} · position {pos}" in view.inner_text(".bw-cell")
    assert "beyond" not in view.inner_text(".bw-detail")


def test_no_outlier_no_change():
    for seed in range(4):
        norms = fake_lens(n_layers=8, n_pos=7, seed=seed).norms()
        assert limit(norms) == float(norms.max())
    assert limit(torch.zeros(3, 4)) == 1
    assert limit(torch.tensor([[2.0]])) == 2


def test_what_is_common_is_no_outlier(show):
    """Norms of long prompts fall by and by: a scale for the many small ones would say nothing."""
    norms = torch.logspace(0, -3, 40).repeat(30, 1) * torch.linspace(1, 4, 30)[:, None]
    assert float((norms[:, 1:] > limit(norms)).double().mean()) <= 0.02
    lens = fake_lens(words_alike(900), 10, 400, ("W_out",), silent=False)
    for gradient in lens.gradients.values():
        gradient.delta[:] *= 0.98 ** torch.arange(400)[:, None]
    view = show(page(lens))
    beyond = view.locator(".bw-grid td.bw-beyond").count()
    assert beyond <= 0.05 * view.locator(".bw-grid td").count()


@pytest.mark.parametrize("n_layers", [30, 48])
def test_all_layers_are_on_one_laptop_screen(show, n_layers):
    lens = fake_lens(words_alike(900), n_layers, 6, silent=False)
    view = show(page(lens), width=1366, height=768)
    for name in (".bw-grid tbody", ".bw-legend", ".bw-cell"):
        box = view.locator(name).bounding_box()
        assert box["y"] >= 0, name
        assert box["y"] + box["height"] <= 768, name
    boxes = view.evaluate("""() => [...document.querySelectorAll(".bw-grid tbody tr")].map(
        row => row.getBoundingClientRect().height)""")
    assert len(boxes) == n_layers
    assert min(boxes) >= 10
    assert view.evaluate("(e => e.scrollHeight <= e.clientHeight + 1)(document.querySelector("
                         "'.bw-scroll'))")  # fmt: skip
    view.get_by_role("radio", name="roomy").check(force=True)
    assert view.locator(".bw-grid tbody tr").first.bounding_box()["height"] >= 20


def test_where_the_panel_is_out_of_sight_a_box_stands_at_the_cell(show):
    lens = fake_lens(words_alike(900), 30, 6, silent=False)
    for width in (390, 800):
        view = show(page(lens), width=width, height=500)
        view.wait_for_timeout(100)
        at = view.locator(".bw-grid tbody tr").nth(4).locator("td").first
        at.hover()
        box = view.locator(".bw-tip")
        box.wait_for(state="visible")
        words = lens.words()[25][0]
        assert all(exact(word) in box.inner_text() for word in words[:5])
        assert f"norm {float(lens.norms()[25, 0]):.3g}"[:8] in box.inner_text()
        place = box.bounding_box()
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= width
        assert 0 <= place["y"] < 500
        view.mouse.move(2, 2)
        box.wait_for(state="hidden")
    view = show(page(lens), width=1366, height=900)
    view.wait_for_timeout(100)
    view.locator(".bw-grid tbody td").nth(7).hover()
    assert not view.locator(".bw-tip").is_visible()


def test_a_tap_shows_the_box(chromium):
    context = chromium.new_context(viewport={"width": 390, "height": 700}, has_touch=True)
    view = context.new_page()
    view.set_content(page(fake_lens(words_alike(900), 30, 6, silent=False)))
    view.locator(".bwlens[data-live]").wait_for()
    view.wait_for_timeout(100)
    view.locator(".bw-grid tbody td").nth(9).tap()
    assert view.locator(".bw-tip").is_visible()
    context.close()


def test_a_cell_at_the_right_is_shown_beside_whole_columns(show):
    lens = fake_lens(words_alike(900), 8, 40, silent=False)
    for width in (390, 800):
        view = show(page(lens), width=width)
        for _ in range(2):
            layers, lefts = view.evaluate("""() => {
                const heads = [...document.querySelectorAll(".bw-grid thead th")];
                const boxes = heads.map(e => e.getBoundingClientRect());
                return [boxes[0].right, boxes.slice(1).map(box => [box.left, box.right])]; }""")
            assert not [left for left, right in lefts if left < layers - 3 and right > layers + 3]
            view.locator(".bw-grid td.bw-at").focus()
            view.keyboard.press("End")
        at = view.locator(".bw-grid td.bw-at").bounding_box()
        assert at["x"] + at["width"] <= width


BYTES = ["<s>", r"\xe6\x97", r"\xa5", "本", " a", "1", "8"]


def of_bytes():
    lens = fake_lens([*BYTES, *words_alike(200)], 4, 7, tokens=BYTES, subject=(1, 2))
    return replace(lens, prompt="日本 a18", target=r" \xe5\xa4\xa7")


def test_headings_print_the_prompt_as_text(show):
    lens = of_bytes()
    assert "".join(text for text, _ in prompt_pieces(lens)) == "日本 a18"
    assert [text for text, own in prompt_pieces(lens) if own] == ["日"]
    assert headings(lens)[:5] == ["<s>", "日 1/2", "日 2/2", "本", " a"]
    view = show(page(lens))
    assert view.inner_text(".bw-prompt").startswith("日本 a18")
    assert view.title().startswith("日本 a18")
    assert r"\x" not in view.inner_text("main")


def test_bytes_are_read_as_far_as_they_go():
    assert readable(r"\xd0\xbe\xd0") == "о⟨xD0⟩"
    assert readable(r"\xe6\x97") == "⟨xE697⟩"
    assert readable(r"\x41 \d") == r"\x41 \d"
    tokens = ["a", r"\xe9\x98", r"\xaa", r"\xe9"]  # ends amid a character
    text, spans = joined(tokens)
    assert text == "a阪⟨xE9⟩"
    assert [text[low:high] for low, high in spans] == ["a", "阪", "阪", "⟨xE9⟩"]
    assert joined(["\ud83d", "", "é"])[0] == "\ud83dé"
    lens = replace(of_bytes(), target_ids=(1, 2))
    assert target_words(lens) == '"日"'
    letters = fake_lens([" س", "ي", "ا", *"defghi"], target=0)
    assert target_words(replace(letters, target_ids=(0, 1, 2))) == '" سيا"'


def test_cells_of_bytes_say_what_they_belong_to(show):
    lens = of_bytes()
    read = lens.readout("W_out")
    read.bottom_ids[1, 3, 0] = 1
    view = show(page(lens))
    at = view.locator(".bw-grid tbody tr").nth(2).locator("td").nth(3)
    assert at.inner_text() == "⟨xE697⟩"
    assert "the beginning of a character (U+65C0 to U+65FF)" in at.get_attribute("aria-label")


def test_a_leading_blank_shows_in_the_cell(show):
    lens = fake_lens([" Paris", "Paris", " Rome"] * 5, 3, 4, target=0, k=2)
    view = show(page(lens))
    words = [word[0] for row in lens.words()[::-1] for word in row if word]
    signs = view.evaluate("""() => [...document.querySelectorAll(".bw-grid td:not(.bw-nil)")].map(
        cell => getComputedStyle(cell, "::before").content)""")
    assert [sign == '"␣"' for sign in signs] == [word[0] == " " for word in words]
    assert len({*signs}) == 2


def test_marks_have_names(show):
    lens = fake_lens(n_layers=6)
    view = show(page(lens))
    names = {"bw-hit": "the target", "bw-own": "answer", "bw-faint": "doubtful"}
    for mark, name in names.items():
        cells = view.locator(f".bw-grid td.{mark}").all()
        assert cells or mark == "bw-own"
        for cell in cells:
            assert name in cell.get_attribute("aria-label")
            assert cell.inner_text() in cell.get_attribute("aria-label")


def test_the_page_names_model_and_reading_and_no_folder(show):
    lens = fake_lens()
    for name in ("/home/me/secret/Llama-3", r"C:\\Users\\me\\secret\\Llama-3", "~/secret/Llama-3"):
        own = replace(lens, settings={"model": name, "bias": False, "bwlens": "1.0"})
        assert about(own) == ["Llama-3", "plain reading", "bias False", "bwlens 1.0"]
        assert "secret" not in page(own)
    view = show(page(replace(lens, settings={"model": "org/name"})))
    assert view.title().endswith("org/name · plain reading")
    assert view.inner_text(".bw-about").startswith("org/name · plain reading")


def test_a_long_prompt_folds(show):
    lens = fake_lens(words_alike(900), 3, 130, silent=False)
    view = show(page(lens))
    assert view.locator(".bw-prompt summary").is_visible()
    assert view.locator(".bw-head").bounding_box()["height"] < 100
    view.locator(".bw-prompt summary").click()
    assert lens.prompt.strip() in view.inner_text(".bw-prompt details")


def test_of_a_very_long_prompt_some_columns_are_drawn():
    lens = fake_lens(words_alike(900), 3, 400, ("W_out",), silent=False)
    chosen = picking.columns(lens, "W_out")
    assert len(chosen) == picking.CHOSEN
    assert {0, 1, 2, 399, int(lens.norms().amax(0).argmax())} <= set(chosen)
    plain = table(lens).split("<script")[0]
    assert plain.count('scope="col"') == 1 + len(chosen)
    assert f"{len(chosen)} of 400 tokens" in plain


def test_ranks_count_from_the_promoted_end(show):
    lens = fake_lens(n_layers=5)
    view = show(page(lens))
    view.get_by_role("radio", name="target rank").check(force=True)
    shown = view.locator(".bw-grid tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].slice(1).map(cell => cell.innerText))"
    )[::-1]
    places = lens.target_places().tolist()
    assert shown == [[f"#{place}" if place else "·" for place in row] for row in places]
    assert any("#1" in row for row in shown)
    back = "e => getComputedStyle(e).backgroundColor"
    first = view.locator(".bw-grid td", has_text="#1").first
    assert rgb(first.evaluate(back)) in scale()[-3:]
    assert json.dumps(shown)
