"""Records: an edit with the prompts that tell whether it took, carried over, and spared the rest.

The format is CounterFact's (Meng et al., 2022). Other layouts that are met in practice are read
into the same `Record`, and whatever is wrong with an entry is said of it by its index and field.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from bwlens.data.sources import Entry, Unread, entries_of
from bwlens.model.prompts import Edit

PROMPT_FIELDS = (
    "paraphrase_prompts",
    "neighborhood_prompts",
    "attribute_prompts",
    "generation_prompts",
    "reference_texts",
)
"""The lists of texts that a record may have; a metric whose list is empty stays blank."""


@dataclass(frozen=True)
class Record:
    """One edit and the prompts it is judged by.

    Attributes:
        case_id: The record's own number, or its index in the source where it has none.
        edit: What is to be changed.
        relation: Which relation the fact belongs to, where known.
        paraphrase_prompts: The same question in other words: should say `target_new`.
        neighborhood_prompts: The same question of other subjects: should keep `target_true`.
        attribute_prompts: Questions whose answer has been `target_new` all along.
        generation_prompts: Beginnings about the subject, to be continued.
        reference_texts: Texts about subjects that `target_new` is true of.
    """

    case_id: int
    edit: Edit
    relation: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    reference_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Why an entry is not among the records: its index in the source (from 0), field, reason."""

    index: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"record {self.index}, {self.field}: {self.message}"


@dataclass(frozen=True, repr=False)
class Records(Sequence[Record]):
    """The usable records of a source, in its order, and the problems of the rest.

    Attributes:
        records: The records themselves; a slice is `Records` again.
        problems: One for each entry that could not be used.
        source: Where they came from, as it was given.
    """

    records: tuple[Record, ...]
    problems: tuple[Problem, ...] = ()
    source: str = "records"

    @property
    def edits(self) -> list[Edit]:
        """The edits alone, as the editing methods take them."""
        return [record.edit for record in self.records]

    def sample(self, n: int, seed: int = 0) -> Records:
        """`n` records drawn at random, the same ones for the same seed, in the source's order.

        Raises:
            ValueError: `n` is not between 1 and the number of records.
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"a sample of {n} asked for; there are {len(self)} records to draw")
        chosen = sorted(random.Random(seed).sample(range(len(self)), n))
        return replace(self, records=tuple(self.records[i] for i in chosen))

    def shuffled(self, seed: int = 0) -> Records:
        """All of them in a random order, the same one for the same seed."""
        order = random.Random(seed).sample(range(len(self)), len(self))
        return replace(self, records=tuple(self.records[i] for i in order))

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return replace(self, records=self.records[index])
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        left_out = f", {len(self.problems)} left out" if self.problems else ""
        return f"Records({len(self)} of {self.source}{left_out})"


def read_records(
    source: str | Path | Sequence[Mapping[str, Any]] = "demo", limit: int | None = None
) -> Records:
    """Records from the demo, from a file, or from a Hugging Face data set.

    What is read:

    - CounterFact's JSON, whole or with its `requested_rewrite` alone, also flattened
      ("requested_rewrite.prompt") and as JSON lines;
    - known_1000.json (`subject`, `attribute`, `prompt`): it has no new targets, so one is chosen
      among the other answers to the same relation in the file, always the same one;
    - CSV and JSON lines with `prompt`, `subject`, `target_new` and, if known, `target_true`,
      `relation`, `case_id` and the lists of prompts (in CSV as a JSON list, or one text);
    - a Hugging Face data set in one of these layouts, its "train" split if it has one.

    A prompt without `{}` becomes a template where the subject stands, if it stands there once.
    Targets get a leading space where they have none, whatever their script: CounterFact's rule.

    Args:
        source: "demo", a path that ends in .json, .jsonl or .csv, the name of a data set, or the
            entries themselves.
        limit: The most records to take, from the beginning; None or 0 for all.

    Returns:
        The usable records, with a `Problem` for each entry that is not.

    Raises:
        ValueError: There is no such source, it is of another kind than its name says, or none of
            its entries is usable.

    Example:
        >>> read_records("demo", limit=3)[0].edit.target_new
        ' Oceania'
    """
    limit = checked_limit(limit)
    given = isinstance(source, str | Path)
    name = str(source) if given else "the records given"
    entries: Iterable[Entry | Unread] = entries_of(name) if given else iter(source)
    records: list[Record] = []
    problems: list[Problem] = []
    for index, entry in enumerate(_with_new_targets(entries)):
        try:
            records.append(_record(entry, index))
        except _Unusable as error:
            problems.append(Problem(index, error.field, error.message))
        if len(records) == limit:
            break
    if not records:
        first = "; ".join(map(str, problems[:3])) or "it is empty"
        raise ValueError(f"{name} has no usable record: {first}")
    return Records(tuple(records), tuple(problems), name)


def checked_limit(limit: int | None) -> int | None:
    """A limit, 0 meaning the same as None everywhere: no limit.

    Raises:
        ValueError: It is below 0.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}; expected 1 or more, or 0 or None for all")
    return limit or None


def record_of(entry: Mapping[str, Any], index: int = 0) -> Record:
    """The record that one mapping is, in any of the layouts that `read_records` takes.

    Raises:
        ValueError: A field is missing or is not what it should be.
    """
    try:
        return _record(entry, index)
    except _Unusable as error:
        raise ValueError(str(Problem(index, error.field, error.message))) from None


class _Unusable(Exception):
    """An entry is no record, because of one field."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message


_OTHER_NAMES = {
    "relation": ("relation_id",),
    "target_new": ("target_false",),
    "target_true": ("ground_truth",),
    "neighborhood_prompts": ("neighbourhood_prompts",),
}
"""What other data sets call the fields of a flat entry."""


def _record(entry: Entry | Unread, index: int) -> Record:
    """An entry of any layout as a record.

    Raises:
        _Unusable: A field is missing or is not what it should be.
    """
    if isinstance(entry, Unread):
        raise _Unusable(*entry)
    if not isinstance(entry, Mapping):
        raise _Unusable("record", f"expected a mapping of fields, found {entry!r:.60}")
    entry = _nested(entry)
    rewrite = entry.get("requested_rewrite", entry)
    if not isinstance(rewrite, Mapping):
        raise _Unusable("requested_rewrite", f"expected an object, found {rewrite!r:.60}")
    relation = _field(rewrite, "relation")
    return Record(
        _case_id(entry.get("case_id"), index),
        _edit(rewrite),
        None if relation is None else str(relation),
        *(_texts(_field(entry, name), name) for name in PROMPT_FIELDS),
    )


def _case_id(value: Any, index: int) -> int:
    """The record's own number; its index where it has none."""
    if value is None or value == "":
        return index
    for kind in (int, float):  # a data frame with a gap in the column writes 3 as 3.0
        try:
            number = kind(str(value))
        except ValueError:
            continue
        if number == number // 1:  # nan and inf are not
            return int(number)
    raise _Unusable("case_id", f"expected a whole number, found {value!r:.60}")


def _nested(entry: Entry) -> Entry:
    """Undo a data frame's flattening: "requested_rewrite.target_new.str" and its like."""
    if not any("." in str(name) for name in entry):
        return entry
    nested: dict[str, Any] = {}
    for name, value in entry.items():
        *parents, leaf = str(name).split(".")
        at = nested
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise _Unusable(parent, f"is there twice: by itself, and in {name!r}")
        if leaf in at:
            raise _Unusable(leaf, f"is there twice: by itself, and in {name!r}")
        at[leaf] = value
    return nested


def _field(entry: Entry, name: str) -> Any:
    """A field under any of its names; None where there is nothing."""
    for known in (name, *_OTHER_NAMES.get(name, ())):
        if entry.get(known) is not None:
            return entry[known]
    return None


def _edit(rewrite: Entry) -> Edit:
    prompt, subject = (_text(_field(rewrite, name), name) for name in ("prompt", "subject"))
    if prompt.count("{}") == 0:
        if prompt.count(subject) != 1:
            raise _Unusable(
                "prompt",
                f"{prompt!r} has no place {{}} for the subject, and {subject!r} stands in it"
                f" {prompt.count(subject)} times; write {{}} once where the subject belongs",
            )
        prompt = prompt.replace(subject, "{}")
    new = _target(_field(rewrite, "target_new"), "target_new")
    true = _field(rewrite, "target_true")
    true = None if true is None else _target(true, "target_true")
    if new == true:
        raise _Unusable("target_new", f"{new!r} is the same as target_true; name another answer")
    try:
        return Edit(prompt, subject, new, true)
    except ValueError as error:
        raise _Unusable("prompt", str(error)) from None


def _text(value: Any, field: str) -> str:
    if value is None:
        raise _Unusable(field, "is missing")
    if not isinstance(value, str) or not value.strip():
        raise _Unusable(field, f"expected some text, found {value!r:.60}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _Unusable(field, f"{value!r:.60} holds half a character, which no tokenizer takes")
    return value


def _target(value: Any, field: str) -> str:
    """A target with its leading space, from text or from CounterFact's {"str": ..., "id": ...}."""
    text = _text(value.get("str") if isinstance(value, Mapping) else value, field)
    return text if text[0].isspace() else " " + text


def _texts(value: Any, field: str) -> tuple[str, ...]:
    """A list of texts; from a CSV cell, a JSON list or one text."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return (value,)
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise _Unusable(field, f"starts as a JSON list but is none: {error}") from None
    if not isinstance(value, list | tuple):
        raise _Unusable(field, f"expected a list of texts, found {value!r:.60}")
    return tuple(_text(text, field) for text in value)


def _with_new_targets(entries: Iterable[Entry | Unread]) -> Iterator[Entry | Unread]:
    """Give each known fact (`attribute` instead of targets) a new target; pass the rest through."""
    entries = iter(entries)
    everything: list[Entry | Unread] = []
    for entry in entries:
        everything.append(entry)
        if isinstance(entry, Mapping):
            break  # the first that could be read tells the layout
    if not (everything and isinstance(everything[-1], Mapping) and "attribute" in everything[-1]):
        yield from everything
        yield from entries
        return
    everything += entries
    answers: dict[Any, set[str]] = defaultdict(set)
    own: dict[Any, set[str]] = defaultdict(set)
    for entry in everything:
        if isinstance(entry, Mapping) and isinstance(entry.get("attribute"), str):
            relation, subject = _relation_and_subject(entry)
            answers[relation].add(entry["attribute"])
            own[relation, subject].add(entry["attribute"])
    for entry in everything:
        if not isinstance(entry, Mapping):
            yield entry
            continue
        key = _relation_and_subject(entry)
        others = sorted(answers[key[0]] - own[key])
        if not others:
            why = f"no other answer to relation {key[0]} in the file to change it to"
            yield Unread("attribute", why)
            continue
        digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
        yield {
            "case_id": entry.get("known_id"),
            "relation": entry.get("relation_id"),
            "subject": entry.get("subject"),
            "prompt": entry.get("prompt"),
            "target_true": entry.get("attribute"),
            "target_new": others[int.from_bytes(digest[:8], "big") % len(others)],
        }


def _relation_and_subject(entry: Entry) -> tuple[str, str]:
    """As texts, so that whatever a malformed entry has there can be a key."""
    return str(entry.get("relation_id")), str(entry.get("subject"))
