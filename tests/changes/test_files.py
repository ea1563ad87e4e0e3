"""A change on disk: what is read is what was written, by this version and by earlier ones."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bwlens.changes.change import WeightChange
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.gradient.matrix import LowRankMatrix

X, DELTA = torch.randn(2, 6), torch.randn(2, 4)
FORMAT = {"format": "bwlens.WeightChange", "version": "1"}


def test_a_change_comes_back_as_it_was(tmp_path):
    change = WeightChange(
        {
            ("W_out", 5): LowRankMatrix(X, DELTA),
            ("W_in", 2, 7): LowRankMatrix(DELTA, X),
            ("W_in", 2, "shared"): LowRankGradient(DELTA, X, pos=torch.tensor([0, 3])),
        },
        "a note",
        {"method": "rome", "losses": [1.5, 0.25]},
    )
    again = WeightChange.load(change.save(tmp_path / "change.safetensors"))
    assert list(again) == list(change)
    for site, part in change.items():
        assert type(again[site]) is type(part)
        assert torch.equal(again[site].x, part.x)
        assert torch.equal(again[site].delta, part.delta)
    assert again["W_in", 2, "shared"].pos.tolist() == [0, 3]
    assert (again.note, again.details) == (change.note, change.details)


@pytest.mark.parametrize("about", [{}, {"note": "n", "details": json.dumps({"lr": 0.1})}])
def test_files_of_earlier_versions_are_read(tmp_path, about):
    rows = {"x": X, "delta": DELTA, "prompt": torch.tensor([0, 1]), "pos": torch.tensor([4, 2])}
    tensors = {f"W_out.3.{name}": tensor for name, tensor in rows.items()}
    tensors |= {"W_in.3.x": X.clone(), "W_in.3.delta": DELTA.clone()}
    save_file(tensors, tmp_path / "old.safetensors", FORMAT | about)
    change = WeightChange.load(tmp_path / "old.safetensors")
    assert change["W_out", 3].prompt.tolist() == [0, 1]
    assert change["W_out", 3].pos.tolist() == [4, 2]
    assert torch.equal(change["W_in", 3].dense(), X.T @ DELTA)
    assert change.details == ({"lr": 0.1} if about else {})


def test_other_files_are_refused(tmp_path):
    save_file({"W_out.3.x": X}, tmp_path / "other", {"format": "bwlens.LowRankMatrix"})
    with pytest.raises(ValueError, match=r"expected .*WeightChange.*as WeightChange.save"):
        WeightChange.load(tmp_path / "other")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        WeightChange.load(tmp_path / "text")
