"""Records made from bare requests: what else is said of the relation gives the prompts.

CounterFact's paraphrases and neighbours come from a knowledge base and a generator. Requests of
many subjects (template, subject, true answer, new answer) hold as much: the relation's other
templates are paraphrases, and subjects with the same true answer are neighbours.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from bwlens.data.given import as_records
from bwlens.data.records import Problem, Record, Records, read_records


def make_records(
    requests: str | Path | Records | Sequence[Record | Mapping[str, Any]],
    *,
    paraphrases: int = 2,
    neighbours: int = 10,
    attributes: int = 10,
    seed: int = 0,
) -> Records:
    """Records with prompts to judge an edit by, from requests that have none.

    - paraphrases: the relation's other templates, with the request's subject;
    - neighbours: the request's template, with other subjects whose true answer is the same;
    - attribute prompts: the request's template, with subjects whose true answer is the new one.

    Which of several are taken is drawn by the seed and the request itself, so that a request's
    record is the same whatever was made before it. A subject that the requests give several
    answers in the relation is nobody's neighbour.

    Args:
        requests: Records, entries, or whatever `read_records` takes by name; each with a relation
            and a true answer.
        paraphrases: How many a record needs, and gets.
        neighbours: How many a record gets at most; it needs one.
        attributes: How many attribute prompts a record gets at most; it needs none.
        seed: Of the drawing.

    Returns:
        The records, with a `Problem` for each request left out: not readable, no relation, no true
        answer, too few other templates, no other subject with the answer.

    Raises:
        ValueError: A number below 1 (`attributes`: below 0), or no request gives a record.

    Example:
        >>> made = make_records("counterfact.json")  # doctest: +SKIP
        >>> made[0].paraphrase_prompts  # doctest: +SKIP
        ('The native language of Danielle Darrieux is', 'Danielle Darrieux, a native')
    """
    for name, number, least in (
        ("paraphrases", paraphrases, 1),
        ("neighbours", neighbours, 1),
        ("attributes", attributes, 0),
    ):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name} is {number!r}; expected a whole number from {least} up")
    read = requests if isinstance(requests, Records) else _read(requests)
    templates: dict[str | None, dict[str, None]] = defaultdict(dict)
    answers: dict[tuple[str | None, str], set[str]] = defaultdict(set)
    for record in read:
        templates[record.relation][record.edit.prompt] = None
        if record.edit.target_true is not None:
            answers[record.relation, record.edit.subject].add(record.edit.target_true)
    subjects: dict[tuple[str | None, str], list[str]] = defaultdict(list)
    for (relation, subject), given in sorted(answers.items(), key=str):
        if len(given) == 1:
            subjects[relation, next(iter(given))].append(subject)

    made: list[Record] = []
    problems = [] if read is requests else list(read.problems)
    unread = {problem.index for problem in problems}
    indices = (i for i in count() if i not in unread)
    for i, record in zip(indices, read, strict=False):
        edit, relation = record.edit, record.relation
        others = sorted(t for t in templates[relation] if t != edit.prompt)
        near = [s for s in subjects[relation, edit.target_true or ""] if s != edit.subject]
        lacking = None
        if relation is None:
            lacking = "relation", "is missing; it says which templates are paraphrases"
        elif edit.target_true is None:
            lacking = "target_true", "is missing; it says which subjects are neighbours"
        elif len(others) < paraphrases:
            how_many = f"{len(others)} other templates, {paraphrases} needed"
            lacking = "paraphrase_prompts", f"relation {relation} has {how_many}"
        elif not near:
            lacking = "neighborhood_prompts", f"no other subject is{edit.target_true} in {relation}"
        if lacking:
            problems.append(Problem(i, *lacking))
            continue
        far = [s for s in subjects[relation, edit.target_new] if s != edit.subject]
        rng = random.Random(f"{seed}|{relation}|{edit.prompt}|{edit.subject}|{edit.target_new}")
        drawn = rng.sample(others, paraphrases)
        made.append(
            replace(
                record,
                paraphrase_prompts=tuple(t.replace("{}", edit.subject) for t in drawn),
                neighborhood_prompts=_some(edit.prompt, near, neighbours, rng),
                attribute_prompts=_some(edit.prompt, far, attributes, rng),
            )
        )
    if not made:
        first = "; ".join(map(str, problems[:3])) or "there are none"
        raise ValueError(f"{read.source}: no request gives a record: {first}")
    return Records(tuple(made), tuple(sorted(problems, key=lambda p: p.index)), read.source)


def _read(requests: Any) -> Records:
    """Requests in any form, with the problems of those that could not be read."""
    if isinstance(requests, str | Path):
        return read_records(requests)
    several = list(requests)
    if several and all(isinstance(one, Mapping) for one in several):
        return read_records(several)
    return Records(tuple(as_records(several)), (), "the requests given")


def _some(template: str, subjects: list[str], n: int, rng: random.Random) -> tuple[str, ...]:
    """The template with at most `n` of the subjects."""
    drawn = rng.sample(subjects, min(n, len(subjects)))
    return tuple(template.replace("{}", subject) for subject in drawn)
