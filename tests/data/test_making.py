"""Records made from requests: what is asked of which subject, and what is left out and why."""

from __future__ import annotations

import json

import pytest

from bwlens import make_records, read_records


def request(subject, true, new, template, relation="P1", case=0):
    rewrite = {
        "prompt": template,
        "subject": subject,
        "target_true": {"str": true},
        "target_new": {"str": new},
        "relation_id": relation,
    }
    return {"case_id": case, "requested_rewrite": rewrite}


A, B, C = "{} speaks", "The language of {} is", "{}, a native"
REQUESTS = [
    request("Ada", "French", "Dutch", A, case=1),
    request("Bea", "French", "Dutch", B, case=2),
    request("Cid", "Dutch", "French", C, case=3),
    request("Dan", "French", "Dutch", A, case=4),
    request("Dan", "Dutch", "French", B, case=5),  # two answers: nobody's neighbour
    request("Eve", "Thai", "French", A, case=6),  # nobody else says Thai
    request("Fay", "French", "Dutch", "{} prays in", relation="P2", case=7),
]


def test_prompts_come_from_the_relation() -> None:
    made = make_records(REQUESTS, paraphrases=2)
    ada = next(r for r in made if r.edit.subject == "Ada")
    assert set(ada.paraphrase_prompts) == {"The language of Ada is", "Ada, a native"}
    assert ada.neighborhood_prompts == ("Bea speaks",)
    assert ada.attribute_prompts == ("Cid speaks",)
    assert ada.edit.target_new == " Dutch"


def test_what_is_left_out_is_said_by_its_place_in_the_source() -> None:
    broken = [{"case_id": 9}, *REQUESTS]
    made = make_records(broken, paraphrases=2)
    reasons = {problem.index: problem.field for problem in made.problems}
    assert reasons[0] in ("prompt", "target_new", "subject")
    assert reasons[6] == "neighborhood_prompts"  # Eve
    assert reasons[7] == "paraphrase_prompts"  # Fay
    assert len(made) + len(made.problems) == len(broken)


def test_a_record_is_the_same_alone_or_among_others_and_by_its_seed() -> None:
    many = [request(f"S{i}", "French", "Dutch", (A, B, C)[i % 3], case=i) for i in range(30)]
    first = make_records(many, paraphrases=1, neighbours=3)
    again = make_records(list(reversed(many)), paraphrases=1, neighbours=3)
    by_case = {r.case_id: r for r in again}
    assert all(len(r.neighborhood_prompts) == 3 for r in first)
    assert all(by_case[r.case_id] == r for r in first)
    other = make_records(many, paraphrases=1, neighbours=3, seed=1)
    assert [r.neighborhood_prompts for r in other] != [r.neighborhood_prompts for r in first]


def test_a_path_and_records_do_as_well(tmp_path) -> None:
    path = tmp_path / "requests.json"
    path.write_text(json.dumps(REQUESTS))
    assert list(make_records(path)) == list(make_records(REQUESTS))
    assert list(make_records(read_records(path))) == list(make_records(REQUESTS))


@pytest.mark.parametrize("wrong", [{"paraphrases": 0}, {"neighbours": 0}, {"attributes": -1}])
def test_numbers_are_checked(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_records(REQUESTS, **wrong)


def test_no_record_at_all_says_why() -> None:
    with pytest.raises(ValueError, match=r"no request gives a record.*P1 has 1 other"):
        make_records(REQUESTS[:2])
