"""The mapped shift: values by hand from other edits', no backward pass, file and folder."""

import pytest
import torch

import bwlens
from bwlens import Edit, Site
from bwlens.edit import ValueMap, key_statistics, mapped_shift, subject_shift
from tests import oracle, tiny
from tests.edit.test_subject_shift import TEXTS

PREFIXES = ("t20 t21",)


def word(i):
    return f"t{4 + i % 57}"


EDITS = [Edit(f"{{}} {word(3 * i)} t30", word(7 * i), f" {word(5 * i + 1)}") for i in range(40)]
NEW = Edit("{} t9 t30 t41", subject="t5 t6", target_new=" t17 t20")


def fit(model, edits=EDITS[:9], **more):
    settings = {"layer": 1, "read_layer": 2, "steps": 2, "log_odds": 1.0, "prefixes": PREFIXES}
    return ValueMap.fit(model, edits, prepend_bos=False, progress=False, **(settings | more))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_map_by_hand(name, boot):
    """Values as `subject_shift` finds them; kernel and sum written out, on an unbridged copy."""
    model, hf = boot(name), tiny.hf_model(name)
    statistics = key_statistics(model, TEXTS, cache=False)
    fitted = fit(model, ridge=0.5)
    settings = {"layer": 1, "prefixes": PREFIXES, "prepend_bos": False, "statistics": statistics}
    values = torch.stack(
        [
            subject_shift(model, edit, steps=2, log_odds=1.0, **settings)["W_out", 1].delta[0]
            for edit in EDITS[:9]
        ]
    ).double()
    unembedding = hf.get_output_embeddings().weight.detach().double()

    def features(edit):
        ids, seen = [int(t[1:]) for t in edit.text.split()], []
        handle = oracle.layers(hf)[2].register_forward_hook(
            lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            hf(torch.tensor([ids]))
        handle.remove()
        target = [int(t[1:]) for t in edit.target_new.split()]
        return unembedding[target].mean(0), seen[0].reshape(-1, seen[0].shape[-1])[-1].double()

    known = [features(edit) for edit in EDITS[:9]]
    centres = [torch.stack(side).mean(0) for side in zip(*known, strict=True)]

    def kernel(a, b):
        cosines = [
            torch.cosine_similarity(x - c, y - c, dim=0)
            for x, y, c in zip(a, b, centres, strict=True)
        ]
        return torch.exp(sum(cosines) - 2)

    gram = torch.stack([torch.stack([kernel(a, b) for b in known]) for a in known])
    weights = torch.linalg.solve(gram + 0.5 * torch.eye(9), values - values.mean(0))
    row = torch.stack([kernel(features(NEW), b) for b in known])
    expected = 3 * (values.mean(0) + row @ weights)
    change = mapped_shift(model, NEW, fitted=fitted, scale=3.0, prefixes=PREFIXES,
                          prepend_bos=False, statistics=statistics)  # fmt: skip
    part = change["W_out", 1]
    torch.testing.assert_close(part.delta[0].double(), expected, rtol=1e-2, atol=1e-3)
    whitened = subject_shift(model, NEW, **settings)["W_out", 1].x
    torch.testing.assert_close(part.x, whitened, rtol=1e-3, atol=1e-4)


def test_no_backward_pass(boot, monkeypatch):
    model = boot("llama")
    fitted, statistics = fit(model), key_statistics(model, TEXTS, cache=False)

    def refused(*args, **kwargs):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refused)
    monkeypatch.setattr(torch.Tensor, "backward", refused)
    settings = {"prepend_bos": False, "statistics": statistics}
    assert len(mapped_shift(model, [NEW, EDITS[30]], fitted=fitted, **settings)["W_out", 1].x) == 2
    with pytest.raises(AssertionError, match="a backward pass"):
        subject_shift(model, NEW, layer=1, **settings)


def test_folder_carries_on_and_file_comes_back(boot, tmp_path, monkeypatch):
    model = boot("gpt2")
    undisturbed = fit(model, EDITS)
    calls = []
    plain = bwlens.edit._mapped_shift.values_of

    def stopped(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr("bwlens.edit._mapped_shift.values_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(model, EDITS, folder=tmp_path / "run")
    again = fit(model, EDITS, folder=tmp_path / "run")
    assert len(calls) == 3  # the first part of two is not done again
    with pytest.raises(ValueError, match="other settings"):
        fit(model, EDITS, folder=tmp_path / "run", clamp=1.0)
    read = ValueMap.load(again.save(tmp_path / "map.safetensors"))
    for name, tensor in undisturbed.tensors.items():
        torch.testing.assert_close(read.tensors[name], tensor)
    assert (read.layer, read.read_layer, repr(read)) == (1, 2, repr(undisturbed))
    assert "of 40 edits" in repr(read)


def test_refusals(boot):
    model, other = boot("gpt2"), boot("llama")
    statistics = key_statistics(other, TEXTS, cache=False)
    with pytest.raises(ValueError, match="fitted on another model"):
        mapped_shift(other, NEW, fitted=fit(model), statistics=statistics)
    with pytest.raises(ValueError, match="3 edits to fit a map to"):
        fit(model, EDITS[:3])
    with pytest.raises(ValueError, match=r"ridge is 0\.0"):
        fit(model, ridge=0.0)
    assert "W_out of layer 1" in str(Site("W_out", 1))
