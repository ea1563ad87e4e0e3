"""Sweeps: the rows of one run whatever interrupts it, shared work, bad records listed."""

import pandas as pd
import pytest
import torch

from bwlens import Edit, read_records
from bwlens.experiments import EXPERIMENTS, GradientRank, SegmentNorms, read_sweep, sweep
from bwlens.experiments.running import Batches, memory_per_token
from bwlens.model.loading import load_model
from bwlens.runs.parts import Process
from tests import tiny

EDITS = [
    Edit("{} plays for", "Lionel Messi", " Paris"),
    Edit("{} grew up in", "Obama", " Paris"),
    Edit("The city of {} lies in the country of", "Rome", " Spain"),
    Edit("{}, developed by", "iPod Nano", " Google"),
    Edit("{} is a type of", "Pikachu", " cheese"),
]


def small(model, prompts=2):
    """Memory for batches of about so many prompts."""
    return prompts * 10 * memory_per_token(model, ["W_in", "W_out"])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        pd.testing.assert_frame_equal(a[name].rows, b[name].rows, check_exact=True)


def test_every_edit_is_measured_and_the_page_written(demo, tmp_path):
    found = sweep(
        ["gradient_rank", SegmentNorms(matrices=("W_out",))], demo, EDITS, tmp_path,
        max_memory=small(demo), progress=False,
    )  # fmt: skip
    assert found.finished
    assert sorted(found["gradient_rank"].rows["item"].unique()) == list(range(len(EDITS)))
    assert set(found["segment_norms"].rows["matrix"]) == {"W_out"}
    page = found.index.read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "http://www.w3.org" not in page.replace("xmlns", "").split("<svg")[0]
    summary = pd.read_csv(tmp_path / "gradient_rank.csv")
    assert summary.query("quantity == 'full' and layer == 0")["mean"].tolist() == [1.0, 1.0]
    assert (tmp_path / "segment_norms.pdf").read_bytes().startswith(b"%PDF")


def test_an_interrupted_sweep_ends_with_the_same_rows(demo, tmp_path, monkeypatch):
    options = {"max_memory": small(demo), "progress": False, "page": False}
    whole = sweep("gradient_rank", demo, EDITS, tmp_path / "whole", **options)
    held, calls = Batches.__call__, []

    def breaks(self, number):
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return held(self, number)

    monkeypatch.setattr(Batches, "__call__", breaks)
    with pytest.raises(KeyboardInterrupt):
        sweep("gradient_rank", demo, EDITS, tmp_path / "cut", **options)
    assert not read_sweep(tmp_path / "cut").finished
    again = sweep("gradient_rank", demo, EDITS, tmp_path / "cut", **options)
    assert len(calls) > 2
    assert_same(again.results, whole.results)


def test_processes_share_a_sweep(demo, tmp_path):
    options = {"max_memory": small(demo), "progress": False}
    both = ["gradient_rank", "layer_cosine"]
    whole = sweep(both, demo, EDITS, tmp_path / "whole", page=False, **options)
    first, second = (
        sweep(both, demo, EDITS, tmp_path / "both", process=Process(index, 2), **options)
        for index in range(2)
    )
    assert not first.finished
    assert second.finished
    assert second.index.exists()
    assert_same(second.results, whole.results)


def test_other_settings_or_weights_are_refused(demo, tmp_path):
    sweep("gradient_rank", demo, EDITS[:2], tmp_path, progress=False, page=False)
    with pytest.raises(ValueError, match=r"experiments\.gradient_rank\.layers was None, is \[1\]"):
        sweep(GradientRank((1,)), demo, EDITS[:2], tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"data\.edits was 2, is 3"):
        sweep("gradient_rank", demo, EDITS[:3], tmp_path, progress=False)
    other = load_model("demo")
    with torch.no_grad():
        other.blocks[2].mlp.out.original_component.weight[5, 7] += 1
    with pytest.raises(ValueError, match=r"model\.fingerprint"):
        sweep("gradient_rank", other, EDITS[:2], tmp_path, progress=False)
    assert read_sweep(tmp_path).finished


def test_each_experiment_has_the_layers_it_asked_for(demo, tmp_path):
    asked = [GradientRank((0,)), EXPERIMENTS["segment_norms"]((-1, 2))]
    found = sweep(asked, demo, EDITS[:2], tmp_path, progress=False, page=False)
    layers = {name: set(result.rows["layer"]) for name, result in found.results.items()}
    assert layers == {"gradient_rank": {0}, "segment_norms": {2, len(demo.blocks) - 1}}


def test_a_record_that_cannot_be_read_is_no_item(demo, tmp_path):
    flat = [{"prompt": e.prompt, "subject": e.subject, "target_new": e.target_new} for e in EDITS]
    records = read_records([{"prompt": "no subject"}, *flat[:2]])
    found = sweep("gradient_rank", demo, records, tmp_path, progress=False, page=False)
    assert set(found["gradient_rank"].rows["item"]) == {0, 1}
    assert [(f.item, f.message[:18]) for f in found.failures] == [(-1, "record 0, subject:")]


def test_an_experiment_without_rows_is_named_on_the_page(demo, tmp_path):
    asked = [GradientRank((0,)), EXPERIMENTS["layer_cosine"]((0,))]
    page = sweep(asked, demo, EDITS[:1], tmp_path, progress=False).index.read_text("utf-8")
    assert 'href="#gradient_rank"' in page
    assert 'href="#layer_cosine"' not in page
    assert "no rows" in page


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no such model")
def test_a_model_without_mlps_has_some_of_the_paper(tmp_path):
    from bwlens.experiments.sweeps import _fitting

    fit, unfit = _fitting([made() for made in EXPERIMENTS.values()], tiny.attention_only())
    assert [experiment.name for experiment in fit] == ["segment_norms"]
    assert len(unfit) == len(EXPERIMENTS) - 1


def test_a_bad_edit_is_listed_and_the_rest_measured(demo, tmp_path):
    long = Edit("{} " + "word " * 200 + "is", "Rome", " Spain")
    found = sweep("gradient_rank", demo, [EDITS[0], long, EDITS[1]], tmp_path, progress=False)
    assert sorted(found["gradient_rank"].rows["item"].unique()) == [0, 2]
    (failure,) = found.failures
    assert failure.item == 1
    assert "context holds 128" in failure.message
    assert "context holds 128" in found.index.read_text(encoding="utf-8")


def test_an_edit_that_fails_in_its_batch_is_found(demo, tmp_path, monkeypatch):
    measure = GradientRank.measure

    def fails(self, reading):
        if any(edit.subject == "Obama" for edit in reading.edits):
            raise ValueError("the loss of prompt 0 is nan")
        return measure(self, reading)

    monkeypatch.setattr(GradientRank, "measure", fails)
    found = sweep("gradient_rank", demo, EDITS, tmp_path, progress=False, page=False)
    assert sorted(found["gradient_rank"].rows["item"].unique()) == [0, 2, 3, 4]
    assert [failure.item for failure in found.failures] == [1]
    assert "loss of the prompt is nan" in found.failures[0].message


@pytest.mark.usefixtures("unchecked")
def test_nothing_to_read_is_an_error(demo, tmp_path):
    with pytest.raises(ValueError, match="found an empty list"):
        sweep("gradient_rank", demo, [], tmp_path)
    with pytest.raises(ValueError, match="no experiment 'rank'; there are paper"):
        sweep("rank", demo, EDITS, tmp_path)
    with pytest.raises(ValueError, match="no W_gate"):
        sweep(GradientRank(None, ("W_gate",)), demo, EDITS, tmp_path)
    with pytest.raises(TypeError, match=r"found 'text' \(str, at 0\)"):
        sweep("gradient_rank", demo, ["text"], tmp_path)
    with pytest.raises(ValueError, match="named twice"):
        sweep(["paper", "gradient_rank"], demo, EDITS, tmp_path)


def test_experiments_that_a_model_cannot_take_are_left_out_of_the_paper(boot, tmp_path):
    from bwlens.experiments.sweeps import _fitting

    fit, unfit = _fitting([GradientRank(), EXPERIMENTS["imprint_shift"]()], boot("mixtral"))
    assert [experiment.name for experiment in fit] == ["gradient_rank"]
    assert "mixture of experts" in unfit[0].message


def test_every_experiment_says_what_it_is():
    for name, experiment in EXPERIMENTS.items():
        assert experiment.name == name
        assert experiment.title
        assert experiment.source.startswith(("Figure", "Lemma", "not in"))
        assert experiment.caption.endswith((".", "?"))
        assert experiment.published.endswith(".")


def test_a_folder_of_another_version_is_named_as_one(demo, tmp_path):
    sweep("gradient_rank", demo, EDITS[:1], tmp_path, progress=False, page=False)
    meta = tmp_path / "run.json"
    meta.write_text(meta.read_text().replace('"matrices"', '"weights"'))
    with pytest.raises(ValueError, match="another version of bwlens"):
        read_sweep(tmp_path)
