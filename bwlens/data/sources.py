"""Where records come from: files and data sets, as plain mappings that nobody has judged yet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Entry = Mapping[str, Any]
"""A record as it was written down: nested as CounterFact's, or flat."""


class Unread(NamedTuple):
    """Why an entry could not be read: the field ("line" or "row", of files), and the message."""

    field: str
    message: str


SUFFIXES = (".json", ".jsonl", ".csv")


def entries_of(source: str) -> Iterator[Entry | Unread]:
    """The entries of "demo", of a file, or of a Hugging Face data set, in their order.

    Raises:
        ValueError: There is no such source, or it is not of the kind that its name says.
    """
    path = Path(source)
    if source == "demo":
        from bwlens import demo

        return iter(demo.records())
    if path.is_dir():
        raise ValueError(f"{source!r} is a folder; name a {_expected()} file in it")
    if path.suffix in SUFFIXES:
        return {".json": _json, ".jsonl": _json_lines, ".csv": _csv}[path.suffix](path)
    if path.is_file():
        raise ValueError(
            f"{source!r} is a {path.suffix or 'file without a suffix'}; records are read from"
            f" {_expected()} files"
        )
    return _hub(source)


def lines_of(source: str) -> Iterator[Entry | Unread]:
    """The rows of a .jsonl, .json or .csv file of any columns, or of a data set; one at a time.

    Raises:
        ValueError: There is no such file.
    """
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():  # as long as it may be: never all at once
        with path.open(encoding="utf-8-sig") as lines:
            for line in lines:
                if line.strip():
                    yield _json_line(line)
    elif path.suffix == ".csv" and path.is_file():
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            yield from _csv_rows(reader, len(reader.fieldnames or ()))
    else:
        yield from entries_of(source)


def _expected() -> str:
    return ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(
            f"{str(path)!r}: no such file; give 'demo', a {_expected()} file that exists, or the"
            f" name of a Hugging Face data set"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is no UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def _json(path: Path) -> Iterator[Entry | Unread]:
    text = _text(path)
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; with one record a line, name the file .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{str(path)!r} is no JSON: {error}{hint}") from None
    if not isinstance(entries, list):
        raise ValueError(
            f"{str(path)!r} holds a JSON {_kind(entries)}; expected a list of records, as in"
            f" CounterFact's counterfact.json"
        )
    return (_mapping(entry, "record") for entry in entries)


def _json_lines(path: Path) -> Iterator[Entry | Unread]:
    # Not str.splitlines: it also cuts at characters that JSON strings may hold.
    lines = [line for line in _text(path).split("\n") if line.strip()]
    return (_json_line(line) for line in lines)


def _json_line(line: str) -> Entry | Unread:
    try:
        return _mapping(json.loads(line), "line")
    except json.JSONDecodeError as error:
        return Unread("line", f"is no JSON: {error}")


def _mapping(entry: Any, what: str) -> Entry | Unread:
    if isinstance(entry, Mapping):
        return entry
    return Unread(what, f"is a JSON {_kind(entry)}; expected an object with the record's fields")


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _csv(path: Path) -> Iterator[Entry | Unread]:
    # As with JSON lines, rows end at line ends alone, whatever else str.splitlines cuts at.
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    columns = reader.fieldnames or ()
    needed = ("prompt", "subject")
    have = {name.rpartition(".")[2] for name in columns}  # "requested_rewrite.prompt" will do
    if missing := [name for name in needed if name not in have]:
        raise ValueError(
            f"{str(path)!r} has no column {' and no column '.join(missing)}; found"
            f" {', '.join(map(str, columns)) or 'nothing'}. Expected prompt (a template with {{}}),"
            f" subject, target_new, and if known target_true, relation, paraphrase_prompts, ..."
        )
    return _csv_rows(reader, len(columns))


def _csv_rows(reader: csv.DictReader[str], n_columns: int) -> Iterator[Entry | Unread]:
    rows = iter(reader)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Unread("row", f"cannot be read: {error}")
            continue
        if None in row:
            more = n_columns + len(row[None])  # pyright: ignore[reportArgumentType]
            yield Unread(
                "row", f"has {more} cells under {n_columns} columns; quote cells with commas"
            )
        else:
            yield {name: cell for name, cell in row.items() if cell}


def _hub(name: str) -> Iterator[Entry | Unread]:
    from datasets import load_dataset

    try:
        data: Any = load_dataset(name)
    except Exception as error:  # the hub's client raises a great many kinds
        raise ValueError(
            f"{name!r} is no file here, and as a Hugging Face data set it could not be loaded"
            f" ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Give 'demo', a"
            f" {_expected()} file, or a data set name, with a network"
        ) from error
    split = "train" if "train" in data else next(iter(data))
    return iter(data[split])
