"""Table 1: the right numbers in the right cells, in every form; the presets do what they say."""

import csv
import io
import math

import numpy as np
import pandas as pd
import pytest
import torch

from bwlens import demo
from bwlens.edit import gradient_step
from bwlens.evaluation import evaluate, read_records, table1
from bwlens.evaluation.evaluation import COLUMNS as ROW
from bwlens.evaluation.evaluation import MEASURED, Evaluation
from bwlens.evaluation.methods import methods_of
from bwlens.evaluation.presets import preset, smallest_gradient_step, table1_methods
from bwlens.evaluation.table import COLUMNS, Table1
from bwlens.model.prompts import Edit
from bwlens.runs.parts import Failure


@pytest.fixture
def model(demo):
    return demo


def made_up():
    """Two records; the second method is better in all but perplexity and neighbourhood."""
    rows = []
    for method, base in (("original", 0.0), ("R&D_50%", 20.0), ("ours", 80.0)):
        for item in (0, 1):
            row = dict.fromkeys(MEASURED, base + 10 * item)
            row |= {"NS": 90.0 - base / 4, "perplexity": 50 + base, "EM": base - 30.0}
            row |= {"GE": math.nan, "seconds": math.nan if method == "original" else 1 / (1 + base)}
            row |= {"item": item, "case_id": item, "method": method, "note": "", "relation": ""}
            rows.append(row | {"norm": 1.0})
    return Table1(Evaluation(pd.DataFrame(rows)[ROW], (Failure(1, "ours: too hard"),), 3))


def test_means():
    means = made_up().means
    assert list(means.index) == ["original", "R&D_50%", "ours"]
    assert list(means.columns) == list(COLUMNS)
    assert means.loc["ours", "ES"] == 85.0
    assert means.loc["R&D_50%", "S"] == pytest.approx(3 / (1 / 25 + 1 / 25 + 1 / 85))
    assert math.isnan(means.loc["ours", "GE"])


def test_text():
    text = made_up().text()
    assert "R&D_50%" in text
    assert "85.0 ±5.0" in text
    assert "3 records" in text
    assert "Blank for want of data: GE" in text
    assert "1 edits failed" in text
    assert max(map(len, text.splitlines())) <= 120
    assert repr(made_up()) == text.rstrip()
    assert "R&amp;D_50%" in made_up()._repr_html_()


def test_csv():
    rows = list(csv.DictReader(io.StringIO(made_up().csv())))
    assert [row["method"] for row in rows] == ["original", "R&D_50%", "ours"]
    assert float(rows[2]["ES"]) == 85.0
    assert (float(rows[2]["ES_low"]), float(rows[2]["ES_high"])) == (80.0, 90.0)
    assert rows[2]["GE"] == ""


def test_latex():
    latex = made_up().latex()
    lines = latex.splitlines()
    (ours,) = [line for line in lines if line.startswith("ours")]
    (other,) = [line for line in lines if line.startswith(r"R\&D\_50\%")]
    assert ours.endswith(r"\\")
    assert len(ours.split(" & ")) == len(COLUMNS) + 1
    cells = dict(zip(COLUMNS, ours.rstrip(" \\").split(" & ")[1:], strict=True))
    assert cells["ES"] == r"\textbf{85.0}"
    assert cells["NS"] == "70.0"
    assert cells["perplexity"] == "130.0"
    assert cells["GE"] == ""
    cells = dict(zip(COLUMNS, other.rstrip(" \\").split(" & ")[1:], strict=True))
    assert cells["perplexity"] == r"\textbf{70.0}"  # the model as it is does not compete
    assert cells["NS"] == r"\textbf{85.0}"
    assert r"\multicolumn{6}{c}{Accuracy}" in latex
    assert r"\cmidrule(lr){2-7} \cmidrule(lr){8-15}" in latex
    for rule in ("top", "mid", "bottom"):
        assert f"\\{rule}rule" in latex


def test_figure():
    figure = made_up().figure()
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [
        "S", "ES", "PS", "NS", "efficacy", "paraphrase", "neighbourhood", "perplexity",
        "seconds (s)",
    ]  # fmt: skip
    dots = [line for line in figure.axes[1].get_lines() if line.get_marker() == "o"]
    assert [np.asarray(dot.get_xdata()).item() for dot in dots] == [5.0, 25.0, 85.0]
    figure.draw_without_rendering()


@pytest.mark.parametrize("suffix", [".csv", ".tex", ".txt", ".pdf", ".svg", ".png"])
def test_save(tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    assert made_up().save(path) == path
    assert path.stat().st_size > 300


def test_save_as_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"written as \.csv, \.tex or \.txt"):
        made_up().save(tmp_path / "table.xls")


def test_the_methods_fit_the_model(model):
    names = [method.name for method in table1_methods(model)]
    assert names[:4] == ["original", "fine-tuning, MLP 0", "fine-tuning, MLP 5", "gradient step"]
    assert "forward pass shift" in names
    assert methods_of(table1_methods(model)) == table1_methods(model)
    assert preset(model, "fine_tune").described()["settings"] == {"layers": [5]}
    assert {"ROME, last token", "ROME, subject's token", "MEMIT, last token"} <= set(names)
    assert preset(model, "rome").settings["position"] == "last"
    assert preset(model, "none").function is None
    with pytest.raises(ValueError, match="no editing method 'nonsense'"):
        preset(model, "nonsense")


def test_the_smallest_gradient_step(model):
    edit = Edit(*read_records("demo")[3].edit.__dict__.values())
    change = smallest_gradient_step(model, edit)

    def answer(change):
        with change.applied(model), torch.no_grad():
            return model.tokenizer.decode(model(edit.text, return_type="logits")[0, -1].argmax())

    assert answer(change) == edit.target_new
    assert answer(0.9 * change) == edit.target_true
    whole = gradient_step(model, edit, lr=1.0)
    step = change.norm() / whole.norm()
    site = next(iter(change))
    torch.testing.assert_close(change[site].dense(), (step * whole)[site].dense())
    known = smallest_gradient_step(model, Edit(edit.prompt, edit.subject, edit.target_true or ""))
    assert (len(known), known.note) == (0, "the target is the answer already")
    with pytest.raises(ValueError, match="no gradient step within 1 tries"):
        smallest_gradient_step(model, edit, most=1)


def test_table1_of_the_demo(model, tmp_path):
    records = read_records("demo").sample(2)
    methods = {"original": "none", "shift": "forward_pass_shift"}
    quick = {"perplexity_every": 0, "generation_every": 0, "greedy_tokens": 1, "progress": False}
    found = table1(model, methods, records, out=tmp_path / "run", **quick)
    assert isinstance(found, Table1)
    assert found.means.loc["original", ["efficacy", "neighbourhood"]].tolist() == [0.0, 100.0]
    assert found.means.loc["shift", ["efficacy", "ES", "greedy"]].tolist() == [100.0] * 3
    # A run of `evaluate` with these methods: the folder is taken up, not refused.
    rows = evaluate(model, methods, records, out=tmp_path / "run", **quick).rows
    assert found.evaluation.rows["NS"].tolist() == rows["NS"].tolist()
    assert len(demo.records()) == 680


def test_a_narrow_terminal_gets_whole_columns_without_intervals():
    from rich.console import Console

    def printed(width):
        console = Console(width=width, file=io.StringIO())
        console.print(made_up())
        return console.file.getvalue()

    assert "±" in printed(200)
    assert "interval" in printed(200)
    assert "±" not in printed(80)
    assert "…" not in printed(80)
    assert "neighbourhood" in printed(80)
