"""The README's Python and commands run as they stand, and what it says of SmolLM2 is so."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bwlens
from bwlens.cli import app

README = Path(bwlens.__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def run_python(model, monkeypatch):
    """Every statement in turn, with `model` for the one that it loads; the names they leave."""
    monkeypatch.setattr(bwlens, "load_model", lambda name: model)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    names = {}
    for statement in ast.parse("\n".join(blocks)).body:
        code = ast.unparse(statement)
        try:
            exec(code, names)
        except Exception as error:
            raise AssertionError(f"README says {code!r}: {error!r}") from error
    return names


def test_python_runs_on_any_model(tmp_path, monkeypatch, demo):
    monkeypatch.chdir(tmp_path)
    names = run_python(demo, monkeypatch)
    assert names["places"].shape == names["lens"].norms("W_out").shape
    assert set(names["promoted"].pos) == {len(names["lens"].tokens) - 1}
    assert (tmp_path / "lens.html").stat().st_size > 10_000


@pytest.mark.real
@pytest.mark.xdist_group("smollm2")
def test_what_it_says_of_smollm2(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_python(smollm2, monkeypatch)
    lens = names["lens"]
    assert lens.answer == " Paris"
    first = dict(names["promoted"].query("place == 0")[["layer", "word"]].values)
    # The picture, and where its rows are pale: the words of low layers are others.
    assert {first[layer] for layer in range(23, 30)} == {" Rome"}
    assert " Rome" not in {first[layer] for layer in range(22)}
    assert names["step"].rank() == len(lens.tokens)
    assert " Rome" in set(names["effect"]["word"])


def test_commands_are_ones_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = "".join(re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line)[1:] for line in blocks.splitlines() if line.startswith("bwlens ")]
    assert len(commands) == 1
    for command in commands:
        on_demo = ["demo" if word == "smollm2" else word for word in command]
        done = CliRunner().invoke(app, on_demo)
        assert done.exit_code == 0, done.output
        assert "Rome" in done.output
    assert (tmp_path / "rome.html").exists()


def test_it_is_short():
    assert len(TEXT.splitlines()) < 110
