"""Static figures: every kind draws, in every format, whatever the tokens are."""

import io
import time

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

import bwlens
from bwlens.show import picking
from bwlens.show.colors import limit
from tests import tiny
from tests.fake_lens import fake_lens, words_alike

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


@pytest.mark.parametrize("dpi", [100, 200])  # letters of few dots are narrower
def test_words_stay_within_their_cells(lens, dpi):
    long = ["compromis", "disadvant", "interpre", "howe", "nonsense", "AlmostEqual", "policym"]
    wide = fake_lens(long * 10, 9, 7, silent=False)
    for shown, width in ((lens, 1.6), (wide, 3.3)):
        figure = shown.figure("table", width=width)
        figure.set_dpi(dpi)
        ax = figure.axes[0]
        figure.draw_without_rendering()
        room = ax.get_window_extent().width / len(shown.tokens)
        assert all(text.get_window_extent().width <= 0.975 * room for text in ax.texts)


def test_ranks_leave_out_what_has_no_gradient(lens):
    lines = lens.figure("target_ranks").axes[0].get_lines()
    assert len(lines) == len(lens.tokens)
    drawn = [line.get_ydata()[-1] == line.get_ydata()[-1] for line in lines]
    assert drawn == [False, False, False, True]  # the last layer: only the last token


BYTES = ["<|im_start|>", r"\xe6\x97", r"\xa5", "é", " a", "1", "8"]


@pytest.mark.filterwarnings("ignore:no installed font")
def test_names_of_tokens_lie_apart_and_say_the_text():
    lens = fake_lens([*BYTES, *words_alike(200)], 4, 7, tokens=BYTES, silent=False)
    for kind in ("table", "norms"):
        figure = lens.figure(kind)
        figure.draw_without_rendering()
        labels = figure.axes[0].get_xticklabels()
        assert all(label.get_rotation() == 60 for label in labels)  # the first would lie on others
        assert labels[3].get_text() == "é"
        assert labels[1].get_text().endswith(" 1/2")
    names = [text.get_text() for text in lens.figure("target_ranks").axes[0].get_legend().texts]
    assert names[1].endswith(" 1/2")
    assert names[0] == "0 <|im_start|>"
    few = fake_lens(["a", "b"] * 50, 4, 4, tokens=["a", "b", "a", "b"])
    figure = few.figure("table")
    assert not any(label.get_rotation() for label in figure.axes[0].get_xticklabels())


def test_a_target_that_is_written_leftward_stands_after_its_arrow():
    lens = fake_lens([" روما", *words_alike(200)], 4, 4, target=0, silent=False)
    title = lens.figure("table").axes[0].get_title(loc="right")
    assert title == '\u200e→ " روما"'  # the mark keeps the line's direction


@pytest.mark.usefixtures("unchecked")
def test_unknown_kind(lens):
    with pytest.raises(ValueError, match="no figure 'pie'; there are table"):
        lens.figure("pie")


@pytest.mark.parametrize("kind", ["table", "norms"])
def test_named_positions_are_not_called_the_strongest(lens, kind):
    label = lens.figure(kind, positions=slice(1, 3)).axes[0].get_xlabel()
    assert label == f"2 of {len(lens.tokens)} tokens"


def test_long_prompts_are_drawn_in_part_and_say_so():
    lens = fake_lens(words_alike(900), 30, 500, ("W_out",), silent=False)
    start = time.perf_counter()
    for kind in ("table", "norms", "target_ranks"):
        ax = lens.figure(kind).axes[0]
        labels = [label for label in ax.get_xticklabels() if label.get_text()]
        assert len(labels) <= 30
        if kind != "norms":
            assert "of 500 tokens" in ax.get_xlabel()
    assert time.perf_counter() - start < 60
    ax = lens.figure("table").axes[0]
    words = lens.words()
    chosen = picking.columns(lens, "W_out", 7)
    texts = [text.get_text().rstrip("…") for text in ax.texts]
    expected = [words[at][pos][0].strip() for at in range(30) for pos in chosen]
    assert all(whole.startswith(part) for part, whole in zip(texts, expected, strict=True))
    assert sum(len(text) for text in texts) > 3 * len(texts)


def test_options_of_figures_and_of_save(lens, tmp_path):
    figure = lens.figure(
        "table", positions=[1, 3], layers=-1, title="mine", cmap="viridis", log=True, width=5.0
    )
    ax = figure.axes[0]
    assert texts_in(ax) == [lens.words()[-1][pos][0] for pos in (1, 3) if lens.words()[-1][pos]]
    assert ax.get_title() == "mine"
    assert figure.get_figwidth() == 5
    path = lens.save(tmp_path / "x.svg", positions="last", title="only the last")
    text = path.read_text(encoding="utf-8")
    assert "only the last" in text
    assert "t41" in text
    with pytest.raises(ValueError, match="takes no options"):
        lens.save(tmp_path / "x.html", log=True)


def test_outliers_and_scales():
    lens = fake_lens(words_alike(900), 6, 8, ("W_out",), silent=False)
    for gradient in lens.gradients.values():
        gradient.delta[0] *= 100
    norms = lens.norms().double()
    for kind in ("table", "norms"):
        figure = lens.figure(kind)
        assert "(up to" in figure.axes[1].get_ylabel()
        bar = figure.axes[1].get_ylim()
        assert bar == pytest.approx((0, limit(norms)))
        assert lens.figure(kind, vmax=3.0).axes[1].get_ylim()[1] == 3
        assert lens.figure(kind, log=True).axes[1].get_yscale() == "log"
    lines = lens.figure("table").axes[0].get_lines()
    assert len(lines) == int((norms > limit(norms)).sum())


def test_settings_of_matplotlib_are_kept(lens):
    with mpl.rc_context({"font.size": 20.0, "axes.grid": True, "text.color": "#eeeeee"}):
        for kind in ("table", "norms"):
            ax = lens.figure(kind).axes[0]
            assert not any(line.get_visible() for line in ax.get_xgridlines())
        assert lens.figure("norms").axes[0].yaxis.label.get_fontsize() == 14
        assert lens.figure("target_ranks").axes[0].get_lines()[-1].get_color() == "#eeeeee"
