"""Trust beside the rows: a strip and a sentence for each layer, pale words below the floor."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from bwlens.reading.trust import FLOOR, Trust
from bwlens.show.report import report
from bwlens.show.table import page, table
from bwlens.show.terminal import plain_text
from tests.fake_lens import HOSTILE, fake_lens

R = (0.05, FLOOR - 0.01, FLOOR + 0.01, 0.9)


def judged(r=R, **options):
    """A lens whose layers have these r; the second control beats none of them."""
    lens = fake_lens(300, len(r), 5, ("W_in", "W_out"), **options)
    values = torch.tensor(r)
    none = torch.zeros(len(r))
    trust = Trust(
        "plain", "W_out", 4, lens.layers, values / 2, values, values, none, none + 1,
        none + 0.04, none, none - 0.02, none,
    )  # fmt: skip
    return replace(lens, _trust={"plain": {4: trust}})


def test_the_verdicts():
    trust = judged((*R, float("nan"))).trust
    verdicts = [trust.verdict(at) for at in range(5)]
    assert verdicts == ["none", "none", "some", "good", "unknown"]
    assert trust.believable.tolist() == [False, False, True, True, False]
    beaten = replace(trust, other=torch.tensor([0.0, 0, 0, 0.95, 0]))
    assert not beaten.believable[3]
    assert beaten.verdict(3) == "none"
    # Below the floor, and yet more than chance.
    assert "say little of what" in trust.sentence(1)
    assert "no more of what the step does than chance" in beaten.sentence(3)


def test_the_plain_table_has_a_strip_in_each_heading():
    html = table(judged())
    plain = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", plain)[:0:-1]
    assert [row.count("bw-trust") for row in rows] == [1, 1, 1, 1]
    assert ["opacity" in row.split("<th")[0] for row in rows] == [True, True, False, False]
    assert "rgba(118,118,118,0.90)" in rows[3]
    assert 'title="Layer 0: the words say little' in rows[0]
    assert f"below {FLOOR}" in plain
    assert "bw-trust" not in re.sub(
        r"<(script|style).*?</\1>", "", table(fake_lens()), flags=re.DOTALL
    )


def test_hostile_tokens_stay_text():
    lens = judged(tokens=(*HOSTILE[:4], HOSTILE[2]))
    assert "<img" not in table(lens)
    assert "<img" not in report(lens)


def test_the_terminal_says_it_in_words():
    text = plain_text(judged())
    lines = [line for line in text.splitlines() if re.match(r"\s+\d ", line)]
    assert [line.split()[1:3] for line in lines[:4]] == [
        [".90", "good"], [f".{round(100 * FLOOR) + 1}", "some"],
        [f".{round(100 * FLOOR) - 1}", "none"], [".05", "none"],
    ]  # fmt: skip
    assert max(map(len, text.splitlines())) <= 80
    assert "trust" not in plain_text(fake_lens())


def test_the_report_has_the_figures():
    text = report(judged())
    assert "How far to trust the words of W_out" in text
    assert re.search(r"<th>3</th><td>0.90</td><td>0.45</td>.*?<td>good</td>", text)
    assert "How far to trust the words of" not in report(fake_lens())


STRIPS = """() => [...document.querySelectorAll(".bw-grid tbody tr")].map(row => {
    const strip = row.querySelector(".bw-trust");
    return { r: getComputedStyle(strip).getPropertyValue("--r"),
             shown: getComputedStyle(strip).visibility, title: strip.title,
             ink: getComputedStyle(row.cells[5]).webkitTextFillColor } })"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_strip_in_a_browser(scheme, show):
    view = show(page(judged(silent=False)), scheme)
    rows = view.evaluate(STRIPS)[::-1]
    assert [float(row["r"]) for row in rows] == pytest.approx(list(R), abs=1e-3)
    assert {row["shown"] for row in rows} == {"visible"}
    assert all(row["title"].startswith(f"Layer {at}:") for at, row in enumerate(rows))
    pale = [bool(re.search(r"[/,] ?0?\.6\d*\)", row["ink"])) for row in rows]
    assert pale == [True, True, False, False]
    assert f"below {FLOOR}" in view.inner_text(".bw-legend")
    view.get_by_role("radio", name="W_in", exact=True).check(force=True)
    rows = view.evaluate(STRIPS)
    assert {row["shown"] for row in rows} == {"hidden"}
    assert f"below {FLOOR}" not in view.inner_text(".bw-legend")


def test_a_switch_between_readings(show):
    """Words, units and trust are those of the reading that is chosen."""
    lens = judged(silent=False, both=True)
    other = replace(lens.trust, plausible=torch.tensor(R).flip(0))
    lens = replace(lens, _trust=dict(lens._trust, normalised={4: other}))
    view = show(page(lens))
    words = "rows => rows.map(row => [...row.cells].slice(1).map(cell => cell.innerText))"
    for name, r in (("plain", R), ("normalised", R[::-1])):
        view.get_by_role("radio", name=name, exact=True).check(force=True)
        rows = view.evaluate(STRIPS)[::-1]
        assert [float(row["r"]) for row in rows] == pytest.approx(list(r), abs=1e-3)
        assert all(f"r = {value:.2f}" in row["title"] for value, row in zip(r, rows, strict=True))
        shown = view.locator(".bw-grid tbody tr").evaluate_all(words)[::-1]
        assert shown == [[cell[0].strip() for cell in row] for row in lens.as_reading(name).words()]


def test_cells_that_were_not_read_say_so(show):
    lens = replace(judged(silent=False), positions=(4,))
    view = show(page(lens))
    label = 'cells => cells.map(cell => [cell.innerText, cell.getAttribute("aria-label")])'
    cells = view.locator(".bw-grid tbody tr:first-child td").evaluate_all(label)
    assert cells[0] == ["·", "not read"]
    assert cells[4][0] not in ("", "·")
    assert "no gradient, or not read" in view.inner_text(".bw-legend")
