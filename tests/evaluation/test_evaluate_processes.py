"""An evaluation in processes of its own has the rows of an undisturbed one, whatever happens."""

import pandas as pd
import pytest

from bwlens.runs.parts import read_tables
from tests.commands import complete, killed, launched


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Six records in two parts."""
    prose = tmp_path_factory.mktemp("prose") / "prose.txt"
    prose.write_text("Once upon a time there was a little girl who had a dog.\n" * 3)
    return [
        "evaluate", "--methods", "none,forward_pass_shift", "--limit", "6", "--generation-every",
        "0", "--perplexity-every", "3", "--prose", str(prose),
    ]  # fmt: skip


def rows(folder):
    found = read_tables(folder)["rows"].drop(columns="seconds")
    assert len(found) == 2 * 6
    assert found["perplexity"].notna().sum() == 2 * 2
    assert (folder / "table1.csv").exists()
    return found


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    complete(command, folder)
    return rows(folder)


def test_a_killed_evaluation_carries_on_to_the_very_same_rows(command, undisturbed, tmp_path):
    killed(command, tmp_path)
    assert len(list(tmp_path.glob("done/part-*.json"))) == 1
    assert not (tmp_path / "table1.csv").exists()
    complete(command, tmp_path)
    pd.testing.assert_frame_equal(rows(tmp_path), undisturbed, check_exact=True)


def test_two_launched_processes_give_the_same_rows_as_one(command, undisturbed, tmp_path):
    launched(command, tmp_path)
    pd.testing.assert_frame_equal(rows(tmp_path), undisturbed, check_exact=True)
