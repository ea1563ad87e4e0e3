"""The harness: what it measures equals a slow loop; the model is as before; runs can be resumed."""

import json
import math
import time
from functools import partial

import numpy as np
import pytest
import torch

from bwlens.edit import WeightChange
from bwlens.evaluation import harness, measuring
from bwlens.evaluation.evaluation import COLUMNS
from bwlens.evaluation.harness import Harness, evaluate
from bwlens.evaluation.measuring import Options
from bwlens.evaluation.methods import methods_of
from bwlens.evaluation.table import Table1
from bwlens.gradient.low_rank import LowRankGradient
from tests.evaluation.made_up import (
    QUICK,
    assert_same_state,
    nudge,
    record,
    same,
    slow_answer,
    state,
)

# The harness.


def test_rows_equal_a_naive_loop(model):
    """A changed copy of the model for each record, one prompt and answer at a time."""
    records = [record(case_id=3), record(" t17 t18", " t9 t30", case_id=4)]
    rows = evaluate(model, nudge, records, **QUICK).rows
    assert list(rows.columns) == COLUMNS
    for asked, (_, row) in zip(records, rows.iterrows(), strict=True):
        copy = nudge(model, asked.edit).edited(model)
        new, true = asked.edit.target_new, asked.edit.target_true

        def ask(prompts, copy=copy, new=new, true=true):
            return [(*slow_answer(copy, p, new), *slow_answer(copy, p, true)) for p in prompts]

        (one,) = ask([asked.edit.text])
        assert row["ES"] == 100.0 * (one[2] > one[0])
        assert row["EM"] == pytest.approx(100 * (math.exp(-one[0]) - math.exp(-one[2])), abs=1e-3)
        assert row["efficacy"] == 100.0 * one[1]
        many = ask(asked.paraphrase_prompts)
        assert row["PS"] == np.mean([100.0 * (t > n) for n, _, t, _ in many])
        assert row["paraphrase"] == np.mean([100.0 * r for _, r, _, _ in many])
        many = ask(asked.neighborhood_prompts)
        assert row["NS"] == pytest.approx(np.mean([100.0 * (t < n) for n, _, t, _ in many]))
        gaps = [100 * (math.exp(-t) - math.exp(-n)) for n, _, t, _ in many]
        assert row["NM"] == pytest.approx(np.mean(gaps), abs=1e-3)
        assert row["neighbourhood"] == pytest.approx(np.mean([100.0 * r for *_, r in many]))
        many = ask(asked.attribute_prompts)
        assert row["AS"] == np.mean([100.0 * (t > n) for n, _, t, _ in many])
        assert (row["case_id"], row["method"], row["note"]) == (asked.case_id, "nudge", "nudged")
        assert row["norm"] == pytest.approx(nudge(model, asked.edit).norm())
        assert row["seconds"] > 0


def test_the_model_is_left_as_it_was(boot, monkeypatch):
    model = boot("gpt2")
    model.train()
    modes = [module.training for module in model.modules()]
    before, luck = state(model), torch.random.get_rng_state()
    found = evaluate(
        model, ["none", nudge], [record()], perplexity_text=["t5 t6 t7 t8 t9 t10 t11 t12 t13 t14"],
        generation_tokens=8, progress=False,
    )  # fmt: skip
    assert_same_state(model, before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), luck)
    assert all(p.grad is None for p in model.parameters())
    row = found["nudge"].rows.iloc[0]
    assert row[["GE", "perplexity", "greedy", "greedy_paraphrase"]].notna().all()
    assert found["none"].rows.iloc[0]["perplexity"] != row["perplexity"]
    assert math.isnan(found["none"].rows.iloc[0]["seconds"])

    def breaks(*args):
        raise ValueError("in the midst of it")

    monkeypatch.setattr(measuring, "answers_of", breaks)
    with pytest.raises(
        ValueError, match=r"nudge cannot run here.* each of the first 1 records.*midst"
    ):
        evaluate(model, nudge, [record()], **QUICK)
    assert_same_state(model, before)


def test_a_step_too_large_is_said(model):
    before = state(model)
    with pytest.raises(ValueError, match="take a smaller step"):
        evaluate(model, partial(nudge, scale=1e38), [record()], **QUICK)
    assert_same_state(model, before)


def test_bos_is_handed_on_to_methods_that_know_it(model):
    told = []

    def knows(model, edit, *, prepend_bos=None):
        told.append(prepend_bos)
        return WeightChange()

    for bos in (None, False, True):
        evaluate(model, {"knows": knows, "nudge": nudge}, [record()], prepend_bos=bos, **QUICK)
    assert told == [None, False, True]


def test_every_so_many_records(model):
    records = [record(case_id=i) for i in range(5)]
    rows = evaluate(
        model, "none", records, perplexity_text=["t5 t6 t7 t8 t9 t10 t11 t12 t13 t14"],
        generation_every=2, generation_tokens=6, perplexity_every=3, greedy_tokens=0,
        progress=False,
    ).rows  # fmt: skip
    assert rows["GE"].notna().tolist() == [True, False, True, False, True]
    assert rows["perplexity"].notna().tolist() == [True, False, False, True, False]
    assert rows["greedy"].isna().all()


def test_one_bad_record_does_not_stop_it(model):
    def fussy(model, edit):
        if edit.target_new == " t18":
            raise ValueError("not this one")
        return nudge(model, edit)

    records = [record(), record(" t18"), record()]
    found = evaluate(model, {"fussy": fussy, "none": None}, records, **QUICK)
    assert found.rows[["item", "method"]].to_numpy().tolist() == [
        [0, "fussy"], [0, "none"], [1, "none"], [2, "fussy"], [2, "none"],
    ]  # fmt: skip
    (failure,) = found.failures
    assert (failure.item, failure.message) == (1, "fussy: not this one")
    assert "1 failures" in repr(found)


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
@pytest.mark.usefixtures("small_parts")
def test_a_method_that_cannot_run_takes_itself_out(tmp_path, model, error):
    records = [record(case_id=i) for i in range(5)]
    calls = []

    def refuses(model, edit):
        calls.append(edit)
        raise error("no statistics [of this] model")

    methods = {"none": None, "refuses": refuses, "nudge": nudge}
    expected = evaluate(model, {"none": None, "nudge": nudge}, records, **QUICK).rows
    alone = evaluate(model, methods, records, **QUICK)
    same(alone.rows, expected)
    (note,) = alone.notes
    assert note.startswith("refuses cannot run here and is left out")
    assert note.endswith(": no statistics [of this] model")
    assert [f.item for f in alone.failures] == [-1]
    table = Table1(alone)
    for text in (" ".join(table.text().split()), table._repr_html_(), table.latex()):
        assert note in text
    assert "edits failed" not in table.text()
    assert len(calls) == (1 if error is NotImplementedError else 5)
    # On disk: carried on, it is not tried again.
    out = tmp_path / "run"
    assert evaluate(model, methods, records, out=out, **QUICK).failures == alone.failures
    (out / "done" / "part-00000.json").unlink()
    calls.clear()
    again = evaluate(model, methods, records, out=out, **QUICK)
    same(again.rows, expected)
    assert (again.failures, calls) == (alone.failures, [])
    with pytest.raises(ValueError, match="refuses cannot run here"):
        evaluate(model, {"refuses": refuses}, records, **QUICK)
    work = Harness(model, methods_of(methods), records, options=Options(0, 8))
    assert work.estimate() > 0
    same(work.run(progress=False).rows.iloc[:2], expected.iloc[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_every": -1}, "expected 0 .never. or more"),
        ({"top_k": 0}, "expected 1 or more"),
        ({"speed": 3}, "unknown option 'speed'; there are generation_every"),
    ],
)
def test_options_that_cannot_be(model, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, "none", [record()], progress=False, **options)


def test_nothing_to_do_and_wrong_things(model):
    with pytest.raises(ValueError, match="no records given"):
        evaluate(model, "none", [], **QUICK)
    with pytest.raises(TypeError, match="wrong returned int; an editing method computes"):
        evaluate(model, {"wrong": lambda model, edit: 3}, [record()], **QUICK)


def test_random_methods_draw_the_same_for_a_record(model):
    def random(model, edit):
        return WeightChange({("W_out", 0): LowRankGradient(torch.rand(1, 64), torch.rand(1, 16))})

    records = [record(case_id=i) for i in range(2)]
    one = evaluate(model, random, records, **QUICK).rows
    two = evaluate(model, ["none", random], records, **QUICK)["random"].rows
    assert one["norm"].tolist() == two["norm"].tolist()
    assert one["norm"][0] != one["norm"][1]


def test_an_estimate(model):
    records = [record(case_id=i) for i in range(6)]
    work = Harness(model, methods_of(["none", nudge]), records, options=Options(5, 8))
    seconds = work.estimate()
    start = time.perf_counter()
    work.run(progress=False)
    assert seconds == pytest.approx(time.perf_counter() - start, rel=3)
    assert seconds > 0


# On disk.


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(harness, "PART_ROWS", 2)


@pytest.mark.usefixtures("small_parts")
def test_parts_on_disk_hold_the_same_rows(tmp_path, model):
    records = [record(case_id=i) for i in range(5)]
    methods = {"none": None, "nudge": nudge}
    whole = evaluate(model, methods, records, **QUICK)
    out = tmp_path / "run"
    same(whole.rows, evaluate(model, methods, records, out=out, **QUICK).rows)
    done = out / "done"
    assert len(list(done.glob("part-*"))) == 5  # two rows each, one of each method
    # A part without its mark is done again; nothing else is.
    (done / "part-00001.json").unlink()
    stale = {path.name: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    same(whole.rows, evaluate(model, methods, records, out=out, **QUICK).rows)
    fresh = {path.name: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    assert [name for name in fresh if fresh[name] != stale[name]] == ["part-00001.parquet"]
    meta = json.loads((out / "run.json").read_text())
    assert list(meta["settings"]["methods"]) == ["none", "nudge"]
    for changed in (
        {"methods": methods | {"nudge": partial(nudge, scale=2.0)}},
        {"records": [*records[:4], record(" t18", case_id=4)]},
        {"seed": 1},
    ):
        asked = {"methods": methods, "records": records, **QUICK, **changed}
        with pytest.raises(ValueError, match="other settings"):
            evaluate(model, out=out, **asked)


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_run_is_carried_on(tmp_path, model):
    records = [record(case_id=i) for i in range(5)]
    calls = []

    def dies(model, edit):
        calls.append(edit)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return nudge(model, edit)

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, dies, records, out=tmp_path / "run", **QUICK)
    found = evaluate(model, dies, records, out=tmp_path / "run", **QUICK)
    assert len(calls) == 4 + 3
    whole = evaluate(model, {"dies": nudge}, records, **QUICK)
    same(whole.rows, found.rows)


@pytest.mark.usefixtures("small_parts")
def test_processes_share_a_run(tmp_path, model, monkeypatch):
    records = [record(case_id=i) for i in range(5)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        found.append(evaluate(model, nudge, records, out=tmp_path / "run", **QUICK).rows)
    assert [len(rows) for rows in found] == [2, 5]
    monkeypatch.delenv("WORLD_SIZE")
    same(found[1], evaluate(model, nudge, records, **QUICK).rows)
