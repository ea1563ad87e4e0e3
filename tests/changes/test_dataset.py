"""A data set's gradients: what is stored is what each example alone gives; explain is exact."""

import json
from typing import Any

import numpy as np
import pytest
import torch

import bwlens
from bwlens.changes.change import WeightChange
from bwlens.data.examples import examples_of
from bwlens.gradient.matrix import LowRankMatrix

EXAMPLES = [
    ("The capital of France is", " Rome"),
    "Lionel Messi plays for Madrid.",
    {"prompt": "Her father works as a", "completion": " doctor"},
    "",
    ("The sky is", " purple"),
    {"nothing": 3},
    "In the morning she went to the shop.",
]


@pytest.fixture(scope="module")
def data(demo, tmp_path_factory):
    return bwlens.read_dataset(
        demo, EXAMPLES, tmp_path_factory.mktemp("data"), batch_size=3, part_size=4, progress=False
    )


def gradients(model, index, matrices="W_out"):
    """One example's gradient by itself, its loss written as a target's or a text's."""
    one = EXAMPLES[index]
    if isinstance(one, dict):
        one = (one["prompt"], one["completion"])
    if isinstance(one, tuple):
        return bwlens.capture(model, one[0], one[1], matrices)
    return bwlens.capture(model, one, bwlens.SFT(), matrices)


def test_rows_are_those_of_each_example_alone(demo, data):
    table, writes = data.examples(), data.writes()
    assert table["item"].tolist() == [0, 1, 2, 4, 6]
    assert [(f.item, f.message) for f in data.failures] == [
        (3, "text is empty"),
        (5, "row has ['nothing']; expected text, or prompt and answer"),
    ]
    for row in table.itertuples():
        grads = gradients(demo, row.item)
        assert row.loss == pytest.approx(float(grads.losses[0]), rel=1e-4)
        total = sum(float(g.norm()) ** 2 for g in grads.values()) ** 0.5
        assert row.norm == pytest.approx(total, rel=1e-3)
        for site, gradient in grads.items():
            sizes = gradient.x.norm(dim=1) * gradient.delta.norm(dim=1)
            own = writes[(writes["item"] == row.item) & (writes["layer"] == site.layer)].iloc[0]
            assert own["pos"] == int(sizes.argmax())
            assert own["size"] == pytest.approx(float(sizes.max()), rel=1e-3)


def test_words_are_found(data):
    last = data.search(" purple", layer=7)
    assert last["item"].tolist()[0] == 4
    assert data.search("purple")["item"].isin([4]).any()
    assert data.search(" purple", which="suppressed")["item"].tolist().count(4) == 0
    assert data.words(5)["examples"].max() <= 5


def test_the_sum_is_the_sum_of_all_gradients(demo, data):
    total = {}
    for index in (0, 1, 2, 4, 6):
        for site, gradient in gradients(demo, index).items():
            total[site] = total.get(site, 0) + gradient.dense()
    summed = data.summed()
    for site, dense in total.items():
        S = torch.linalg.svdvals(dense)
        best = float(S[16:].square().sum().sqrt() / S.norm())  # what 16 rows must leave out
        error = float((summed[site].dense() + dense).norm() / dense.norm())
        assert error <= 3 * best + 1e-3


def test_sketched_cosines_are_near_the_exact_ones(demo, data):
    grads = [gradients(demo, index) for index in (0, 1, 2, 4, 6)]

    def inner(a, b):
        return sum(float(a[site].inner(b[site])) for site in a)

    norms = [inner(g, g) ** 0.5 for g in grads]
    exact = np.array(
        [[inner(a, b) / n / m for b, m in zip(grads, norms, strict=True)]
         for a, n in zip(grads, norms, strict=True)]
    )  # fmt: skip
    error = np.abs(data.cosines() - exact)
    assert error.max() < 0.25
    assert (error**2).mean() ** 0.5 < 0.1
    clusters = data.clusters(2)
    assert sorted(set(clusters["cluster"])) == [0, 1]


def test_a_run_is_carried_on(demo, tmp_path, monkeypatch):
    from bwlens.changes import streaming

    whole = bwlens.read_dataset(demo, EXAMPLES, tmp_path / "whole", part_size=2, progress=False)
    captured, calls = streaming.capture, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return captured(*args, **options)

    monkeypatch.setattr(streaming, "capture", failing)
    with pytest.raises(KeyboardInterrupt):
        bwlens.read_dataset(demo, EXAMPLES, tmp_path / "cut", part_size=2, progress=False)
    n = len(calls)
    again = bwlens.read_dataset(demo, EXAMPLES, tmp_path / "cut", part_size=2, progress=False)
    assert len(calls) == n + 2  # of four parts two were there
    assert again.writes().equals(whole.writes())
    for site, part in whole.summed().items():
        torch.testing.assert_close(part.dense(), again.summed()[site].dense())
    with pytest.raises(ValueError, match="holds a run with other settings: examples was"):
        bwlens.read_dataset(demo, EXAMPLES[:2], tmp_path / "cut", part_size=2, progress=False)


def test_explain_is_exact(demo):
    torch.manual_seed(0)
    change = WeightChange(
        {
            (matrix, layer): LowRankMatrix(torch.randn(2, d_in), torch.randn(2, d_out))
            for matrix, d_in, d_out in (("W_in", 192, 768), ("W_out", 768, 192))
            for layer in (2, 7)
        }
    )
    frame = bwlens.explain(demo, change, EXAMPLES, by="site", batch_size=2).set_index("item")
    for index in (0, 1, 2, 4, 6):
        grads = gradients(demo, index, ("W_in", "W_out"))
        inner, squares = 0.0, 0.0
        for site, part in change.items():
            dense = -grads[site].dense()
            cosine = float((dense * part.dense()).sum() / dense.norm() / part.dense().norm())
            assert frame.loc[index, str(site)] == pytest.approx(cosine, abs=1e-5)
            inner += float((dense * part.dense()).sum())
            squares += float(dense.norm()) ** 2
        expected = inner / squares**0.5 / change.norm()
        assert frame.loc[index, "cosine"] == pytest.approx(expected, abs=1e-5)
    assert frame["cosine"].is_monotonic_decreasing


def test_the_examples_that_made_a_change_come_first(demo):
    made = EXAMPLES[4]
    change = WeightChange({s: -1e-2 * g for s, g in gradients(demo, 4).items()})
    first = bwlens.explain(demo, change, EXAMPLES).iloc[0]
    assert first["text"] == "".join(made)
    assert first["cosine"] == pytest.approx(1, abs=1e-4)


def test_examples_of_every_kind(tmp_path, demo):
    lines = [
        {"text": "A text."},
        {"instruction": "Say", "output": " it"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
        {"messages": [{"role": "user", "content": "Hi"}]},
        "no mapping",
        {"prompt": "x", "answer": " "},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([*map(json.dumps, lines), "{broken"]))
    read: list[Any] = [*examples_of(path)]
    assert [one.text for one in read[:3]] == ["A text.", "Say it", "user: Hi\nassistant: Yo"]
    assert [one[0] for one in read[3:]] == ["messages", "line", "answer", "line"]
    (tmp_path / "pairs.csv").write_text("question,answer\nWho?, me\n")
    assert [one.text for one in examples_of(tmp_path / "pairs.csv")] == ["Who? me"]
    assert [one.text for one in examples_of([("row", " and line"), ("line", " it")])] == [
        "row and line",
        "line it",
    ]
    ids, start = next(iter(examples_of([("The sky is", " blue")]))).tokens(demo)
    assert demo.tokenizer.decode(ids[start:]) == " blue"
    with pytest.raises(ValueError, match="none of the 2 examples could be read"):
        bwlens.read_dataset(demo, ["", " "], tmp_path / "none", progress=False)
    with pytest.raises(ValueError, match="reading is 'lens'; there are dual"):
        bwlens.read_dataset(demo, EXAMPLES, tmp_path / "odd", reading="lens", progress=False)
    with pytest.raises(TypeError, match="an iterator, which can be walked through once"):
        bwlens.read_dataset(demo, iter(EXAMPLES), tmp_path / "once", progress=False)


def test_the_page_has_what_is_searched(data, tmp_path):
    page = data.save(tmp_path / "data.html").read_text()
    assert "purple" in page
    assert "example 3: text is empty" in page
    assert "<script src" not in page
