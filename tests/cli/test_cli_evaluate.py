"""`bwlens edit` and `bwlens evaluate` as a user meets them."""

import csv
import json
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from bwlens.cli import app
from bwlens.cli.editing import _duration, _settings
from bwlens.cli.shared import records_of
from bwlens.data.prose import read_prose
from bwlens.demo import MODEL_DIR
from bwlens.edit import WeightChange, key_statistics, load_statistics, save_statistics
from bwlens.edit.statistics import demo_statistics
from bwlens.evaluation import measuring
from bwlens.evaluation.before_after import before_after, demo_company, next_words
from bwlens.evaluation.harness import Harness
from bwlens.model.prompts import Edit
from bwlens.model.sites import Site
from bwlens.runs.parts import read_table

MESSI = ("edit", "{} plays for", "--subject", "Lionel Messi", "--target", " Paris")


def run(*args):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(args))


@pytest.fixture
def model(demo):
    return demo


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch):
    monkeypatch.setattr(measuring, "Options", partial(measuring.Options, greedy_tokens=2))


@pytest.fixture
def quick(monkeypatch):
    """Evaluations without an estimate of their time, which takes as long as a record."""
    monkeypatch.setattr(Harness, "estimate", lambda self: 1.0)


def test_edit_shows_before_and_after(tmp_path):
    path = tmp_path / "messi.safetensors"
    result = run(*MESSI, "--save", str(path))
    assert result.exit_code == 0, result.output
    for word in ("fact", "paraphrase", "neighbour", "Lionel Messi plays for", " Barcelona"):
        assert word in result.output
    fact = result.output[result.output.index("fact") :].splitlines()[0]
    assert fact.index(" Barcelona") < fact.index(" Paris")
    assert len(WeightChange.load(path)) == 1


def test_edit_with_settings_and_neighbours_of_ones_own():
    result = run(
        *MESSI, "--set", "layer=4", "--set", "lr=0.3", "--neighbour", "Pikachu is a type of",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Pikachu is a type of" in result.output
    assert "W_out of layer 4" in result.output


def test_a_target_is_taken_as_it_is_written():
    """No blank is put before it; that one is missing is said."""
    result = run(*MESSI[:-1], "Paris")
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Note: the target 'Paris' begins without a blank")
    assert line.endswith("write ' Paris'")
    fact = result.output[result.output.index("fact") :].splitlines()[0]
    assert " Paris" not in fact


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*MESSI, "--set", "layer"), "expected a name and a value"),
        ((*MESSI, "--set", "speed=3"), "forward_pass_shift has no setting 'speed'"),
        ((*MESSI, "--set", "layer=99"), "layers 0 to 7"),
        ((*MESSI, "--set", "lr=fast"), "forward_pass_shift cannot take --set lr=fast"),
        ((*MESSI, "--dtype", "int8"), "--dtype 'int8': expected one of float32, bfloat16, float16"),
        ((*MESSI, "--set", "rome.layer=5"), "forward_pass_shift has no setting 'rome'"),
        ((*MESSI, "--statistics", "none.safetensors"), "none.safetensors"),
        (("evaluate", "--methods", "rome,memit", "--set", "clamp=1"), "clamp is none of rome"),
        (("evaluate", "--set", "lr=1", "--set", "rome.clamp=1"), "some settings say whose"),
        (("evaluate", "--set", "memit.clamp=1"), "has no setting 'memit'"),
        (("statistics", "--text", "none.txt", "--out", "x.safetensors"), "no such file"),
        (("statistics", "--text", "none.txt", "--out", "x.pt"), "ends in .safetensors"),
        ((*MESSI, "--method", "nonsense"), "there is no editing method 'nonsense'"),
        (("edit", "plays for", "--subject", "Messi", "--target", "Paris"), "has 0 places {}"),
        (("edit", "{} {}", "--subject", "Messi", "--target", "Paris"), "has 2 places {}"),
        (("evaluate", "table2"), "there is 'table1'"),
        (("evaluate", "--methods", "nonsense", "--limit", "1"), "no editing method 'nonsense'"),
        (("evaluate", "--data", "none.json"), "no such file"),
        (("evaluate", "--limit", "-1"), "limit is -1"),
        (("evaluate", "--prose", "none.txt", "--limit", "1"), "no such file"),
    ],
)
def test_errors_are_one_line_and_exit_1(args, message):
    result = run(*args)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_another_model_is_not_asked_the_demos_facts(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    other.save_pretrained(folder)
    out = str(tmp_path / "out")
    for command in (("evaluate",), ("evaluate", "table1"), ("sweep", "gradient_rank")):
        result = run(*command, "--model", str(folder), "--out", out)
        assert result.exit_code == 1
        assert "no records given for" in result.stderr
    args = ("sweep", "gradient_rank", "--model", str(folder), "--data", "demo", "--limit", "1")
    assert run(*args, "--out", out).exit_code == 0


def test_a_limit_of_nothing_is_no_limit():
    everything = records_of(None, None, None)
    for limit, seed in ((0, None), (0, 3), (None, 3)):
        assert records_of("demo", limit, seed) == everything
    assert len(records_of("demo", 2, 3)) == 2


def test_evaluate_prints_a_table_and_carries_on(tmp_path):
    out = tmp_path / "run"
    args = (
        "evaluate", "--methods", "none, forward_pass_shift", "--limit", "2", "--seed", "3",
        "--generation-every", "0", "--perplexity-every", "0", "--out", str(out),
    )  # fmt: skip
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "2 records, 2 methods: about" in result.output
    assert "forward_pass_shift" in result.output
    rows = list(csv.DictReader((out / "table1.csv").read_text().splitlines()))
    assert [row["efficacy"] for row in rows] == ["0.0", "100.0"]
    assert (out / "table1.tex").read_text().startswith(r"\begin{tabular}")
    again = run(*args)
    assert again.exit_code == 0, again.output
    assert "about" not in again.output.split("records; percent")[0]
    other = run(*args[:-2], "--out", str(out), "--bos")
    assert other.exit_code == 1
    assert "other settings" in other.stderr
    assert "prepend_bos was None, is True" in " ".join(other.stderr.split())


@pytest.mark.usefixtures("quick")
def test_evaluate_says_what_is_left_out(tmp_path):
    good = {"prompt": "{} plays for", "subject": "Lionel Messi", "target_new": "Paris"}
    lines = [good, {"prompt": "{} is"}]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = run(
        "evaluate", "--data", str(path), "--generation-every", "0", "--perplexity-every", "0"
    )
    assert result.exit_code == 0, result.output
    assert "record 1, subject: is missing" in result.output
    assert "Blank for want of data: paraphrase" in " ".join(result.output.split())


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("evaluate", "--limit", "1")
    assert result.exit_code == 1
    assert "name one with --out" in result.stderr


def test_before_after_agrees_with_the_model(model):
    edit = Edit("{} plays for", "Lionel Messi", " Paris")
    paraphrases, neighbours = demo_company(edit)
    assert len(paraphrases) == 2
    assert neighbours
    assert "Lionel Messi plays for" not in neighbours
    told = before_after(model, edit, WeightChange(), paraphrases, neighbours, top_k=3)
    assert told.before == told.after
    assert told.kinds == ("fact", "paraphrase", "paraphrase", *["neighbour"] * len(neighbours))
    assert {words[0][0] for words in told.before[3:]} == {" Barcelona"}
    logits = model(neighbours[0], return_type="logits")[0, -1].softmax(-1)
    best = logits.topk(3)
    assert [p for _, p in told.before[3]] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert next_words(model, [edit.text], 1)[0][0][0] == " Barcelona"
    assert "Lionel Messi plays for" in repr(told)
    assert demo_company(Edit("{} plays for", "Nobody", " Paris")) == ([], [])


def test_methods_that_need_settings_are_chosen_by_name_alone():
    for method in ("gradient_step", "fine_tune"):
        assert run(*MESSI, "--method", method).exit_code == 0


@pytest.mark.usefixtures("quick")
def test_statistics_are_counted_written_and_used(tmp_path, model):
    text, path = tmp_path / "text.txt", tmp_path / "keys.safetensors"
    text.write_text("\n\n\n".join(read_prose("demo")))
    count = ("statistics", "--text", str(text), "--out", str(path), "--layers", "2,-3")
    width = model.cfg.d_mlp
    few = run(*count, "--tokens", str(width - 1))
    assert few.exit_code == 1
    assert f"{width - 1:,} tokens are too few for keys of W_out" in few.stderr
    assert not path.exists()
    result = run(*count, "--tokens", "2000")
    assert result.exit_code == 0, result.output
    assert f"W_out: 2,000 tokens, {2000 / width:.1f} for each of a key's" in result.output
    held = load_statistics(path)
    assert {(site.matrix, site.layer) for site in held} == {
        (matrix, layer) for matrix in ("W_out", "W_O") for layer in (2, 5)
    }
    for matrix in ("W_out", "W_O"):
        alone = key_statistics(
            model, read_prose("demo"), matrix=matrix, layers=2, max_tokens=2000, cache=False
        )
        for site, one in alone.items():
            torch.testing.assert_close(held[site].second_moment, one.second_moment)
    edit = (
        *MESSI,
        "--method",
        "rome",
        "--set",
        "layer=2",
        "--set",
        "prefixes=()",
        "--set",
        "steps=3",
    )
    assert run(*edit).output != run(*edit, "--statistics", str(path)).output
    out = tmp_path / "run"
    args = (
        "evaluate", "--methods", "none,rome,forward_pass_shift,memit", "--limit", "2",
        "--generation-every", "0", "--perplexity-every", "0", "--statistics", str(path),
        "--set", "rome.layer=2", "--set", "rome.prefixes=()", "--set", "rome.steps=1",
        "--set", "memit.layers=[2, 5]", "--set", "memit.prefixes=()", "--set", "memit.steps=1",
        "--out", str(out),
    )  # fmt: skip
    result = run(*args)
    assert result.exit_code == 0, result.output
    methods = json.loads((out / "run.json").read_text())["settings"]["methods"]
    assert methods["rome"]["settings"]["layer"] == 2
    assert methods["memit"]["settings"]["layers"] == [2, 5]
    assert [("statistics" in one["settings"]) for one in methods.values()] == [
        False, True, False, True,
    ]  # fmt: skip


def test_a_method_that_cannot_run_is_left_out_and_named(tmp_path):
    path = tmp_path / "keys.safetensors"
    held = demo_statistics()
    save_statistics({site: held[site] for site in [Site("W_out", 7)]}, path)
    result = run(
        "evaluate", "--methods", "none,rome,forward_pass_shift", "--limit", "2", "--statistics",
        str(path), "--generation-every", "0", "--perplexity-every", "0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "Left out: rome cannot run here" in said
    assert "Note: rome cannot run here" in said
    assert "no key statistics of" in said


def test_settings_and_durations():
    assert _settings(["rome.layer=5", "rome.clamp=1", "ROME, last token.steps=2"]) == {
        "rome": {"layer": 5, "clamp": 1}, "ROME, last token": {"steps": 2},
    }  # fmt: skip
    assert _settings(["layer=5", "lr=0.1", "layers=[1, 2]", "position=subject"]) == {
        "layer": 5, "lr": 0.1, "layers": [1, 2], "position": "subject",
    }  # fmt: skip
    assert _settings(None) == {}
    assert [_duration(s) for s in (0.2, 40.0, 600.0, 12e3)] == [
        "1 s",
        "40 s",
        "10 min",
        "3 h 20 min",
    ]


@pytest.mark.usefixtures("quick")
def test_bare_requests_become_records_of_known_facts(tmp_path):
    """Paraphrases and neighbours are made, and every fact is one that the model has right."""
    demo = [
        {"requested_rewrite": one["requested_rewrite"]}
        for one in json.loads((MODEL_DIR.parent / "records.json").read_text())
    ]
    path = tmp_path / "requests.json"
    path.write_text(json.dumps(demo))
    quick = ("--generation-every", "0", "--perplexity-every", "0", "--methods", "none")
    out = tmp_path / "run"
    result = run(
        "evaluate", "--data", str(path), "--make", "--known", "--limit", "3", "--seed", "1", *quick,
        "--out", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = read_table(out, "rows")
    assert rows["ES"].tolist() == [0.0, 0.0, 0.0]
    assert rows[["PS", "NS"]].notna().all(axis=None)
    bare = run(
        "evaluate", "--data", str(path), "--limit", "3", *quick, "--out", str(tmp_path / "b")
    )
    assert bare.exit_code == 0, bare.output
    assert read_table(tmp_path / "b", "rows")[["PS", "NS"]].isna().all(axis=None)
