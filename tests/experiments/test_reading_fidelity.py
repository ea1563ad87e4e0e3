"""Reading fidelity: each column against a slow loop, its controls, and a sweep that resumes."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import bwlens
from bwlens import Edit
from bwlens.data.records import Record
from bwlens.experiments import ReadingFidelity, reading_fidelity, sweep
from bwlens.gradient.objectives import NLL
from bwlens.model.head import head_of
from bwlens.reading.effect import EffectOf
from bwlens.reading.standardised import dual_head
from tests.reading.test_readings import scores_of
from tests.reading.test_trust import pearson

EDITS = [
    Edit("{} t5 t9", "t30 t41", " t17", " t33"),
    Edit("{} t5 t9", "t31 t44", " t19", " t34"),
    Edit("t6 t9 {}", "t30 t44", " t21", " t17"),
]


@pytest.fixture(scope="module")
def result(bridge):
    model = bridge("llama")
    return model, reading_fidelity(model, EDITS, progress=False)


def test_every_column_against_a_slow_loop(result):
    model, found = result
    for item, edit in enumerate(EDITS):
        objective = NLL(edit.target_new)
        rows = found.rows[found.rows["item"] == item]
        grads = bwlens.capture(model, edit.text, objective, "W_out")
        pos, target = int(grads.batch.last[0]), grads.batch.targets[0][0]
        task = EffectOf(model, grads, objective)
        for layer in (0, 2):
            delta = grads["W_out", layer].delta[pos]
            effect = task.of([(bwlens.Site("W_out", layer), pos)]).scores[0]
            p = task.probabilities
            said = {
                "plain": -scores_of(head_of(model), delta[None])[0],
                "dual^0.05": -scores_of(dual_head(head_of(model)), delta[None])[0] * p**0.05,
                "effect": effect,
                "effect^0.2": effect * p**0.2,
            }
            for name, scores in said.items():
                row = rows[(rows["reading"] == name) & (rows["layer"] == layer)]
                assert float(row["r"].iloc[0]) == pytest.approx(pearson(scores, effect), abs=0.01)
                order = sorted(range(len(scores)), key=lambda i, s=scores: -float(s[i]))
                place = order.index(target) + 1
                assert abs(float(row["place"].iloc[0]) - place) <= 1  # words a rounding apart
                if place not in (10, 11):
                    assert float(row["in_ten"].iloc[0]) == (place <= 10)


def test_controls_are_there_and_differ(result):
    _, found = result
    rows = found.rows
    for column in ("r", "r_plausible", "in_ten", "place"):
        for whose in ("_random", "_other"):
            assert rows[column + whose].notna().all()
    plain = rows[rows["reading"] == "plain"]
    assert not plain["place_random"].equals(plain["place"])
    assert not plain["place_other"].equals(plain["place"])


def test_another_word_of_the_same_relation():
    from bwlens.experiments._reading_fidelity import _objects

    records = [
        Record(0, Edit("{} speaks", "A", " Dutch", " Greek"), "P1"),
        Record(1, Edit("{} says", "B", " Irish", " Welsh"), "P1"),
        Record(2, Edit("{} in", "C", " Rome", " Oslo"), "P2"),
    ]
    assert _objects(records) == ((" Dutch", " Greek", " Irish", " Welsh"), (" Oslo", " Rome"))
    assert _objects(records[0].edit) == ((" Dutch", " Greek"),)


def test_the_other_word_is_neither_answer(result):
    """The group is t17, t19, t33, t34: of the first edit, neither t17 nor t33."""
    _, found = result
    first = found.rows.query("item == 0 and reading == 'effect'")
    third = found.rows.query("item == 2 and reading == 'effect'")
    assert first["place_object"].notna().all()
    assert (first["place_object"] != first["place"]).all()
    assert third["place_object"].isna().all()  # its relation has but its own two words


def test_the_summary_and_the_figure(result):
    _, found = result
    summary = found.summary
    assert {"in_ten", "r_plausible_other", "median_place"} <= set(summary["quantity"])
    held = found.rows.query("reading == 'dual' and layer == 1")
    row = summary.query("reading == 'dual' and layer == 1 and quantity == 'median_place'")
    assert float(row["mean"].iloc[0]) == held["place"].median()
    assert (summary["low"] <= summary["mean"]).all()
    assert (summary["mean"] <= summary["high"]).all()
    assert len(found.figure().axes) >= 7


def test_a_sweep_gives_the_same_rows_and_resumes(result, tmp_path):
    model, found = result
    swept = sweep("reading_fidelity", model, EDITS, tmp_path, progress=False)
    rows = swept["reading_fidelity"].rows
    pd.testing.assert_frame_equal(rows.astype({"reading": "str"}), found.rows, check_exact=True)
    assert (tmp_path / "reading_fidelity.csv").exists()
    again = sweep("reading_fidelity", model, EDITS, tmp_path, progress=False)
    pd.testing.assert_frame_equal(again["reading_fidelity"].rows, rows, check_exact=True)


def test_what_is_refused(result):
    model, _ = result
    for name in ("loud", "effect^2", "effect^x"):
        with pytest.raises(ValueError, match=f"no reading '{name.replace('^', '.')}'; there are"):
            reading_fidelity(model, EDITS, readings=name)
    only = reading_fidelity(model, EDITS[:1], readings="plain", layers=-1, progress=False)
    assert set(only.rows["layer"]) == {2}
    assert torch.isfinite(torch.tensor(only.rows["r_other"].to_numpy())).all()


def test_a_mixture_is_refused(bridge):
    with pytest.raises(NotImplementedError, match="mixture of experts"):
        ReadingFidelity().wanted(bridge("mixtral"))
