"""Edits and records in any of the ways in which they may be given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bwlens.data.records import Record, Records, read_records
from bwlens.model.identity import is_demo, model_label
from bwlens.model.prompts import Edit

Edits = Edit | Record | Sequence[Edit | Record]
"""One edit or several; a record stands for its edit."""


def as_edits(edits: Any) -> list[Edit]:
    """One edit or several, as a list; of a record, its edit.

    Raises:
        ValueError: None at all.
        TypeError: Something else than edits and records.
    """
    several = isinstance(edits, Iterable) and not isinstance(edits, str | bytes | Mapping)
    listed: list[Any] = [
        one.edit if isinstance(one, Record) else one for one in (edits if several else [edits])
    ]
    for i, one in enumerate(listed):
        if not isinstance(one, Edit):
            raise TypeError(
                f"expected an Edit or a list of them (records do as well), found {one!r:.60}"
                f" ({type(one).__name__}{f', at {i}' if several else ''}); write"
                f" bwlens.Edit('{{}} plays for', subject='Lionel Messi', target_new=' Paris')"
            )
    if not listed:
        raise ValueError("expected an Edit or a list of them, found an empty list")
    return listed


def as_records(records: Any) -> Records | list[Record]:
    """Records in any of the ways they may be given: read, listed, or one by itself.

    Args:
        records: What `read_records` gives or takes by name, a record, or several.

    Raises:
        ValueError: There are none.
        TypeError: Something else is among them, such as an `Edit`, which has nothing to be judged
            by.
    """
    if isinstance(records, str | Path):
        records = read_records(records)
    if isinstance(records, Record):
        return [records]
    if isinstance(records, Records):
        listed: Any = records
    else:
        several = isinstance(records, Iterable) and not isinstance(records, Mapping)
        listed = list(records) if several else [records]
    for i, one in enumerate(listed):
        if not isinstance(one, Record):
            how = (
                "; an edit has no prompts to be judged by: make it a"
                " bwlens.evaluation.Record(case_id, edit, paraphrase_prompts=...)"
                if isinstance(one, Edit)
                else "; bwlens.read_records makes some of a file or of mappings"
            )
            raise TypeError(f"expected records, found {type(one).__name__} at {i}{how}")
    if not len(listed):
        raise ValueError("no records given; read_records says what it reads")
    return listed


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
