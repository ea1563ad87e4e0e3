"""The command line as a user meets it: output, files, exit codes, one-line errors."""

import json
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

import bwlens
from bwlens.cli import app, editing, reading, sweeping
from bwlens.cli.shared import layers_of
from bwlens.evaluation.methods import editing_methods
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.hf_model("gpt2").save_pretrained(path)
    tiny.tokenizer(path)
    return str(path)


@pytest.fixture
def run(folder):
    def call(*args, model=folder):
        return CliRunner().invoke(app, [*args, *(["--model", model] if model else [])])

    return call


def test_lens_prints_a_table_and_writes_files(run, tmp_path):
    html, data = tmp_path / "lens.html", tmp_path / "lens.json"
    result = run(
        "lens", "t5 t9 t30", "--target", " t17", "--subject", "t9", "--layers", "0-1",
        "--top-k", "4", "--no-bos", "--html", str(html), "--json", str(data),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "t30" in result.output
    assert "answer before" in result.output
    assert html.read_text().startswith("<!doctype html>")
    read = json.loads(data.read_text())
    assert read["layers"] == [0, 1]
    assert len(read["tokens"]) == 3
    assert len(read["matrices"]["W_out"]["promoted"][0][0]) == 4


def test_another_matrix(run):
    result = run("lens", "t5 t9", "--target", "t17", "--matrix", "W_O")
    assert result.exit_code == 0, result.output
    assert "step on W_O" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["", "--target", "t17"], "the prompt is empty; give it some text"),
        (["t5", "--target", ""], "the target is empty"),
        (["t5", "--target", "t17", "--matrix", "W_gate"], "no such matrix"),
        (["t5", "--target", "t17", "--layers", "9"], "layers 0 to 2"),
        (["t5", "--target", "t17", "--layers", "a-b"], "expected layers such as"),
        (["t5", "--target", "t17", "--subject", "t9"], "does not occur"),
        (["t5", "--target", "t17", "--html", "/no/such/folder/x.html"], "cannot write"),
    ],
)
def test_errors_are_one_line_and_exit_1(run, args, message):
    result = run("lens", *args)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert message in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("t5", "--target", "t17", "--subject", "t9"), "does not occur"),
        (("t5", "--target", "t17", "--matrix", "W_x"), "there are W_in, W_gate, W_out, W_Q"),
        (("t5", "--target", "t17", "--layers", "a-b"), "expected layers such as"),
        (("t5", "--target", "t17", "--html", "x.pdf"), "a file that ends in .html"),
        (("t5", "--target", "t17", "--json", "x.csv"), "a file that ends in .json"),
        (("t5", "--target", "t17", "--dtype", "int8"), "expected one of float32, bfloat16"),
    ],
)
def test_arguments_are_checked_before_the_model_is_loaded(run, args, message):
    result = run("lens", *args, model="no/such-model")
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize("command", [("sweep", "paper"), ("evaluate",)])
def test_a_folder_that_cannot_be_written_to(run, command, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        result = run(*command, "--out", str(out), model="no/such-model")
        assert result.exit_code == 1
        assert "cannot write into" in result.stderr


def test_names_of_methods_and_experiments_are_checked_before_the_model_is_loaded(run):
    edit = ("edit", "{} is", "--subject", "t9", "--target", "t17", "--method", "magic")
    for args in (edit, ("evaluate", "--methods", "none,magic")):
        result = run(*args, model="no/such-model")
        assert "no editing method 'magic'" in result.stderr
    assert "no experiment 'magic'" in run("sweep", "magic", "--out", "x", model="no/such").stderr


def test_dtype_and_device_map(run):
    args = ("lens", "t5 t9", "--target", "t17", "--layers", "1")
    for more in (("--dtype", "bfloat16"), ("--device-map", "cpu")):
        assert run(*args, *more).exit_code == 0


def test_what_is_warned_of_is_a_note(run):
    result = run("lens", "t5 Paris t9", "--target", "t17", "--layers", "1")
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Note: the tokenizer does not know 'Paris' in prompt 0")


def test_version(run):
    result = run("--version", model=None)
    assert (result.exit_code, result.output) == (0, f"bwlens {bwlens.__version__}\n")
    assert bwlens.__version__ == version("bwlens")


def test_help_names_all_there_is():
    """The lists in `--help` wait for no library, so they are written out."""
    assert reading.MATRICES.split(", ") == list(bwlens.MATRICES)
    assert sweeping.EXPERIMENTS.split(", ") == list(bwlens.experiments.EXPERIMENTS)
    assert editing.METHODS.split(", ") == list(editing_methods())
    helps = {
        ("lens", "--help"): reading.MATRICES,
        ("edit", "--help"): editing.METHODS,
        ("evaluate", "--help"): editing.METHODS,
        ("sweep", "--help"): sweeping.EXPERIMENTS,
    }
    for args, names in helps.items():
        shown = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, list(args)).output
        for name in names.split(", "):
            assert name in shown


def test_debug_shows_the_error_itself(run):
    result = run("lens", "t5", "--target", "t17", "--layers", "9", "--debug")
    assert isinstance(result.exception, ValueError)


def test_wrong_usage_exits_2(run):
    assert run("lens", model=None).exit_code == 2
    assert run("lens", "t5", "--target", "t17", "--top-k", "0").exit_code == 2
    assert run("nonsense", model=None).exit_code == 2


def test_demo(run, tmp_path):
    page = tmp_path / "demo.html"
    result = run("demo", "--html", str(page), model=None)
    assert result.exit_code == 0, result.output
    assert "Messi" in result.output
    assert "Paris" in result.output
    assert "Barcelona" in result.output
    assert page.stat().st_size > 1000


def test_layers():
    assert layers_of("0-3") == [0, 1, 2, 3]
    assert layers_of("0,2, -1") == [0, 2, -1]
    assert layers_of(None) is None
    for bad in ("x", "1-", "5-3", "-1-3", ""):
        with pytest.raises(ValueError, match="--layers"):
            layers_of(bad)
