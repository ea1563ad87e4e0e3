"""Records: every layout is read into the same thing, and what is wrong is named."""

import csv
import json

import pytest

import bwlens
from bwlens import demo
from bwlens.data.records import Problem, Record, Records, read_records
from bwlens.model.prompts import Edit
from tests.conftest import shared

FLAT = {
    "prompt": "{} plays for",
    "subject": "Lionel Messi",
    "target_new": "Paris",
    "target_true": " Barcelona",
    "relation": "team",
    "case_id": 7,
    "paraphrase_prompts": ["Lionel Messi, who plays for"],
    "neighborhood_prompts": ["Xavi plays for", "Pedri, of"],
    "reference_texts": ["Paris is a club."],
}
NESTED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays for",
        "relation_id": "team",
        "subject": "Lionel Messi",
        "target_new": {"str": "Paris", "id": "Q1"},
        "target_true": {"str": "Barcelona", "id": None},
    },
    "paraphrase_prompts": ["Lionel Messi, who plays for"],
    "neighborhood_prompts": ["Xavi plays for", "Pedri, of"],
    "reference_texts": ["Paris is a club."],
}
EXPECTED = Record(
    7,
    Edit("{} plays for", "Lionel Messi", " Paris", " Barcelona"),
    "team",
    paraphrase_prompts=("Lionel Messi, who plays for",),
    neighborhood_prompts=("Xavi plays for", "Pedri, of"),
    reference_texts=("Paris is a club.",),
)


def flattened():
    rewrite = NESTED["requested_rewrite"]
    return {
        "case_id": 7,
        "requested_rewrite.prompt": rewrite["prompt"],
        "requested_rewrite.relation_id": "team",
        "requested_rewrite.subject": rewrite["subject"],
        "requested_rewrite.target_new.str": "Paris",
        "requested_rewrite.target_new.id": "Q1",
        "requested_rewrite.target_true.str": "Barcelona",
        **{k: v for k, v in NESTED.items() if k.endswith(("prompts", "texts"))},
    }


def write(path, entries):
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(entries[0]))
            writer.writeheader()
            for entry in entries:
                writer.writerow(
                    {k: json.dumps(v) if isinstance(v, list) else v for k, v in entry.items()}
                )
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(e, ensure_ascii=False) for e in entries) + "\n\n")
    else:
        path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize(
    ("entry", "suffix"),
    [
        *((FLAT, suffix) for suffix in (".json", ".jsonl", ".csv")),
        *((NESTED, suffix) for suffix in (".json", ".jsonl")),
        *((flattened(), suffix) for suffix in (".json", ".jsonl", ".csv")),
    ],
)
def test_every_layout_gives_the_same_record(tmp_path, entry, suffix):
    read = read_records(write(tmp_path / f"facts{suffix}", [entry]))
    assert list(read) == [EXPECTED]
    assert read.problems == ()
    assert read.source.endswith(suffix)
    assert list(read_records([entry])) == [EXPECTED]


def test_other_names_of_the_fields():
    tracing = {
        "relation": "team",
        "prompt": "Lionel Messi plays for",
        "relation_id": "P54",
        "target_true": " Barcelona",
        "target_false": " Paris",
        "subject": "Lionel Messi",
    }
    (record,) = read_records([tracing])
    assert record == Record(0, EXPECTED.edit, "team")


def test_a_csv_may_say_little(tmp_path):
    path = tmp_path / "few.csv"
    path.write_text(
        "prompt,subject,target_new,target_true,paraphrase_prompts\n"
        '{} is in,"Paris, Texas",Spain,,"Paris, Texas, is in"\n'
        "Zoë speaks,Zoë, 日本語,,\n",
        encoding="utf-8-sig",
    )
    one, two = read_records(path)
    assert one.edit == Edit("{} is in", "Paris, Texas", " Spain")
    assert one.paraphrase_prompts == ("Paris, Texas, is in",)
    assert (one.case_id, two.case_id, one.relation) == (0, 1, None)
    assert two.edit == Edit("{} speaks", "Zoë", " 日本語")


def test_lines_are_cut_at_line_feeds_alone(tmp_path):
    path = write(tmp_path / "odd.jsonl", [FLAT | {"subject": "A\u2028B"}])
    assert read_records(path)[0].edit.subject == "A\u2028B"
    rows = tmp_path / "odd.csv"
    rows.write_text("prompt,subject,target_new\n{} is,A\u2028B\x85,C\n", encoding="utf-8")
    assert read_records(rows)[0].edit.subject == "A\u2028B\x85"


@pytest.mark.parametrize(
    ("given", "expected"), [(None, 1), ("", 1), (4.0, 4), ("4.0", 4), ("4", 4)]
)
def test_a_record_without_a_number_has_its_index(given, expected):
    assert read_records([FLAT, FLAT | {"case_id": given}])[1].case_id == expected


def test_half_a_character_is_no_text():
    (problem,) = read_records([FLAT, FLAT | {"subject": "\ud800"}]).problems
    assert (problem.field, "half a character" in problem.message) == ("subject", True)


def test_malformed_known_facts_do_not_spoil_the_rest(tmp_path):
    facts = [
        {"subject": f"S{at}", "prompt": f"S{at} is in", "attribute": name, "relation_id": "P1"}
        for at, name in enumerate("abc")
    ]
    odd = facts[0] | {"subject": ["S"]}
    records = read_records(write(tmp_path / "known.jsonl", [3, *facts, odd]))
    assert [record.case_id for record in records] == [1, 2, 3]
    assert [(problem.index, problem.field) for problem in records.problems] == [
        (0, "line"),
        (4, "subject"),
    ]


BROKEN = [
    (FLAT | {"prompt": "plays for"}, "prompt", "stands in it 0 times"),
    (FLAT | {"prompt": "{} and {} play for"}, "prompt", "2 places"),
    (FLAT | {"subject": " "}, "subject", "expected some text"),
    (FLAT | {"target_new": None}, "target_new", "is missing"),
    (FLAT | {"target_new": {"id": "Q1"}}, "target_new", "is missing"),
    (FLAT | {"target_new": 3}, "target_new", "found 3"),
    (FLAT | {"target_new": "Barcelona"}, "target_new", "same as target_true"),
    (FLAT | {"paraphrase_prompts": 5}, "paraphrase_prompts", "list of texts"),
    (FLAT | {"paraphrase_prompts": ["a", ""]}, "paraphrase_prompts", "expected some text"),
    (FLAT | {"paraphrase_prompts": "[1,"}, "paraphrase_prompts", "JSON list"),
    (FLAT | {"case_id": "x"}, "case_id", "whole number"),
    (FLAT | {"case_id": "²"}, "case_id", "whole number"),
    (FLAT | {"case_id": 1.5}, "case_id", "whole number"),
    (FLAT | {"target_new.str": "Madrid"}, "target_new", "there twice"),
    ({"requested_rewrite": "x"}, "requested_rewrite", "expected an object"),
    ({}, "prompt", "is missing"),
]


@pytest.mark.parametrize(("entry", "field", "message"), BROKEN)
def test_a_malformed_record_is_named_and_the_rest_used(tmp_path, entry, field, message):
    read = read_records(write(tmp_path / "some.jsonl", [FLAT, entry, NESTED]))
    assert list(read) == [EXPECTED, EXPECTED]
    (problem,) = read.problems
    assert (problem.index, problem.field) == (1, field)
    assert message in problem.message
    assert "left out" in repr(read)


def test_lines_and_rows_that_cannot_be_read_are_problems(tmp_path):
    lines = tmp_path / "some.jsonl"
    lines.write_text(f"{json.dumps(FLAT)}\n{{oops\n3\n")
    assert [(p.index, p.field) for p in read_records(lines).problems] == [(1, "line"), (2, "line")]
    rows = tmp_path / "some.csv"
    rows.write_text("prompt,subject,target_new\n{} is in,Rome,Spain,Italy\n{} is in,Rome,Spain\n")
    read = read_records(rows)
    assert read.problems[0].field == "row"
    assert "4 cells under 3 columns" in read.problems[0].message
    assert len(read) == 1


def test_no_usable_record_quotes_the_first_problems(tmp_path):
    path = write(tmp_path / "none.jsonl", [FLAT | {"target_new": ""}] * 5)
    with pytest.raises(ValueError, match=r"no usable record: record 0, target_new: .*record 2"):
        read_records(path)
    with pytest.raises(ValueError, match="it is empty"):
        read_records(write(tmp_path / "none.json", []))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '{"a": 1}', "holds a JSON object; expected a list"),
        ("x.json", "nope", "is no JSON"),
        ("x.json", '{"a": 1}\n{"a": 2}', r"name the file \.jsonl"),
        ("x.txt", "prompt", r"is a \.txt; records are read from \.json, \.jsonl or \.csv"),
        ("x.csv", "a,b\n1,2\n", "no column prompt and no column subject; found a, b"),
        ("x.csv", "", "found nothing"),
        ("x.csv", b"prompt\xff", "is no UTF-8 text"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_no_such_file_folder_or_data_set(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file"):
        read_records(tmp_path / "x.json")
    with pytest.raises(ValueError, match="is a folder"):
        read_records(tmp_path)

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ValueError, match=r"could not be loaded \(ConnectionError: no network"):
        read_records("someone/counterfact")
    with pytest.raises(ValueError, match="limit is -1"):
        read_records("demo", limit=-1)


def test_a_data_set_of_the_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda name: {"test": [], "train": [NESTED]})
    assert list(read_records("someone/counterfact")) == [EXPECTED]
    monkeypatch.setattr("datasets.load_dataset", lambda name: {"test": [flattened()]})
    assert list(read_records("someone/counterfact")) == [EXPECTED]


def test_the_demo():
    records = bwlens.read_records()
    raw = demo.records()
    assert len(records) == len(raw)
    assert records.problems == ()
    assert records.source == "demo"
    for record, entry in zip(records, raw, strict=True):
        rewrite = entry["requested_rewrite"]
        assert record.edit.target_new == " " + rewrite["target_new"]["str"]
        assert record.relation == rewrite["relation_id"]
        assert list(record.neighborhood_prompts) == entry["neighborhood_prompts"]
        assert list(record.generation_prompts) == entry["generation_prompts"]
    assert len(bwlens.read_records("demo", limit=5)) == 5
    assert records.edits[3] == records[3].edit


def test_slices_and_samples():
    records = read_records("demo")
    assert isinstance(records[2:5], Records)
    assert [r.case_id for r in records[2:5]] == [2, 3, 4]
    drawn = records.sample(20, seed=1)
    assert drawn == records.sample(20, seed=1) != records.sample(20, seed=2)
    ids = [r.case_id for r in drawn]
    assert ids == sorted(set(ids))
    assert len(ids) == 20
    with pytest.raises(ValueError, match="a sample of 681 asked for; there are 680"):
        records.sample(681)


def test_all_requests_of_counterfact():
    path = shared("data/counterfact_requests.json")
    records = read_records(path)
    raw = json.loads(path.read_text())
    assert len(records) == len(raw) == 21919
    assert records.problems == ()
    for record, entry in zip(records, raw, strict=True):
        rewrite = entry["requested_rewrite"]
        assert record.case_id == entry["case_id"]
        assert record.edit.text == rewrite["prompt"].replace("{}", rewrite["subject"])
        assert record.edit.target_true == " " + rewrite["target_true"]["str"]
        assert record.relation == rewrite["relation_id"]


def test_all_known_facts():
    path = shared("data/known_1000.json")
    records = read_records(path)
    raw = {entry["known_id"]: entry for entry in json.loads(path.read_text())}
    assert len(raw) == 1209
    # One relation has a single fact, so no other answer to change it to.
    assert [(p.index, p.field) for p in records.problems] == [(893, "attribute")]
    assert len(records) == 1208
    attributes = {(e["relation_id"], " " + e["attribute"]) for e in raw.values()}
    for record in records:
        entry = raw[record.case_id]
        assert record.edit.text == entry["prompt"]
        assert record.edit.target_true == " " + entry["attribute"] != record.edit.target_new
        assert (record.relation, record.edit.target_new) in attributes
    assert records == read_records(path)
    # The choice does not hang on how many are read.
    assert list(read_records(path, limit=50)) == list(records[:50])


def test_a_problem_says_where():
    assert str(Problem(3, "subject", "is missing")) == "record 3, subject: is missing"
