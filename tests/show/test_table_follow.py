"""A word followed through the table: marks, places in every cell, a curve through the layers."""

from __future__ import annotations

import pytest

import bwlens
from bwlens.show.table import page
from tests.fake_lens import fake_lens

MARKED = """name => [...document.querySelectorAll(".bw-grid tbody tr")].reverse().flatMap(
    (row, at) => [...row.cells].slice(1).flatMap(
        (cell, pos) => cell.classList.contains(name) ? [[at, pos]] : []))"""


def holding(lens, end, word):
    return [
        [at, pos]
        for at, row in enumerate(lens.words(end))
        for pos, cell in enumerate(row)
        if any(word in (each, each.removeprefix(" ")) for each in cell)
    ]


def test_a_typed_word_is_marked_wherever_a_cell_holds_it(show):
    lens = fake_lens(40, 6, 6, silent=False)
    view = show(page(lens))
    box = view.get_by_role("combobox")
    for word in (" w12", "w30", "nowhere"):
        box.fill(word)
        for mark, end in (("bw-up", "promoted"), ("bw-down", "suppressed")):
            assert view.evaluate(MARKED, mark) == holding(lens, end, word), (word, end)
    box.fill("w12")
    assert "promotes w12" in " ".join(view.inner_text(".bw-legend").split())
    label = view.locator(".bw-grid .bw-up").first.get_attribute("aria-label")
    assert "promoted: w12" in label
    box.fill("")
    assert view.evaluate(MARKED, "bw-up") == view.evaluate(MARKED, "bw-down") == []


def test_a_word_of_the_panel_is_followed_at_a_click(show):
    lens = fake_lens(40, 6, 6, silent=False)
    view = show(page(lens))
    word = view.locator(".bw-words button").nth(3)
    text = word.inner_text().replace("␣", " ")
    word.click()
    assert view.get_by_role("combobox").input_value() == text
    assert view.evaluate(MARKED, "bw-down") == holding(lens, "suppressed", text)
    view.locator(".bw-followed button").first.click()
    assert view.evaluate(MARKED, "bw-down") == []


def test_places_of_followed_words_are_held_in_every_cell(show):
    lens = fake_lens(300, 6, 5, ("W_in", "W_out"), follow=(11, 12), silent=False)
    places = lens.followed_places("W_out")
    assert list(places) == [" w11", " w12"]
    scores = places[" w11"]
    assert 1 <= int(scores.min()) <= int(scores.max()) <= 300
    for at, row in enumerate(lens.words("promoted")):  # among the ten words: the place is known
        for pos, cell in enumerate(row):
            for number, word in enumerate(cell):
                if word in places:
                    assert int(places[word][at, pos]) == number + 1
    view = show(page(lens))
    view.get_by_role("radio", name="w11 rank").check(force=True)
    shown = view.locator(".bw-grid tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].slice(1).map(cell => cell.innerText))"
    )[::-1]
    assert shown == [[f"#{place}" for place in row] for row in places[" w11"].tolist()]
    assert 'Place of " w11"' in view.inner_text(".bw-caption")
    view.get_by_role("combobox").fill(" w12")
    shown = view.locator(".bw-grid tbody tr").last.locator("td").all_inner_texts()
    assert shown == [f"#{place}" for place in places[" w12"][0].tolist()]
    assert view.locator(".bw-curve path").count() == 4  # target, answer and two words
    lines = view.locator(".bw-curve path").evaluate_all(
        "paths => paths.map(path => path.getAttribute('d').split(/[ML]/).slice(1).map("
        "point => point.split(' ').map(Number)))"
    )
    strokes = view.locator(".bw-curve path").evaluate_all(
        "paths => paths.map(path => getComputedStyle(path).stroke)"
    )
    names = view.locator(".bw-facts dt[class]").evaluate_all(
        "terms => terms.map(term => getComputedStyle(term).textDecorationColor)"
    )
    assert names == strokes
    assert len({*strokes}) == 4
    pos = int(view.inner_text(".bw-cell").split("position ")[1].split()[0])
    heights = [y for _, y in lines[2]]
    order = sorted(range(6), key=lambda layer: int(places[" w11"][layer, pos]))
    assert heights == pytest.approx([heights[at] for at in range(6)])
    assert sorted(range(6), key=lambda layer: heights[layer]) == order


def test_ranks_of_followed_words_are_those_of_the_model():
    model = bwlens.load_model("demo")
    options = {"matrices": ["W_out"], "top_k": 20}
    prompt = "Lionel Messi plays for"
    lens = bwlens.backward_lens(model, prompt, " Paris", follow=[" Madrid", " Rome"], **options)
    for word in (" Madrid", " Rome"):
        other = bwlens.backward_lens(model, prompt, " Paris", follow=word, **options)
        assert (other.followed_places()[word] == lens.followed_places()[word]).all()
    assert (lens.answer_ranks() == bwlens.backward_lens(model, prompt, " Paris", **options)
            .answer_ranks()).all()  # fmt: skip
    places, words = lens.followed_places(), lens.words("promoted")
    seen = 0
    for at, row in enumerate(words):
        for pos, cell in enumerate(row):
            for number, word in enumerate(cell):
                if word in places:
                    assert int(places[word][at, pos]) == number + 1
                    seen += 1
    assert seen
    with pytest.raises(ValueError, match="as they are written"):
        bwlens.backward_lens(model, prompt, " Paris", follow=[""])
