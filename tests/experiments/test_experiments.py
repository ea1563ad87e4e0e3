"""Ranks, norms, target ranks and cosines, against loops over prompts and positions.

The oracles capture each prompt by itself, read each vector by itself, and know nothing of batches.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import bwlens
from bwlens import Edit, Site, experiments
from bwlens.experiments import (
    EXPERIMENTS,
    gradient_rank,
    layer_cosine,
    segment_norms,
    target_rank,
)
from bwlens.gradient.objectives import NLL
from bwlens.gradient.probe import UntrueGradientError
from bwlens.lens.rows import READ_THROUGH
from bwlens.model.segments import segment_names
from bwlens.reading.effect import EffectOf, Effects
from bwlens.runs.intervals import mean_ci
from tests import tiny

EDITS = [
    Edit("t7 {} t9", "t5 t6 t44", " t20"),
    Edit("{} t30 t31 t32", "t8", " t21 t22"),  # a target of two tokens, one of them forced
    Edit("t11 t12 {}", "t5 t33", " t40"),  # the subject at the end
    Edit("t7 t7 {} t7 t7", "t7", " t20"),
]
NAMES = ["gpt2", "llama", "gemma2"]


def alone(model, edit, bos, matrices=("W_in", "W_out")):
    """One prompt's gradients, and its segments."""
    grads = bwlens.capture(model, edit.text, NLL(edit.target_new), matrices, prepend_bos=bos)
    n_target = int(grads.batch.lengths[0] - grads.batch.prompt_lengths[0])
    return grads, segment_names(model, edit, bos, n_target)


def close(found, expected):
    """Single precision, and positions that are nothing but rounding."""
    return found == pytest.approx(expected, rel=2e-4, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_rank(name, bos, bridge):
    model = bridge(name)
    result = gradient_rank(model, EDITS, prepend_bos=bos, progress=False)
    assert len(result.rows) == len(EDITS) * 2 * tiny.LAYERS
    for item, edit in enumerate(EDITS):
        grads, _ = alone(model, edit, bos)
        for row in result.rows[result.rows["item"] == item].to_dict("records"):
            gradient = grads[row["matrix"], row["layer"]]
            assert row["n"] == gradient.n
            assert row["rank"] == gradient.rank()
            silent = [not d.any() for d in gradient.delta]
            assert row["active"] == gradient.n - sum(silent)
            assert close(row["effective_rank"], float(gradient.effective_rank()))
            values = gradient.singular_values()
            assert len(row["spectrum"]) == row["rank"]
            for found, value in zip(row["spectrum"], values, strict=False):
                assert found == pytest.approx(float(value / values[0]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_layer_has_as_many_directions_as_target_tokens(name, bridge):
    rows = gradient_rank(bridge(name), EDITS, layers=[-1], progress=False).rows
    assert set(rows["layer"]) == {tiny.LAYERS - 1}
    for row in rows.to_dict("records"):
        assert row["rank"] == (2 if row["item"] == 1 else 1)


def test_a_repeated_token_without_positions_spans_no_more(bridge):
    """W_in of layer 0 in a model that sees no position: t7 four times gives one x, not four.

    Rotary positions turn queries and keys alone, and attention to equal tokens gives equal values.
    """
    result = gradient_rank(
        bridge("llama"), [Edit("t7 {} t7", "t7 t7", " t20")], layers=[0], prepend_bos=False,
        progress=False,
    )  # fmt: skip
    ranks = result.rows.set_index("matrix")["rank"]
    assert result.rows["n"].tolist() == [4, 4]
    assert ranks["W_in"] == 1
    shortfall = result.summary.query("quantity == 'shortfall' and matrix == 'W_in'")
    assert shortfall["mean"].item() == 3.0
    full = result.summary.query("quantity == 'full' and matrix == 'W_in'")
    assert full["mean"].item() == 0.0


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_segment_norms(name, bos, bridge):
    model = bridge(name)
    rows = segment_norms(model, EDITS, prepend_bos=bos, progress=False).rows
    matrices = bwlens.model.sites.available_matrices(model)
    expected = {}
    for item, edit in enumerate(EDITS):
        grads, names = alone(model, edit, bos, matrices)
        for site, gradient in grads.items():
            lengths = [rows.norm(dim=1).tolist() for rows in (gradient.delta, gradient.x)]
            for segment in set(names):
                at = [i for i, other in enumerate(names) if other == segment]
                means = (float(np.mean([norms[i] for i in at])) for norms in lengths)
                expected[item, site.matrix, site.layer, segment] = (len(at), *means)
    assert len(rows) == len(expected)
    for row in rows.to_dict("records"):
        tokens, delta, x = expected[row["item"], row["matrix"], row["layer"], row["segment"]]
        assert row["tokens"] == tokens
        assert close(row["delta"], delta)
        assert close(row["x"], x)
    assert ("bos" in set(rows["segment"])) == bos


def slow_ranks(model, vector, tokens):
    """How many tokens score strictly higher than each, by the model's own modules."""
    with torch.no_grad():
        logits = model.unembed(model.ln_final(vector[None, None]))[0, 0]
    return [int((logits > logits[token]).sum()) for token in tokens]


def mean_of(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_target_rank(name, bos, bridge):
    model = bridge(name)
    singly = [alone(model, edit, bos) for edit in EDITS]
    for normalize in (False, True):
        rows = target_rank(model, EDITS, normalize=normalize, prepend_bos=bos, progress=False).rows
        expected = {}
        for item, (grads, names) in enumerate(singly):
            target, answer = grads.batch.targets[0][0], int(grads.next_logits[0].argmax())
            for site, gradient in grads.items():
                found = {}
                vectors = getattr(gradient, READ_THROUGH[site.matrix])
                for segment, vector in zip(names, vectors, strict=True):
                    vector = vector / vector.norm() if normalize and vector.any() else vector
                    silent = not vector.any()
                    ranks = (
                        [math.nan] * 2 if silent else slow_ranks(model, vector, (target, answer))
                    )
                    found.setdefault(segment, []).append((*ranks, silent))
                for segment, values in found.items():
                    columns = zip(*values, strict=True)
                    means = [mean_of(v for v in column if not math.isnan(v)) for column in columns]
                    expected[item, site.matrix, site.layer, segment] = means
        assert len(rows) == len(expected)
        for row in rows.to_dict("records"):
            key = row["item"], row["matrix"], row["layer"], row["segment"]
            named = [row["target_rank"], row["answer_rank"], row["silent"]]
            # Rounding may swap two neighbouring words.
            np.testing.assert_allclose(named, expected[key], atol=1.01, err_msg=str(key))


def test_the_target_is_the_least_probable_word_at_the_top_of_the_model(bridge):
    """delta just below the unembedding: only the target's coefficient is negative (section 1)."""
    rows = target_rank(
        bridge("gpt2"), EDITS, matrices=["W_out"], normalize=True, progress=False
    ).rows
    last = rows[(rows["layer"] == tiny.LAYERS - 1) & (rows["segment"] == "last")]
    assert last["target_rank"].tolist() == [tiny.VOCAB - 1] * len(EDITS)
    assert last["bottom_share"].tolist() == [1] * len(EDITS)
    assert (last["top_share"] == 0).all()
    assert (last["silent"] == 0).all()
    others = rows[(rows["layer"] == tiny.LAYERS - 1) & (rows["segment"] == "before")]
    assert (others["silent"] == 1).all()
    assert others["target_rank"].isna().all()


@pytest.mark.parametrize(("reading", "temper"), [("dual", 0.0), ("effect", 0.0), ("effect", 0.5)])
def test_target_rank_as_a_lens_has_it(reading, temper, bridge):
    """By the other readings: the ranks that a lens of each prompt shows, cell by cell."""
    model = bridge("llama")
    matrices = ["W_out", "W_in"] if reading == "effect" else ["W_out"]
    options = {"reading": reading, "temper": temper, "matrices": matrices, "prepend_bos": False}
    rows = target_rank(model, EDITS, **options, progress=False).rows
    off = []
    for item, edit in enumerate(EDITS):
        lens = bwlens.backward_lens(model, edit, **options)
        names = np.array(segment_names(model, edit, False, lens.norms().shape[1] - lens.n_prompt))
        for row in rows[rows["item"] == item].to_dict("records"):
            here = names == row["segment"]
            for ranks, word in ((lens.target_ranks, "target"), (lens.answer_ranks, "answer")):
                held = ranks(row["matrix"])[row["layer"]].numpy()[here].astype(float)
                held = held[held >= 0]
                assert row["silent"] == 1 - len(held) / here.sum()
                assert row["unmeasured"] == 0
                if not len(held):
                    assert math.isnan(row[f"{word}_rank"])
                    continue
                off.append(abs(row[f"{word}_rank"] - held.mean()))
                if not {*range(6, 14), *range(tiny.VOCAB - 14, tiny.VOCAB - 6)} & {*held}:
                    assert row[f"{word}_top_ten"] == (held < 10).mean()
                    assert row[f"{word}_bottom_ten"] == (held >= tiny.VOCAB - 10).mean()
    # Rounding, and the sizes of the steps, may swap neighbouring words.
    assert max(off) <= (3 if reading == "effect" else 1)
    assert np.mean(off) < 0.3


def test_x_is_read_plainly_whatever_reads_delta(bridge):
    ranks = [
        target_rank(bridge("llama"), EDITS, matrices="W_in", reading=reading, progress=False).rows
        for reading in ("plain", "cosine")
    ]
    assert ranks[0].equals(ranks[1])


@pytest.mark.parametrize("measured", [True, False])
def test_a_cell_without_a_linear_step_stops_no_other(measured, bridge, monkeypatch):
    """Where steps of the usual size are refused, others are tried, and what none shows is said."""
    options = {"matrices": "W_out", "reading": "effect", "segments": "last", "progress": False}
    usual = target_rank(bridge("llama"), EDITS, **options).rows

    def refused(*_):
        raise UntrueGradientError("a step was to lower the loss by 0.0008 nats")

    monkeypatch.setattr("bwlens.experiments.base.true_effects", refused)
    if not measured:
        monkeypatch.setattr(Effects, "measured", property(lambda e: e.fall < 0))
    rows = target_rank(bridge("llama"), EDITS, **options).rows
    assert (rows["unmeasured"] == (0 if measured else 1)).all()
    assert (rows["silent"] == 0).all()
    if measured:
        np.testing.assert_allclose(rows["target_rank"], usual["target_rank"], atol=3)
    else:
        assert rows[["target_rank", "answer_top_ten"]].isna().all(axis=None)


@pytest.mark.parametrize("reading", ["plain", "effect"])
def test_target_rank_of_some_segments(reading, bridge):
    model, options = bridge("gpt2"), {"reading": reading, "progress": False}
    every = target_rank(model, EDITS, **options).rows
    some = target_rank(model, EDITS, segments=["last", "before"], **options).rows
    kept = every[every["segment"].isin(["last", "before"])].reset_index(drop=True)
    assert 0 < len(some) < len(every)
    pd.testing.assert_frame_equal(some, kept, rtol=1e-3, atol=1.01)
    one = target_rank(model, EDITS, segments="last", **options).rows
    assert set(one["segment"]) == {"last"}


def test_layer_cosine_of_effects(bridge):
    model = bridge("llama")
    rows = layer_cosine(model, EDITS, reading="effect", prepend_bos=False, progress=False).rows
    assert len(rows) == len(EDITS) * tiny.LAYERS * (tiny.LAYERS - 1) / 2
    for item, edit in enumerate(EDITS):
        grads, names = alone(model, edit, False)
        task = EffectOf(model, grads, NLL(edit.target_new))
        cells = [(Site("W_out", layer), names.index("last")) for layer in range(tiny.LAYERS)]
        expected = np.corrcoef(task.of(cells).scores.numpy())
        for row in rows[rows["item"] == item].to_dict("records"):
            value = expected[row["layer"], row["other"]]
            assert row["cosine"] == pytest.approx(value, abs=0.01)


def test_readings_that_an_experiment_does_not_take(bridge):
    model = bridge("gpt2")
    for options, message in (
        ({"reading": "loud"}, "reading is 'loud'; there are"),
        ({"reading": "transported"}, "here plain, dual, cosine or effect"),
        ({"temper": 0.1}, "goes with reading='effect'"),
        ({"reading": "dual", "normalize": True}, "normalize goes with reading='plain'"),
        ({"segments": "first"}, "no segment 'first'; expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            target_rank(model, EDITS, **options)
    with pytest.raises(ValueError, match="here there are plain and effect"):
        layer_cosine(model, EDITS, reading="dual")
    for experiment in (target_rank, layer_cosine):
        with pytest.raises(NotImplementedError, match="W_out is a mixture"):
            experiment(bridge("mixtral"), EDITS, matrices="W_out", reading="effect")


@pytest.mark.parametrize("segment", ["last", "first subject"])
@pytest.mark.parametrize("name", NAMES)
def test_layer_cosine(name, segment, bridge):
    model = bridge(name)
    rows = layer_cosine(
        model, EDITS, matrices=["W_out", "W_in"], segment=segment, prepend_bos=False, progress=False
    ).rows
    expected = {}
    for item, edit in enumerate(EDITS):
        grads, names = alone(model, edit, False)
        if segment not in names:
            continue
        at = names.index(segment)
        for matrix in ("W_out", "W_in"):
            for low in range(tiny.LAYERS):
                for high in range(low + 1, tiny.LAYERS):
                    a, b = (grads[Site(matrix, one)].delta[at].double() for one in (low, high))
                    size = float(a.norm() * b.norm())
                    cosine = float(a @ b) / size if size else math.nan
                    expected[item, matrix, low, high] = cosine
    assert len(rows) == len(expected) > 0
    for row in rows.to_dict("records"):
        value = expected[row["item"], row["matrix"], row["layer"], row["other"]]
        assert row["cosine"] == pytest.approx(value, abs=1e-4, nan_ok=True)
    if segment == "first subject":  # zero deltas in the last layer have no direction
        assert rows[rows["other"] == tiny.LAYERS - 1]["cosine"].isna().all()


def test_an_infinite_value_has_no_interval():
    """As a relative error where the prediction is zero; the other groups keep theirs."""
    found = mean_ci(np.array([[math.inf, 1.0], [1.0, 2.0], [2.0, 6.0]]))
    assert found.mean.tolist() == [math.inf, 3.0]
    assert found.low[0] == found.high[0] == math.inf
    assert 1.0 <= found.low[1] < 3.0 < found.high[1] <= 6.0


def test_pairs_without_a_cosine_stay_blank(bridge):
    found = layer_cosine(bridge("gpt2"), EDITS[:1], segment="last", progress=False)
    held = found.summary.query("other < 2")  # as where the last layer's deltas are zero
    (image,) = found.experiment.draw(pd.concat([held, found.summary.tail(1)])).axes[0].images
    values = image.get_array().filled(math.nan)
    assert np.isnan(values[0, 2])
    assert np.isnan(values[2, 0])
    assert (np.diag(values) == 1).all()
    assert np.isfinite(values).sum() == 7


def test_no_such_segment(bridge):
    with pytest.raises(ValueError, match="no segment 'first'"):
        layer_cosine(bridge("gpt2"), EDITS, segment="first")


SHORT = [gradient_rank, segment_norms, target_rank, layer_cosine]


@pytest.mark.parametrize("experiment", SHORT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_batch_as_one_by_one(experiment, name, bridge):
    model = bridge(name)
    together = experiment(model, EDITS, progress=False).rows
    singly = [experiment(model, [edit], progress=False).rows for edit in EDITS]
    alone = pd.concat([rows.assign(item=item) for item, rows in enumerate(singly)])
    keys = [c for c in ("item", "matrix", "layer", "other", "segment") if c in together]
    values = [c for c in together if c not in (*keys, "spectrum", "expert")]
    a, b = (rows.set_index(keys).sort_index()[values].astype(float) for rows in (together, alone))
    atol = 1.01 if experiment is target_rank else 1e-5
    pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("experiment", SHORT, ids=lambda f: f.__name__)
def test_mixtures_do_not_crash(experiment, bridge):
    """W_in and W_out of a mixture are its experts', each with the tokens it was sent."""
    result = experiment(bridge("mixtral"), EDITS, progress=False)
    if experiment is layer_cosine:  # experts of different layers are not compared
        assert len(result.rows) == 0
        assert "0 prompts" in result._repr_html_()
        with pytest.raises(ValueError, match="no rows"):
            _ = result.summary
        return
    assert set(result.rows["expert"]) - {-1} <= set(range(4))
    assert len(set(result.rows["expert"])) >= 4
    assert len(result.summary) > 0
    assert len(result.figure().axes) > 0


@pytest.mark.parametrize("experiment", SHORT, ids=lambda f: f.__name__)
def test_results_show_themselves(experiment, bridge):
    result = experiment(bridge("gpt2"), EDITS, progress=False)
    assert f"{len(EDITS)} prompts" in repr(result)
    assert {"quantity", "mean", "low", "high", "n"} <= set(result.summary)
    assert (result.summary["n"] <= len(EDITS)).all()
    assert "<img" in result._repr_html_()
    assert EXPERIMENTS[result.experiment.name] is type(result.experiment)


def test_memory_is_no_matter(bridge):
    """One prompt at a time or all together: the same rows in the same order."""
    model = bridge("gpt2")
    much = segment_norms(model, EDITS, progress=False).rows
    little = segment_norms(model, EDITS, max_memory=1, progress=False).rows
    keys = ["item", "matrix", "layer", "segment"]
    a, b = (rows.sort_values(keys, ignore_index=True) for rows in (much, little))
    pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-6)
    assert much["item"].is_monotonic_increasing


@pytest.mark.usefixtures("unchecked")
def test_one_layer_one_matrix_one_record(bridge):
    from bwlens.data.records import Record

    model = bridge("llama")
    edit = bwlens.Edit("{} t30 t41", subject="t5 t9", target_new="t17")
    options = {"prepend_bos": False, "progress": False}
    one = experiments.segment_norms(model, edit, matrices="W_out", layers=-1, **options)
    several = experiments.segment_norms(
        model, [Record(0, edit)], matrices=["W_out"], layers=slice(2, 3), **options
    )
    assert one.experiment.settings == {"layers": [2], "matrices": ["W_out"]}
    assert one.rows.equals(several.rows)
    with pytest.raises(ValueError, match="layer 3 asked for"):
        experiments.gradient_rank(model, edit, layers=3)
    with pytest.raises(ValueError, match="matrices must be among"):
        experiments.gradient_rank(model, edit, matrices=["W_out", "W_up"])
    with pytest.raises(TypeError):
        experiments.gradient_rank(model, [edit, 5])
