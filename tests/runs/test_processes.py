"""A command in processes of its own has the rows of an undisturbed one, whatever happens."""

import pandas as pd
import pytest

from bwlens.experiments import read_sweep
from bwlens.runs.parts import read_tables
from tests.commands import complete, killed, launched

NAMES = ("evaluate", "sweep")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Three records in two parts; and thirty in more."""
    prose = tmp_path_factory.mktemp("prose") / "prose.txt"
    prose.write_text("Once upon a time there was a little girl who had a dog.\n" * 3)
    evaluate = [
        "evaluate", "--methods", "none,forward_pass_shift", "--limit", "3", "--generation-every",
        "0", "--perplexity-every", "2", "--prose", str(prose),
    ]  # fmt: skip
    sweep = ["sweep", "gradient_rank", "--limit", "30", "--max-memory", "10MB"]
    return dict(zip(NAMES, (evaluate, sweep), strict=True))


def rows(name, folder):
    """What a finished run has measured."""
    if name == "sweep":
        found = read_sweep(folder)
        assert found.finished
        assert found.index.exists()
        return found["gradient_rank"].rows
    found = read_tables(folder)["rows"].drop(columns="seconds")
    assert len(found) == 2 * 3
    assert found["perplexity"].notna().sum() == 2 * 2
    assert (folder / "table1.csv").exists()
    return found


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory):
    found = {}
    for name, command in commands.items():
        folder = tmp_path_factory.mktemp(name)
        complete(command, folder)
        found[name] = rows(name, folder)
    return found


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(("name", "after"), [("evaluate", 1), ("sweep", 3)])
def test_killed_it_carries_on_to_the_very_same_rows(name, after, commands, undisturbed, tmp_path):
    killed(commands[name], tmp_path, after)
    last = {"evaluate": "table1.csv", "sweep": "index.html"}[name]
    assert len(list(tmp_path.glob("done/part-*.json"))) >= after
    assert not (tmp_path / last).exists()
    complete(commands[name], tmp_path)
    pd.testing.assert_frame_equal(rows(name, tmp_path), undisturbed[name], check_exact=True)


@pytest.mark.xdist_group("processes")
def test_two_launched_processes_give_the_same_rows_as_one(commands, undisturbed, tmp_path):
    """One launch for both commands: most of its time goes by before they begin."""
    told = tmp_path / "told"
    told.mkdir()
    given = ([*args, "--out", str(tmp_path / name)] for name, args in commands.items())
    launched(*given, folder=told)
    for name in NAMES:
        found = rows(name, tmp_path / name)
        pd.testing.assert_frame_equal(found, undisturbed[name], check_exact=True)
