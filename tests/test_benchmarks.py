"""The benchmarks run and print their rows; how fast anything is, no test says."""

from contextlib import nullcontext

import pytest

from benchmarks.__main__ import BENCHMARKS, main

WORDS = {
    "capture": "bare forward",
    "readout": "matrix product",
    "lens": "BackwardLens",
    "rank": "svdvals",
    "batch": "one by one",
    "sweep": "prompts swept",
    "evaluate": "a copy of the model each",
    "table": "table, build",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quick_run_prints_a_row_for_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    # Another browser may be running in this process already, and one at a time is all there can be.
    monkeypatch.setattr("benchmarks.table._browser", lambda: nullcontext(None))
    # Two more processes that sweep would take most of the test's time.
    monkeypatch.setattr("benchmarks.sweep._peaks", lambda n: (2**20, 2**20))
    main(["--quick", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert set(WORDS) == set(BENCHMARKS)
    for words in WORDS.values():
        assert words in printed
    assert "transformer_lens" in printed


def test_a_benchmark_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "there are capture, readout" in capsys.readouterr().err
