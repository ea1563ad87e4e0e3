"""What an evaluation says: summaries, intervals, comparisons."""

import math

import numpy as np
import pandas as pd
import pytest

from bwlens.data.prose import read_prose
from bwlens.data.records import Records, read_records
from bwlens.evaluation import metrics
from bwlens.evaluation.evaluation import COLUMNS, MEASURED, Evaluation
from bwlens.evaluation.harness import evaluate
from tests.evaluation.made_up import QUICK, nudge, record, same

# What was found.


def made_up(**columns):
    n = len(next(iter(columns.values())))
    rows = pd.DataFrame({name: [math.nan] * n for name in MEASURED})
    rows["item"] = rows["case_id"] = range(n)
    rows["method"], rows["note"], rows["relation"], rows["norm"] = "made-up", "", "", 0.0
    for name, values in columns.items():
        rows[name] = values
    return Evaluation(rows[COLUMNS], (), n)


def test_summary():
    found = made_up(ES=[100.0, 0.0], PS=[50.0, 50.0], NS=[100.0, 100.0], GE=[3.0, math.nan])
    table = found.summary.set_index("metric")
    assert table.loc["S", "mean"] == pytest.approx(metrics.score(50.0, 50.0, 100.0))
    assert table.loc["ES", ["mean", "low", "high", "n"]].tolist() == [50.0, 0.0, 100.0, 2]
    assert table.loc["ES", "sd"] == pytest.approx(np.std([100, 0], ddof=1))
    assert table.loc["PS", ["mean", "sd", "low", "high"]].tolist() == [50.0, 0.0, 50.0, 50.0]
    assert table.loc["GE", ["mean", "n"]].tolist() == [3.0, 1]
    assert "perplexity" not in table.index
    assert set(table["method"]) == {"made-up"}
    assert "made-up" in found._repr_html_()


def test_intervals_agree_with_a_loop_of_resamples():
    rng = np.random.default_rng(5)
    values = {name: rng.choice([0.0, 50.0, 100.0], 60, p=[0.2, 0.3, 0.5]) for name in ("ES", "PS")}
    values["NS"] = rng.uniform(40, 100, 60)
    found = made_up(**values).summary.set_index("metric")
    scores = []
    for _ in range(3000):
        drawn = rng.integers(0, 60, 60)
        scores.append(metrics.score(*(float(values[n][drawn].mean()) for n in ("ES", "PS", "NS"))))
    low, high = np.quantile(scores, (0.025, 0.975))
    assert found.loc["S", "low"] == pytest.approx(low, abs=1.5)
    assert found.loc["S", "high"] == pytest.approx(high, abs=1.5)


def test_compare_takes_pairs():
    a = made_up(ES=[100.0, 100.0, 0.0], PS=[90.0, 60.0, 30.0], NS=[80.0] * 3)
    b = made_up(ES=[100.0, 0.0, 0.0], PS=[80.0, 50.0, 20.0], NS=[80.0, 80.0, math.nan])
    table = a.compare(b).set_index("metric")
    # Each pair differs by 10, so there is no doubt about it however the records are drawn.
    assert table.loc["PS", ["difference", "low", "high"]].tolist() == pytest.approx([10.0] * 3)
    assert table.loc["ES", "difference"] == pytest.approx(100 / 3)
    assert table.loc["ES", ["low", "high", "n"]].tolist() == pytest.approx([0.0, 100.0, 3])
    assert table.loc["NS", ["difference", "n"]].tolist() == [0.0, 2]
    both = metrics.score(100.0, 75.0, 80.0) - metrics.score(50.0, 65.0, 80.0)
    assert table.loc["S", ["difference", "n"]].tolist() == pytest.approx([both, 2])
    back = b.compare(a).set_index("metric")
    assert back.loc["PS", "difference"] == pytest.approx(-10.0)


def test_compare_wants_one_method_and_the_same_records(model):
    records = [record(case_id=i) for i in range(2)]
    found = evaluate(model, ["none", nudge], records, **QUICK)
    with pytest.raises(ValueError, match="expected one method on each side, found none, nudge"):
        found.compare(found)
    assert len(found["nudge"].compare(found["none"]))
    with pytest.raises(KeyError, match="'rome' was not evaluated"):
        found["rome"]
    other = evaluate(model, nudge, [record(case_id=7)], **QUICK)
    with pytest.raises(ValueError, match="not of the same records"):
        found["none"].compare(other)


def test_the_demo_as_it_is(demo):
    records = read_records("demo").sample(4)
    assert isinstance(records, Records)
    few = read_prose("demo")[:10]
    found = evaluate(
        demo, "none", records, perplexity_text=few, generation_tokens=12, progress=False
    )
    table = found.summary.set_index("metric")["mean"]
    # It knows its facts, and does not say the new answers.
    assert table["ES"] == 0
    assert table["NS"] == 100
    assert table["efficacy"] == 0
    assert table["neighbourhood"] == 100
    assert table["greedy"] == 0
    assert 20 < table["perplexity"] < 500
    assert table["GE"] > 0


def test_evaluations_made_apart_stand_beside_each_other(model):
    records = [record(case_id=i) for i in range(3)]
    both = evaluate(model, {"none": None, "nudge": nudge}, records, **QUICK)
    apart = [
        evaluate(model, {"none": None}, records, **QUICK),
        evaluate(model, {"nudge": nudge}, records, **QUICK),
    ]
    joined = Evaluation.joined(apart)
    order = ["method", "item"]
    same(
        joined.rows.sort_values(order, ignore_index=True),
        both.rows.sort_values(order, ignore_index=True),
    )
    assert joined.methods == ["none", "nudge"]
    assert joined.n_records == 3
    with pytest.raises(ValueError, match="'none' is in two"):
        Evaluation.joined([*apart, apart[0]])
    others = evaluate(model, {"other": nudge}, [record(case_id=7)] * 3, **QUICK)
    with pytest.raises(ValueError, match="not of the same records"):
        Evaluation.joined([*apart, others])
