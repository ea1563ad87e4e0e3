"""The table of a terminal: 80 columns, no glare on a dark one, norms also without colour."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from bwlens.show.colors import limit, luminance
from bwlens.show.terminal import BEYOND, HIT, TextTable, plain_text
from tests.fake_lens import fake_lens, words_alike
from tests.show.test_table_sizes import of_bytes, with_sink


def colored(lens):
    out = io.StringIO()
    Console(file=out, width=80, color_system="truecolor", force_terminal=True).print(
        TextTable(lens)
    )
    return out.getvalue()


def backs(text):
    found = re.findall(r"48;2;(\d+);(\d+);(\d+)m", text)
    return [tuple(map(int, color)) for color in found]


@pytest.mark.parametrize("shape", [(8, 5), (30, 20)])
def test_eighty_columns_hold_it(shape):
    lens = fake_lens(words_alike(900), *shape, silent=False)
    lines = plain_text(lens).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) >= shape[0]


def test_a_dark_terminal_is_not_lit_up(monkeypatch):
    lens = fake_lens(n_layers=8, silent=False)
    monkeypatch.delenv("COLORFGBG", raising=False)
    dark = sorted(map(luminance, backs(colored(lens))))
    monkeypatch.setenv("COLORFGBG", "0;15")
    light = sorted(map(luminance, backs(colored(lens))))
    assert dark[len(dark) // 2] < 0.2 < light[len(light) // 2]


def test_the_target_and_norms_are_there_without_colour():
    lens = fake_lens(n_layers=5, silent=False)
    text = plain_text(lens)
    words = lens.words()
    hits = sum(cell[0] == lens.target for row in words for cell in row)
    rows = [line for line in text.splitlines() if re.match(r" +\d ", line)]
    assert sum(line.count(HIT) for line in rows) == hits > 0
    norms = lens.norms()
    bars = [["▁▂▃▄▅▆▇█".index(c) for c in re.findall("[▁▂▃▄▅▆▇█]", line)] for line in rows[::-1]]
    assert bars == (8 * norms / limit(norms)).int().clamp(max=7).tolist()


def test_outliers_are_marked():
    text = plain_text(with_sink())
    assert text.count(BEYOND) == 1 + int((with_sink().norms() > limit(with_sink().norms())).sum())
    assert "beyond the scale, up to" in text


def test_the_prompt_is_text():
    assert plain_text(of_bytes()).startswith("日本 a18")
    assert r"\x" not in plain_text(of_bytes())
