"""The benchmarks run and print their rows; how fast anything is, no test says."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.changes import read_some

WORDS = {
    "capture": "bare forward",
    "readout": "matrix product",
    "lens": "BackwardLens",
    "readings": "dual / plain",
    "edits": "subject shift / ROME",
    "values": "values together / plain",
    "rank": "svdvals",
    "batch": "one by one",
    "sweep": "prompts swept",
    "evaluate": "a copy of the model each",
    "changes": "adapter on all matrices",
    "heads": "R of all heads",
    "table": "table, build",
}
QUICK = ["--quick", "--repeats", "1", "--prompts", "1"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quick_run_prints_a_row_for_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    # Another browser may be running in this process already, and one at a time is all there can be.
    monkeypatch.setattr("benchmarks.table._browser", lambda: nullcontext(None))
    # Two more processes that sweep would take most of the test's time.
    monkeypatch.setattr("benchmarks.sweep._peaks", lambda n: (2**20, 2**20))
    # As would data sets, whose reading is weighed.
    monkeypatch.setattr("benchmarks.changes.read_some", lambda m, texts: read_some(m, texts[:2]))
    main(QUICK)
    printed = capsys.readouterr().out
    assert set(WORDS) == set(BENCHMARKS)
    for words in WORDS.values():
        assert words in printed
    for column in ("what", "ours", "reference", "ratio", "target", "met?"):
        assert column in printed
    assert "transformer_lens" in printed


def test_it_runs_as_a_command():
    root = Path(__file__).parents[1]
    # Without a browser.
    environment = os.environ | {"COLUMNS": "200", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "table", *QUICK],
        cwd=root, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert WORDS["table"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["speed"], "there are capture, readout"), (["--prompts", "0"], "--prompts is 0")],
)
def test_what_cannot_be_run_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
