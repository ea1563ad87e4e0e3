"""Work in parts: whole files or none, carried on where it was left, shared over processes."""

import json
import os
import sys
from importlib import import_module

import pandas as pd
import pytest
from rich.console import Console

from bwlens.runs.parts import (
    Failure,
    Part,
    Process,
    Run,
    progress_bar,
    read_failures,
    read_meta,
    read_tables,
    whole,
)

SIZES = [3, 3, 2]


def rows_of(number):
    rows = pd.DataFrame({"item": [number] * SIZES[number], "value": [number + 0.5] * SIZES[number]})
    return Part({"squares": rows, "names": rows[["item"]]}, [Failure(number, f"bad {number}")])


def start(folder, **settings):
    return Run(folder, {"a": 1, "nested": {"b": [1, 2]}, **settings}, SIZES)


def test_all_parts_are_read_back_in_order(tmp_path):
    run = start(tmp_path / "run")
    assert not run.finished
    run.work(rows_of, progress=False)
    assert run.finished
    tables = read_tables(tmp_path / "run")
    assert list(tables) == ["squares", "names"]
    assert tables["squares"]["value"].tolist() == [0.5] * 3 + [1.5] * 3 + [2.5] * 2
    assert [f.message for f in read_failures(tmp_path / "run")] == ["bad 0", "bad 1", "bad 2"]


def test_parts_whose_lists_are_all_empty_are_joined(tmp_path):
    def rows(number):
        return Part({"lists": pd.DataFrame({"held": [[1.0] * number]})})

    start(tmp_path).work(rows, progress=False)
    held = read_tables(tmp_path)["lists"]["held"]
    assert [list(values) for values in held] == [[], [1.0], [1.0, 1.0]]


def test_a_folder_without_hard_links(tmp_path, monkeypatch):
    def refuses(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuses)
    start(tmp_path).work(rows_of, progress=False)
    assert start(tmp_path).finished
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_what_is_done_is_not_done_again(tmp_path):
    start(tmp_path).work(rows_of, progress=False)
    start(tmp_path).work(lambda number: pytest.fail("worked again"), progress=False)


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_a_failure_in_between_leaves_whole_parts_and_is_carried_on(tmp_path, stop_at):
    def breaks(number):
        if number == stop_at:
            raise RuntimeError("out of memory")
        return rows_of(number)

    with pytest.raises(RuntimeError, match="out of memory"):
        start(tmp_path).work(breaks, progress=False)
    seen = []

    def counted(number):
        seen.append(number)
        return rows_of(number)

    start(tmp_path).work(counted, progress=False)
    assert seen == list(range(stop_at, 3))
    assert len(read_tables(tmp_path)["squares"]) == sum(SIZES)


def test_rows_without_their_mark_are_written_again(tmp_path):
    run = start(tmp_path)
    run.work(rows_of, progress=False)
    (tmp_path / "done/part-00001.json").unlink()
    (tmp_path / "squares/part-00001.parquet").write_bytes(b"half")
    (tmp_path / "squares/.part-00001.99.parquet.tmp").write_bytes(b"half")
    assert not run.finished
    assert len(read_tables(tmp_path)["squares"]) == 5
    start(tmp_path).work(rows_of, progress=False)
    assert read_tables(tmp_path)["squares"]["item"].tolist() == [0] * 3 + [1] * 3 + [2] * 2
    assert not list(tmp_path.glob("*/.*"))


def test_processes_share_the_parts_without_overlap(tmp_path):
    seen = []
    for index in range(2):
        run = start(tmp_path)
        assert not run.finished

        def work(number, index=index):
            seen.append((index, number))
            return rows_of(number)

        run.work(work, process=Process(index, 2), progress=False)
    assert seen == [(0, 0), (0, 2), (1, 1)]
    assert start(tmp_path).finished


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"a": 2}, r"a was 1, is 2"),
        ({"nested": {"b": [1, 3]}}, r"nested\.b was \[1, 2\], is \[1, 3\]"),
        ({"new": "x"}, r"new was 'not set', is 'x'"),
    ],
)
def test_other_settings_are_refused_and_the_difference_named(tmp_path, settings, told):
    start(tmp_path)
    with pytest.raises(ValueError, match=told):
        start(tmp_path, **settings)


def test_another_version_of_a_library_is_a_difference(tmp_path):
    start(tmp_path)
    meta = json.loads((tmp_path / "run.json").read_text())
    meta["versions"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"versions\.torch was '1\.0'"):
        start(tmp_path)


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex.*new or empty folder"):
        start(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_cannot_be_made_is_said_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot make the folder"):
        start(tmp_path / "file/run")


def test_reading_something_else_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        read_meta(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="no run of this version"):
        read_meta(tmp_path)


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with whole(path) as part:
            part.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_environment_says_which_process_this_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Process.current() == Process(0, 1, 0)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Process.current() == Process(5, 8, 1)


def test_jupyter_without_widgets_gets_no_warning_for_a_bar(monkeypatch):
    import_module("rich.progress")  # first: what it imports would keep the console below for good
    monkeypatch.setattr("rich.get_console", lambda: Console(force_jupyter=True))
    monkeypatch.setattr("rich.progress.get_console", lambda: Console(force_jupyter=True))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # as rich sees it
    monkeypatch.setattr("bwlens.runs.parts.find_spec", lambda name: None)
    with progress_bar("asked", 3) as advance:
        advance(3)
