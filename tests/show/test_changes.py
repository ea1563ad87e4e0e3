"""Two lenses: how much each cell changed, in data, in a browser and as a figure."""

from __future__ import annotations

import pytest

from bwlens.show import compare
from bwlens.show.colors import CHANGES, changes, contrast, ink, luminance
from tests.fake_lens import fake_lens
from tests.show.test_table_hosts import rgb

NAMES = list("abcde")


def two(**options):
    a, b = (fake_lens(200, 6, tokens=NAMES, seed=seed, follow=(11,), **options) for seed in (0, 1))
    return compare(a, b, ("before", "after"))


def test_changes_are_ordered_and_leave_out_what_has_no_gradient():
    both = two()
    a, b = both.lenses
    frame = both.changes()
    assert list(frame["change"].abs()) == sorted(frame["change"].abs(), reverse=True)
    assert len(frame) == int(((a.norms() > 0) & (b.norms() > 0)).sum())
    first = frame.iloc[0]
    change = (b.norms() - a.norms())[int(first.layer), int(first.pos)]
    assert first.change == pytest.approx(float(change))
    for of in ("place", " w11"):
        row = both.changes(of=of).iloc[0]
        places = [
            lens.target_places() if of == "place" else lens.followed_places()[of]
            for lens in (a, b)
        ]  # fmt: skip
        one, other = (int(each[int(row.layer), int(row.pos)]) for each in places)
        assert (row.before, row.after, row.change) == (one, other, other - one)
    with pytest.raises(ValueError, match="neither 'norm' nor 'place'"):
        both.changes(of=" elsewhere")
    assert compare(a, a).changes()["change"].abs().max() == 0


def test_other_prompts_stand_side_by_side_by_their_parts(show):
    a = fake_lens(200, 6, 8, tokens=list("abSTcdeZ"), subject=(2, 3), silent=False)
    b = fake_lens(200, 6, 7, tokens=list("xSTUfgZ"), subject=(1, 2, 3), silent=False, seed=1)
    both = compare(a, b)
    assert both.positions == ((1, 2, 3, 5, 6, 7), (0, 2, 3, 4, 5, 6))
    frame = both.changes()
    for row in frame.itertuples():
        assert dict(zip(*both.positions, strict=True))[row.pos] == row.other_pos
        assert (row.token, row.other_token) == (a.tokens[row.pos], b.tokens[row.other_pos])
        assert row.before == pytest.approx(float(a.norms()[row.layer, row.pos]))
        assert row.after == pytest.approx(float(b.norms()[row.layer, row.other_pos]))
    assert [label.get_text() for label in both.figure().axes[0].get_xticklabels()] == [*"bSTdeZ"]
    view = show(both._repr_html_(), width=1400)
    heads = view.locator(".bw-grid thead tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].slice(1).map(cell => cell.innerText).join(''))"
    )
    assert heads == ["bSTdeZ", "xTUfgZ"]
    words = view.locator(".bw-grid").nth(1).locator("tbody tr").first.locator("td")
    assert words.all_inner_texts() == [
        b.words()[-1][pos][0].strip() for pos in both.positions[1]
    ]  # fmt: skip
    view.locator(".bw-grid td").first.click()
    where = view.locator(".bw-cell").all_inner_texts()
    assert ["position 1" in where[0], "position 0" in where[1]] == [True, True]
    ends = fake_lens(200, 6, 5, subject=(3, 4)), fake_lens(200, 6, 6, subject=(1,), seed=2)
    assert compare(*ends).positions == ((2, 3, 4), (0, 1, 5))
    with pytest.raises(ValueError, match=r"5 and 6 of them.*subject="):
        compare(fake_lens(200, 6, 5, subject=()), ends[1])


@pytest.mark.parametrize("dark", [False, True])
def test_signed_shades_are_readable_and_their_middle_is_plain(dark):
    shades = changes(dark)
    assert min(contrast(color, ink(color)) for color in shades) >= 4.5
    light = [luminance(color) for color in shades]
    middle = CHANGES // 2
    for side in (light[: middle + 1], light[middle:][::-1]):
        assert side == sorted(side, reverse=dark)


def test_cells_are_coloured_by_what_changed(show):
    both = two(silent=False)
    a, b = both.lenses
    view = show(both._repr_html_(), width=1400)
    view.get_by_role("radio", name="change of norm").check(force=True)
    change = (b.norms() - a.norms()).double()
    back = """at => [...document.querySelectorAll(".bw-grid")[at].tBodies[0].rows].reverse().map(
        row => [...row.cells].slice(1).map(cell => getComputedStyle(cell).backgroundColor))"""
    half = CHANGES // 2
    for at in (0, 1):
        for colors, row in zip(view.evaluate(back, at), change.tolist(), strict=True):
            for color, value in zip(colors, row, strict=True):
                step = int(half + half * value / float(change.abs().max()) + 0.5)
                assert rgb(color) == changes()[step]
    listed = view.locator(".bw-most li").all_inner_texts()
    frame = both.changes()
    for text, row in zip(listed, frame.itertuples(), strict=False):
        assert text.startswith(f"layer {row.layer}, {row.token}:")
    view.locator(".bw-most button").nth(2).click()
    row = frame.iloc[2]
    assert f"layer {row.layer} · position {row.pos}" in view.locator(".bw-cell").first.inner_text()
    view.get_by_role("radio", name="change of rank").check(force=True)
    assert 'place of " w11"' in view.inner_text(".bw-title")


def test_the_figure_of_a_change(tmp_path):
    both = two()
    for of in ("norm", "place", " w11"):
        figure = both.figure(of=of)
        image = figure.axes[0].images[0]
        low, high = image.get_clim()
        assert low == -high
        assert image.get_array().shape == (6, 5)
        figure.savefig(tmp_path / "change.png")


@pytest.mark.parametrize("width", [390, 800, 1400])
def test_two_tables_have_columns_alike_and_nothing_is_cut(show, width):
    view = show(two()._repr_html_(), width=width)
    widths, tops, scrolls = view.evaluate("""() => {
        const grids = [...document.querySelectorAll(".bw-grid")];
        return [grids.map(grid => [...grid.tHead.rows[0].cells].map(e => e.offsetWidth)),
            grids.map(grid => [...grid.rows].map(row => row.getBoundingClientRect().top)),
            [...document.querySelectorAll(".bw-scroll")].map(e => [e.scrollWidth, e.clientWidth,
                e.getBoundingClientRect().left, e.getBoundingClientRect().right])]; }""")
    assert widths[0] == widths[1]
    if width > 720:
        assert tops[0] == tops[1]
    else:
        assert tops[1][0] > tops[0][-1]
    for _, _, left, right in scrolls:
        assert 0 <= left < right <= width
    if width == 1400:
        assert all(needed <= has for needed, has, *_ in scrolls)
    assert view.evaluate("document.scrollingElement.scrollWidth") <= width
