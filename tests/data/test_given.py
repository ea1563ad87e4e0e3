"""Records where edits are meant, edits where records are, and no records at all."""

from dataclasses import asdict
from functools import partial

import pytest
import torch

import bwlens
from bwlens import Edit, edit, experiments
from bwlens.data.given import as_edits, as_records
from bwlens.data.records import PROMPT_FIELDS, Record, read_records
from bwlens.evaluation import table1
from bwlens.evaluation.before_after import before_after
from bwlens.evaluation.presets import smallest_gradient_step

METHODS = {
    "forward_pass_shift": partial(edit.forward_pass_shift, lr=0.2),
    "gradient_step": partial(edit.gradient_step, lr=0.1, layers=5),
    "fine_tune": partial(edit.fine_tune, layers=5, steps=2),
    "rome": partial(edit.rome, prefixes=(), steps=2),
    "memit": partial(edit.memit, prefixes=(), steps=2),
    "subject_shift": partial(edit.subject_shift, layer=4, steps=2),
    "alpha_edit": partial(edit.alpha_edit, layers=4, prefixes=(), steps=2),
    "smallest_gradient_step": partial(smallest_gradient_step, layers=[5]),
}
QUICK = {"generation_every": 0, "perplexity_every": 0, "greedy_tokens": 0, "progress": False}


@pytest.fixture(scope="module")
def records():
    return read_records("demo", limit=2)


def test_mappings_wherever_edits_or_records_are_meant(demo, records):
    """As CounterFact writes them, and flat; alone, and among edits and records."""
    one = records[0]
    fields = {"case_id": one.case_id, "relation": one.relation, **asdict(one.edit)}
    flat = fields | {name: getattr(one, name) for name in PROMPT_FIELDS}
    nested = flat | {"requested_rewrite": asdict(one.edit) | {"relation": one.relation}}
    shift = METHODS["forward_pass_shift"]
    expected = bwlens.evaluate(demo, "none", one, **QUICK).rows
    for mapping in (flat, nested):
        assert as_edits(mapping) == as_edits([mapping]) == [one.edit]
        assert as_records(mapping) == as_records([mapping]) == [one]
        assert as_edits([records[1].edit, mapping, records[1]])[1] == one.edit
        assert repr(shift(demo, mapping)) == repr(shift(demo, one))
        assert bwlens.evaluate(demo, "none", mapping, **QUICK).rows.equals(expected)
        assert table1(demo, "none", [mapping], **QUICK).evaluation.rows.equals(expected)
        fidelity = experiments.gradient_rank(demo, mapping, progress=False).rows
        assert fidelity.equals(experiments.gradient_rank(demo, one, progress=False).rows)
    with pytest.raises(ValueError, match="record 0, subject: is missing"):
        as_edits({"prompt": "{} is"})


def test_records_for_several_edits(demo, records):
    for given in (records, list(records), [records[0].edit, records[1]]):
        change = edit.forward_pass_shift(demo, given, lr=0.2)
        expected = edit.forward_pass_shift(demo, records.edits, lr=0.2)
        torch.testing.assert_close(change["W_out", 5].dense(), expected["W_out", 5].dense())


def test_experiments_and_sweeps_take_records(demo, records, tmp_path):
    expected = experiments.segment_norms(demo, records.edits, progress=False).rows
    for given in (records, list(records)):
        assert experiments.segment_norms(demo, given, progress=False).rows.equals(expected)
    one = experiments.segment_norms(demo, records[0], progress=False).rows
    assert set(one["item"]) == {0}
    swept = experiments.sweep(
        "gradient_rank", demo, list(records), tmp_path, limit=0, progress=False, page=False
    )
    assert set(swept["gradient_rank"].rows["item"]) == {0, 1}
    by_record, by_edit = (experiments.naive_map(demo, one, layer=3, neurons=4) for one in
                          (records[0], records[0].edit))  # fmt: skip
    torch.testing.assert_close(by_record.cosine, by_edit.cosine)


def test_before_and_after_a_record(demo, records):
    change = edit.forward_pass_shift(demo, records[0], lr=0.2)
    assert repr(before_after(demo, records[0], change)) == (
        repr(before_after(demo, records[0].edit, change))
    )


def test_one_record_by_itself_is_evaluated(demo, records):
    rows = bwlens.evaluate(demo, "none", records[0], **QUICK).rows
    assert list(rows["case_id"]) == [records[0].case_id]


@pytest.mark.usefixtures("unchecked")
def test_an_edit_is_no_record(demo, records):
    for given in (records[0].edit, [records[0], records[1].edit]):
        with pytest.raises(TypeError, match=r"expected records, found Edit at .*Record"):
            bwlens.evaluate(demo, "none", given, **QUICK)
    with pytest.raises(ValueError, match="record 1, subject: is missing"):
        bwlens.evaluate(demo, "none", [records[0], {"prompt": "{} is"}], **QUICK)
    with pytest.raises(TypeError, match="found int at 0"):
        bwlens.evaluate(demo, "none", 3, **QUICK)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", ["Lionel Messi", ["Lionel Messi"], 3, None])
def test_what_is_neither(wrong, demo, tmp_path):
    for method in METHODS.values():
        with pytest.raises(TypeError, match="expected an Edit or a list of them"):
            method(demo, wrong)
    with pytest.raises(TypeError, match="expected an Edit or a list of them"):
        experiments.gradient_rank(demo, wrong, progress=False)
    if not isinstance(wrong, str):  # a text names a file
        with pytest.raises(TypeError, match="expected an Edit or a list of them"):
            experiments.sweep("gradient_rank", demo, wrong, tmp_path)


def test_another_model_is_not_asked_the_demos_facts(bridge):
    model = bridge("gpt2")
    for run in (partial(bwlens.evaluate, methods="none"), table1):
        with pytest.raises(ValueError, match=r"no records given for 'tiny/gpt2'.*read_records"):
            run(model, **QUICK)
    asked = Record(0, Edit("t20 {}", "t5", " t17"))
    found = bwlens.evaluate(model, "none", [asked], progress=False)
    assert found.rows["perplexity"].isna().all()


def test_a_limit_of_nothing_is_no_limit():
    assert len(read_records("demo", limit=0)) == len(read_records("demo")) > 100
    assert len(read_records("demo", limit=1)) == 1
