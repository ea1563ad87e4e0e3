"""The records a model knows are those that its own answers say, asked in a few passes."""

from dataclasses import replace

import pytest

import bwlens
from bwlens.data.records import Record, Records, read_records
from bwlens.evaluation import known_records
from bwlens.model.prompts import Edit
from tests.evaluation.made_up import QUICK, record, slow_answer, tokens_read


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_known_are_those_whose_true_answer_is_more_probable(bridge, name):
    model = bridge(name)
    answers = (" t17", " t18 t19", " t9 t30 t31", " t17 t18")
    records = [
        replace(record(new, true, case_id=i), edit=Edit(f"t{20 + i} {{}} t21", "t5 t6", new, true))
        for i, (new, true) in enumerate((a, b) for a in answers for b in answers if a != b)
    ]
    expected = [
        one.case_id
        for one in records
        if slow_answer(model, one.edit.text, one.edit.target_true)[0]
        < slow_answer(model, one.edit.text, one.edit.target_new)[0]
    ]
    assert 0 < len(expected) < len(records)
    with tokens_read(model) as read:
        known = known_records(model, records, progress=False)
    assert [one.case_id for one in known] == expected
    assert len(read) == 1
    assert list(known) == [records[i] for i in expected]
    assert known_records(model, records, batch_tokens=11, progress=False) == known
    rows = bwlens.evaluate(model, "none", records, **QUICK).rows
    assert rows.loc[rows["ES"] == 0, "case_id"].tolist() == expected


def test_the_demo_knows_its_facts_and_no_others(demo):
    records = read_records("demo").sample(12)
    known = known_records(demo, records, progress=False)
    assert list(known) == list(records)
    assert known.source == "demo"
    swapped = [
        replace(
            r, edit=replace(r.edit, target_new=r.edit.target_true, target_true=r.edit.target_new)
        )
        for r in records
    ]
    assert len(known_records(demo, [*swapped, *records[:2]], progress=False)) == 2
    assert len(known_records(demo, swapped, progress=False)) == 0


def test_what_cannot_be_asked_is_a_problem(bridge):
    model = bridge("gpt2")
    long = Record(5, Edit("{} t9", " ".join(["t7"] * 70), " t17", " t18"))
    open_one = Record(6, Edit("{} t9", "t7", " t17"))
    found = known_records(model, [long, record(), record(" t9", " t17"), open_one], progress=False)
    assert isinstance(found, Records)
    assert len(found) == 1
    assert [one.index for one in found.problems] == [0, 3]
    assert "context holds 64" in str(found.problems[0])
    assert "target_true is missing" in str(found.problems[1])
    with pytest.raises(ValueError, match=r"none of the records can be asked: .*target_true"):
        known_records(model, [open_one], progress=False)
