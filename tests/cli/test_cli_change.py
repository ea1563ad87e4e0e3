"""`bwlens change` and `bwlens dataset` as a user meets them."""

import json

import pytest
from typer.testing import CliRunner

from bwlens.cli import app
from tests import tiny
from tests.changes.test_read_change import write_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.hf_model("gpt2").save_pretrained(path)
    tiny.tokenizer(path)
    return str(path)


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_an_adapter_is_read(base, tmp_path):
    write_adapter(tmp_path / "adapter", tiny.hf_model("gpt2"), "gpt2")
    prompts, page = tmp_path / "prompts.txt", tmp_path / "change.html"
    prompts.write_text("t5 t9 t30\nt7 t8\n")
    data = tmp_path / "change.json"
    result = call(
        "change", tmp_path / "adapter", "--base", base, "--prompts", prompts, "--html", page,
        "--json", data,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "mostly writes" in result.output
    assert page.read_text().startswith("<!doctype html>")
    assert {row["matrix"] for row in json.loads(data.read_text())["directions"]} >= {"W_Q", "W_in"}


def test_what_is_wrong_is_one_line(base, tmp_path):
    result = call("change", tmp_path / "nowhere", "--base", base)
    assert result.exit_code == 1
    assert "there is no" in result.output
    write_adapter(tmp_path / "dora", tiny.hf_model("gpt2"), "gpt2", use_dora=True)
    result = call("change", tmp_path / "dora", "--base", base)
    assert result.exit_code == 1
    assert "this adapter is DoRA" in result.output


def test_a_data_set_is_read_and_searched(base, tmp_path):
    source = tmp_path / "train.jsonl"
    rows = [{"text": "t5 t9 t30 t4"}, {"prompt": "t7 t8", "answer": " t6"}, {"text": ""}]
    source.write_text("\n".join(map(json.dumps, rows)))
    args = ("dataset", source, "--out", tmp_path / "run", "--model", base, "--search", "t6")
    result = call(*args)
    assert result.exit_code == 0, result.output
    assert "example 2: text is empty" in result.output
    assert (tmp_path / "run/index.html").is_file()
    assert call(*args).exit_code == 0  # carried on: nothing is left to do
