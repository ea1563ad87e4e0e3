"""Static figures: every kind draws, in every format, whatever the tokens are."""

import io

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

import bwlens
from bwlens.show import figures
from tests import tiny

KINDS = ("table", "norms", "target_ranks", "spectrum")


@pytest.fixture(scope="module")
def lens(tokenizer):
    model = tiny.bridge("llama", tokenizer)
    return bwlens.backward_lens(model, "t5 t9 t30 t41", "t17", subject="t9", prepend_bos=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["pdf", "svg", "png"])
def test_draws_without_global_state(lens, kind, ending):
    figure = lens.figure(kind)
    assert isinstance(figure, Figure)
    assert not plt.get_fignums()
    held = io.BytesIO()
    figure.savefig(held, format=ending)
    assert len(held.getvalue()) > 3000


@pytest.mark.parametrize("kind", KINDS)
def test_takes_axes(lens, kind):
    figure, axes = plt.subplots(1, 2)
    assert lens.figure(kind, ax=axes[1]) is figure
    assert not axes[0].has_data()
    assert axes[1].has_data() or axes[1].patches
    plt.close(figure)


def texts_in(ax):
    return [text.get_text() for text in ax.texts]


def test_table_says_what_the_lens_says(lens):
    (ax, _) = lens.figure("table", width=7.0).axes
    expected = [cell[0] for row in lens.words() for cell in row if cell]
    assert texts_in(ax) == expected
    frames = [p for p in ax.patches if not p.get_fill()]
    assert len(frames) == expected.count("t17") > 0
    assert [label.get_text() for label in ax.get_xticklabels()] == list(lens.tokens)


def test_words_stay_within_their_cells(lens):
    figure = lens.figure("table", width=1.6)
    ax = figure.axes[0]
    figure.draw_without_rendering()
    room = ax.get_window_extent().width / len(lens.tokens)
    assert all(text.get_window_extent().width <= room for text in ax.texts)


def test_ranks_leave_out_what_has_no_gradient(lens):
    lines = lens.figure("target_ranks").axes[0].get_lines()
    assert len(lines) == len(lens.tokens)
    drawn = [line.get_ydata()[-1] == line.get_ydata()[-1] for line in lines]
    assert drawn == [False, False, False, True]  # the last layer: only the last token


def test_characters_without_a_glyph_are_named():
    assert figures.drawable("café") == "café"
    assert figures.drawable("日") == "<65E5>"
    assert figures.drawable("$x_{$") == "$x_{$"


@pytest.mark.usefixtures("unchecked")
def test_unknown_kind(lens):
    with pytest.raises(ValueError, match="no figure 'pie'; there are table"):
        lens.figure("pie")
