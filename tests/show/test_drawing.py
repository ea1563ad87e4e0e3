"""What static figures share: text that fonts lack, panels of lines, one legend for all."""

import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.font_manager import fontManager

from bwlens.show import drawing
from bwlens.show.drawing import (
    LINES,
    axes,
    cosine_maps,
    drawable,
    families,
    label,
    length,
    line_color,
    line_style,
    literal,
    panels,
)


def summary(line, values, **columns):
    layers = np.arange(len(values))
    values = np.array(values, dtype=float)
    return pd.DataFrame(
        {"layer": layers, "line": line, "mean": values, "low": values - 1, "high": values + 1}
    ).assign(**columns)


@pytest.fixture
def few_fonts(monkeypatch):
    """Those that matplotlib brings: what machines have besides differs."""
    own = [entry for entry in fontManager.ttflist if "matplotlib" in entry.fname]
    monkeypatch.setattr(fontManager, "ttflist", own)
    for known in (drawing._font_with, drawing._warn_of):
        known.cache_clear()
    yield
    drawing._font_with.cache_clear()


@pytest.mark.usefixtures("few_fonts")
@pytest.mark.filterwarnings("ignore:no installed font")
def test_characters_that_fonts_lack_are_named():
    assert drawable("Messi δ") == "Messi δ"
    assert drawable("日") == "<65E5>"
    assert label("a" * 20) == "a" * 15 + "…"
    assert label("日本の町の名前") == label(drawable("日本の町の名前"))


@pytest.mark.usefixtures("few_fonts")
def test_installed_fonts_are_looked_for_and_what_none_has_is_said_once():
    with mpl.rc_context({"font.family": ["cmr10"]}):  # which has no é
        assert drawable("é") == "é"
        assert len(families("é")) == 2
        assert families("e") == ["cmr10"]
    with pytest.warns(UserWarning, match="no installed font has the characters of SYLOTI"):
        drawable("ꠀ")
    assert drawable("ꠁ") == "<A801>"  # and no more warnings


def test_text_of_models_is_no_mathematics_and_has_its_fonts():
    with mpl.rc_context({"font.family": ["cmr10"]}):
        figure = drawing.Drawing(figsize=(2.0, 1.0))
        text = figure.text(0, 0, "$é_{$ $")
        literal(text)
        assert text.get_fontfamily() == families("é")
        figure.draw_without_rendering()
    assert length("日本", 6.0) > length("ab", 6.0) > 0


def test_text_stays_text():
    figure, ax = axes(None, (2.0, 1.0))
    ax.set_title("words")
    files = {}
    for kind in ("svg", "pdf"):
        files[kind] = io.BytesIO()
        figure.savefig(files[kind], format=kind)
    assert b">words</text>" in files["svg"].getvalue()
    assert b"/Type3" not in files["pdf"].getvalue()
    assert mpl.rcParams["pdf.fonttype"] == 3  # as the user has it


def test_panels_draw_the_numbers():
    one = pd.concat([summary("W_in", [1, 2, 3]), summary("W_out", [4, 5, 6])])
    two = pd.concat([summary("W_in", [7, 8, 9]), summary("last", [0, 1, 2])])
    every = pd.concat([one, two])
    figure, found = panels(
        every, ["one", "two"], [one, two], "line", ["last", "W_in", "W_out"], "mean"
    )
    assert [ax.get_title() for ax in found] == ["one", "two"]
    drawn = {line.get_label(): line for line in found[0].get_lines()}
    assert set(drawn) == {"W_in", "W_out"}
    np.testing.assert_array_equal(drawn["W_out"].get_ydata(), [4, 5, 6])
    np.testing.assert_array_equal(drawn["W_out"].get_xdata(), [0, 1, 2])
    assert drawn["W_in"].get_color() == found[1].get_lines()[1].get_color(), "one colour throughout"
    (legend,) = figure.legends
    # Neither panel has all the lines; the legend does, in their order.
    assert [text.get_text() for text in legend.get_texts()] == ["last", "W_in", "W_out"]


def test_rows_out_of_order_make_the_same_line():
    rows = summary("a", [3, 1, 2]).iloc[[2, 0, 1]]
    _, (ax,) = panels(rows, ["t"], [rows], "line", ["a"], "mean")
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), [3, 1, 2])


def test_empty_places_of_the_grid_are_taken_out():
    rows = summary("a", [1, 2])
    figure, found = panels(rows, list("abc"), [rows] * 3, "line", ["a"], "mean", columns=2)
    assert len(found) == len(figure.axes) == 3


@pytest.mark.parametrize("share", [True, False])
def test_axes_are_shared_or_not(share):
    rows = summary("a", [1, 2])
    _, found = panels(
        rows, list("ab"), [rows, rows], "line", ["a"], "mean", share_x=share, share_y=share
    )
    found[0].set_xlim(0, 99)
    found[0].set_ylim(0, 99)
    assert (found[1].get_xlim() == (0, 99)) == share
    assert (found[1].get_ylim() == (0, 99)) == share


def test_no_two_lines_look_alike():
    looks = {(line_color(number), line_style(number)) for number in range(12)}
    assert len(looks) == 12
    assert line_color(3, "last") == "black"
    assert "black" not in LINES


def test_cosine_maps():
    figure = cosine_maps({"a": ([0, 3, 7], np.eye(3)), "b": ([0, 1], -np.eye(2))})
    first = figure.axes[0]
    assert [text.get_text() for text in first.get_xticklabels()] == ["0", "3", "7"]
    np.testing.assert_array_equal(first.get_images()[0].get_array(), np.eye(3))
    assert first.get_images()[0].get_clim() == (-1, 1)


def test_figures_show_themselves():
    figure, ax = axes(None, (2.0, 1.0))
    ax.plot([1, 2])
    png, size = figure._repr_png_()  # pyright: ignore[reportAttributeAccessIssue]
    assert png.startswith(b"\x89PNG")
    assert size == {"width": 220, "height": 110}
    assert axes(ax, (9.0, 9.0)) == (figure, ax)
