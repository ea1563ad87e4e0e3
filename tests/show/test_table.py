"""The lens as HTML, without a browser: what is written, how large it is, that tokens are data."""

from __future__ import annotations

import base64
import gzip
import json
import re
import unicodedata
from html.parser import HTMLParser
from importlib import resources
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bwlens.show import circuits, compare
from bwlens.show.colors import STEPS, contrast, css, ink, limit, scale, shade
from bwlens.show.pack import compressed, pack
from bwlens.show.report import report
from bwlens.show.table import assets, page, table, widget
from bwlens.show.words import exact, spaced, visible
from tests.fake_lens import HOSTILE, fake_lens, with_words, words_alike

TAGS = {"div", "section", "p", "b", "u", "i", "bdi", "span", "script", "style"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {"class", "style", "scope", "data-format", "type", "dir", "aria-label"}


class Seen(HTMLParser):
    """Tags, attributes and cells of a piece of HTML, as a parser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[dict] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "td" and self.open[-1] == "td":
            self.open.pop()  # HTML does not need its end tag
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append({"tag": tag, "text": "", "inner": [], **dict(attrs)})
        elif self.cells and "td" in self.open:
            self.cells[-1]["inner"].append(tag)

    def handle_endtag(self, tag):
        if tag == "tr" and self.open[-1] == "td":
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif {"td", "th"} & set(self.open):
            self.cells[-1]["text"] += data


def hostile():
    return fake_lens(HOSTILE, 4, len(HOSTILE), tokens=HOSTILE, target=0, k=10)


def test_the_plain_table_holds_the_promoted_words_and_the_shades():
    lens = fake_lens(n_layers=4, n_pos=5)
    cells = [cell for cell in Seen(widget(lens)).cells if cell["tag"] == "td"]
    norms, words = lens.norms("W_out"), lens.words("promoted", "W_out")
    faint = lens.readout("W_out").eps_regime
    for cell, (at, pos) in zip(cells, product(reversed(range(4)), range(5)), strict=True):
        if not words[at][pos]:
            assert cell["text"] == "·"
            assert "background" not in cell["style"]
            continue
        assert cell["text"] == exact(words[at][pos][0])
        step = round(float(norms[at, pos] / limit(norms)) * (STEPS - 1))
        assert cell["style"].startswith(f"background:{css(scale()[step])}")
        assert ("italic" in cell["style"]) == bool(faint[at, pos])
        target = words[at][pos][0] == lens.target
        assert ("border:2px" in cell["style"]) == (", the target" in cell.get("aria-label", ""))
        assert ("border:2px" in cell["style"]) == target
    assert sum("border:2px" in cell["style"] for cell in cells) >= 2
    assert sum("italic" in cell["style"] for cell in cells) >= 1


def test_headings_have_a_scope_and_the_subject_a_line():
    seen = Seen(widget(fake_lens(subject=(1, 2))))
    heads = [cell for cell in seen.cells if cell["tag"] == "th"]
    assert {cell["scope"] for cell in heads} == {"row", "col"}
    assert [cell["text"] for cell in heads if cell["scope"] == "row"] == ["3", "2", "1", "0"]
    assert seen.tags.count("u") == 3  # one in the prompt, two columns


def test_hostile_tokens_are_text():
    lens = hostile()
    lens._repr_html_().encode()  # half characters would not survive
    for html in (table(lens), page(lens).split("<main>")[1].split("</main>")[0]):
        seen = Seen(html)
        assert set(seen.tags) <= TAGS
        assert {name for name, _ in seen.attributes} <= ATTRIBUTES
        heads = [cell["text"] for cell in seen.cells if cell.get("scope") == "col"][1:]
        assert heads == [visible(token) for token in HOSTILE]
    assert unpacked(seen.scripts[0])[0]["tokens"] == [spaced(token) for token in HOSTILE]
    assert "hacked" not in re.sub(r"<script.*?</script>|&lt;img.*?&gt;", "", html, flags=re.DOTALL)


def test_no_typesetter_finds_a_formula():
    html = re.sub(r"<script.*?</script>", "", widget(hostile()), flags=re.DOTALL)
    assert 'class="bwlens tex2jax_ignore mathjax_ignore"' in html
    texts = re.split(r"<[^>]*>", html)
    assert not [text for text in texts if re.search(r"[$\\]", text) and len(text) > 1]


def test_all_pages_are_one_page_that_loads_nothing(tmp_path):
    lens = fake_lens(tokens=list("abcde"))
    two = compare(lens, lens).save(tmp_path / "two.html").read_text(encoding="utf-8")
    for html in (page(lens), two, report(lens), circuits.page([circuits.token_norms(lens)])):
        head, _, body = html.partition("<body>")
        assert html.count("<!doctype html>") == 1
        assert "default-src 'none'" in head
        assert "color-scheme:light dark" in head
        assert body.endswith("</body></html>")


def test_nothing_is_loaded():
    html = page(fake_lens()).replace("http://www.w3.org/2000/svg", "")  # a name, loaded by nobody
    assert not re.search(r"https?:|\ssrc=|\burl\(|@import|\bimport\b|\beval\b|innerHTML", html)
    assert re.findall(r'href="([^"]*)"', html) == ["data:,"]
    assert "default-src 'none'" in html


@given(st.text())
def test_every_token_can_be_seen(text):
    for shown in (visible(text), visible(text, trim=False), spaced(text).removeprefix(" ")):
        assert shown
        kinds = {unicodedata.category(character) for character in shown if character != " "}
        assert not [kind for kind in kinds if kind[0] in "CZ"]
        assert "  " not in shown
    json.dumps(spaced(text), ensure_ascii=False).encode()


def test_words_that_differ_by_their_space_stay_apart():
    assert [spaced(word) for word in (" Paris", "Paris", "  Paris")] == [
        " Paris",
        "Paris",
        " ␣Paris",
    ]
    assert visible("a  b ") == "a␣␣b␣"
    assert visible("\u0301") == "◌\u0301"
    assert visible("\u3000\ufeff\u2800\ud800") == "⟨3000⟩⟨FEFF⟩⟨2800⟩⟨D800⟩"


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_every_shade(dark):
    shades = scale(dark) + [shade(value / 1000, dark) for value in range(1001)]
    assert min(contrast(color, ink(color)) for color in shades) >= 4.5
    steps = [contrast((0, 0, 0), color) for color in scale(dark)]
    assert steps == sorted(steps, reverse=not dark)  # monotone in lightness


def test_the_plain_ink_is_readable_on_white_and_black():
    grey = (0x76, 0x76, 0x76)
    assert "color:#767676" in table(fake_lens())
    assert contrast(grey, (255, 255, 255)) >= 4.5
    assert contrast(grey, (0, 0, 0)) >= 4.5


def unpacked(text):
    text, _, numbers = gzip.decompress(base64.b64decode(text)).partition(b"\0")

    def array(value):
        if "$" not in value:
            return value
        start, length, size = value["$"]
        parts = np.frombuffer(numbers[start : start + length * size], "u1").reshape(size, length)
        return parts.T.copy().view(f"<i{size}").ravel().tolist()

    return json.loads(text, object_hook=array)


def test_packed_lenses_say_what_the_lens_says():
    lens = fake_lens([*HOSTILE, *(f" wörd{i}😀" for i in range(400))], 3, 6, both=True)
    data = unpacked(compressed(pack(lens)))
    words, shape = data["words"], (3, 6)
    assert words[0] == ""
    assert words[data["target"]] == spaced(lens.target)
    assert words[data["answer"]] == spaced(lens.answer)
    for matrix, reading in product(lens.matrices, lens.readings):
        view = lens.as_reading(reading)
        of_matrix = data["matrices"][matrix]
        entry = data["readings"][of_matrix["readings"][reading]]
        for end in ("promoted", "suppressed"):
            ids = torch.tensor(entry[end]["ids"]).reshape(*shape, data["k"])
            assert [[[words[i] for i in cell if i] for cell in row] for row in ids] == [
                [[spaced(word) for word in cell] for cell in row] for row in view.words(end, matrix)
            ]
            scores = torch.tensor(entry[end]["scores"]).reshape(ids.shape).cumsum(-1) / 100
            _, expected = view.side(end, matrix)
            alive = ~expected.isnan()
            torch.testing.assert_close(scores[alive], expected[alive], rtol=0, atol=0.00501)
        for name in ("delta", "x"):
            got = torch.tensor(of_matrix[name]).reshape(shape)
            torch.testing.assert_close(got, lens.norms(matrix, name), rtol=5.1e-5, atol=0)
        for name, ranks in (
            ("target", view.target_ranks(matrix)),
            ("answer", view.answer_ranks(matrix)),
        ):
            assert entry[name] == ranks.flatten().tolist()
        read = view.readout(matrix)
        left = torch.where(read.eps_regime, (100 * read.shrinkage).round(), -1)
        assert entry["faint"] == left.flatten().tolist()


def test_a_tiny_norm_does_not_become_no_gradient():
    lens = fake_lens(n_layers=1, n_pos=2, matrices=("W_out",), silent=False)
    gradient = next(iter(lens.gradients.values()))
    for name in ("x", "delta"):
        object.__setattr__(gradient, name, getattr(gradient, name).double())
    gradient.delta[0] = 1e-60
    assert min(unpacked(compressed(pack(lens)))["matrices"]["W_out"]["delta"]) > 0


def test_a_large_lens_is_small():
    lens = fake_lens(words_alike(), 48, 40, matrices=("W_out",))
    assert len(table(lens).encode()) <= 580_000
    assert len(assets().encode()) <= 90_000


def test_readings_shared_by_two_matrices_are_stored_once():
    lens = fake_lens(matrices=("W_in", "W_out"))
    twice = fake_lens(matrices=("W_in", "W_out"))
    twice._readings["plain"]["W_gate"] = twice._readings["plain"]["W_in"]
    object.__setattr__(twice, "matrices", ("W_in", "W_gate", "W_out"))
    held = twice.gradients._parts
    held |= {type(s)("W_gate", s.layer): g for s, g in held.items() if s.matrix == "W_in"}
    assert len(pack(twice)["readings"]) == len(pack(lens)["readings"]) == 2


def test_a_lens_without_target():
    lens = fake_lens(target=None)
    html = page(lens)
    assert "bw-target" not in html.split("<main>")[1]
    assert pack(lens)["target"] == 0
    assert "target" not in pack(lens)["readings"][0]


def test_saved_pages_and_notebooks_show_the_same(tmp_path):
    lens = hostile()
    saved = lens.save(tmp_path / "lens.html").read_text(encoding="utf-8")
    assert widget(lens) in saved
    assert lens._repr_html_() == widget(lens) + assets()
    assert page(lens, lens).count(widget(lens)) == 2
    assert page(lens, lens).count("<style>") == 1


def test_assets_are_package_data():
    room = resources.files("bwlens.show")
    parts = ("_data", "_grid", "_picture", "_panel", "_tools", "_overview", "")
    for name in ("_table.css", *(f"_table{part}.js" for part in parts)):
        assert (room / name).is_file()


def test_comparisons_say_what_cannot_be_compared(tmp_path):
    lens = fake_lens(tokens=["a", "b", "c", "d", "e"])
    with pytest.raises(ValueError, match="other layers: 0 to 3 and 0 to 2"):
        compare(lens, fake_lens(n_layers=3))
    with pytest.raises(ValueError, match="at position 2, 'c' and 'x'"):
        compare(lens, fake_lens(tokens=["a", "b", "x", "d", "e"], subject=()))
    with pytest.raises(ValueError, match="5 and 3 of them"):
        compare(lens, fake_lens(n_pos=3, tokens=["a", "b", "c"], subject=()))
    with pytest.raises(ValueError, match="no matrix was read in both: W_in in one, W_out"):
        compare(fake_lens(matrices=("W_in",)), fake_lens(matrices=("W_out",)))
    normalized = fake_lens(both=True).as_reading("normalised")
    normalized._readings.pop("plain")
    with pytest.raises(ValueError, match="no reading in both: plain in one, normalised in"):
        compare(fake_lens(), normalized)
    with pytest.raises(ValueError, match="names must be two"):
        compare(lens, lens, ("one",))
    with pytest.raises(ValueError, match="ends in"):
        compare(lens, lens).save(tmp_path / "two.pdf")
    with pytest.raises(ValueError, match="W_Q"):
        compare(lens, lens).differing("W_Q")


def test_comparisons_mark_the_cells_that_differ():
    a = fake_lens(seed=0, tokens=list("abcde"))
    b = fake_lens(seed=1, tokens=list("abcde"))
    found = compare(a, b, ("before", "after"))
    one, other = (lens.words("promoted") for lens in (a, b))
    expected = [(at, p) for at in range(4) for p in range(5) if one[at][p][:1] != other[at][p][:1]]
    assert found.differing() == expected
    assert f"differs in {len(expected)} of 20 cells" in repr(found)
    few = compare(a, with_words(a, {(1, 2): 55, (2, 0): 56}))
    assert few.differing() == [(1, 2), (2, 0)]
    for comparison, marks in ((found, 0), (few, 4)):  # most cells differ: no mark says anything
        cells = [cell for cell in Seen(comparison._repr_html_()).cells if cell["tag"] == "td"]
        assert sum("border-left" in cell.get("style", "") for cell in cells) == marks
    assert compare(a, a).differing() == []
