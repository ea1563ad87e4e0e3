"""Edits and records in any of the ways in which they may be given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bwlens.data.records import Record, Records, read_records, record_of
from bwlens.model.identity import is_demo, model_label
from bwlens.model.prompts import Edit

OneEdit = Edit | Record | Mapping[str, Any]
"""A record stands for its edit, and a mapping for the record that `read_records` makes of it."""

Edits = OneEdit | Sequence[OneEdit]
"""One edit or several."""


def as_edits(edits: Any) -> list[Edit]:
    """One edit or several, as a list; of a record or a mapping, its edit.

    Raises:
        ValueError: None at all, or a mapping that is no record.
        TypeError: Something else than edits, records and mappings.
    """
    listed = as_list(edits)
    for i, one in enumerate(listed):
        if not isinstance(one, Edit | Record):
            raise TypeError(
                f"expected an Edit or a list of them (records and mappings do as well), found"
                f" {one!r:.60} ({type(one).__name__}, at {i}); write bwlens.Edit('{{}} plays for',"
                f" subject='Lionel Messi', target_new=' Paris')"
            )
    if not listed:
        raise ValueError("expected an Edit or a list of them, found an empty list")
    return [one.edit if isinstance(one, Record) else one for one in listed]


def as_records(records: Any) -> Records | list[Record]:
    """Records in any of the ways they may be given: read, listed, or one by itself.

    Args:
        records: What `read_records` gives or takes by name, a record or mapping, or several.

    Raises:
        ValueError: There are none, or a mapping is no record.
        TypeError: Something else is among them, such as an `Edit`, which has nothing to be judged
            by.
    """
    if isinstance(records, str | Path):
        return read_records(records)
    listed = records if isinstance(records, Records) else as_list(records)
    for i, one in enumerate(listed):
        if not isinstance(one, Record):
            how = (
                "an edit has no prompts to be judged by: make it a"
                " bwlens.Record(case_id, edit, paraphrase_prompts=...)"
                if isinstance(one, Edit)
                else "bwlens.read_records makes some of a file or of mappings"
            )
            raise TypeError(f"expected records, found {type(one).__name__} at {i}; {how}")
    if not len(listed):
        raise ValueError("no records given; read_records says what it reads")
    return listed


def as_list(given: Any) -> list[Any]:
    """What was given, one or several, as a list; mappings are read as records."""
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
    listed = list(given) if several else [given]
    return [record_of(one, i) if isinstance(one, Mapping) else one for i, one in enumerate(listed)]


def own_records(model: Any, records: Any) -> Any:
    """The records given, or where there are none those that the demo model was made with.

    Raises:
        ValueError: No records were given and this is another model.
    """
    if records is not None:
        return records
    if not is_demo(model):
        raise ValueError(
            f"no records given for {model_label(model)!r}, and the facts that ship with bwlens are"
            f" the demo model's: give records, such as read_records('counterfact.json'), or 'demo'"
            f" to ask this model the demo's facts all the same"
        )
    return "demo"
