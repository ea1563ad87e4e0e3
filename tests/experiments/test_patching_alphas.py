"""Patching over alpha: rows are those of the patched model, on prompts that did not train."""

import pytest
import torch

import bwlens
from bwlens.attention.patching import every_place, of_other_heads
from bwlens.experiments._head_ranking import induction
from bwlens.experiments._patching_alphas import commonest_length

PROMPTS, TARGETS = induction(61, n_prompts=6, length=4, lowest=4)
SETTINGS = {"n_training": 2, "alphas": (0.0, -20.0), "batch_size": 3}


def test_rows_are_those_of_the_patched_model(boot, tmp_path):
    model = boot("llama")
    result = bwlens.experiments.patching_alphas(model, PROMPTS, TARGETS, **SETTINGS, out=tmp_path)
    goal = torch.tensor(TARGETS[2:])

    def losses():
        with torch.no_grad():
            return -model(torch.tensor(PROMPTS[2:]))[:, -1].log_softmax(-1).gather(1, goal)[:, 0]

    def rows(kind, alpha):
        both = (result.rows["kind"] == kind) & (result.rows["alpha"] == alpha)
        return torch.tensor(result.rows[both]["loss"].to_numpy())

    maps = bwlens.reversed_attention(model, PROMPTS[:2], [t[0] for t in TARGETS[:2]])
    for kind in ("reversed", "forward"):
        torch.testing.assert_close(rows(kind, 0.0), losses())
        with bwlens.attention_patching(model, maps, -20.0, kind=kind):
            torch.testing.assert_close(rows(kind, -20.0), losses())
    with bwlens.attention_patching(model, of_other_heads(maps), -20.0):
        torch.testing.assert_close(rows("other heads", -20.0), losses())
    assert not torch.equal(rows("reversed", -20.0), rows("other heads", -20.0))
    again = bwlens.experiments.patching_alphas(model, PROMPTS, TARGETS, **SETTINGS, out=tmp_path)
    assert again.summary("loss").equals(result.summary("loss"))
    assert len(result.plot().axes[0].lines) == 4


def test_every_head_gets_another_s_map(bridge):
    maps = bwlens.reversed_attention(bridge("llama"), PROMPTS[0], 17)
    other = of_other_heads(maps)
    norms = sorted(float(maps.map(*place).norm()) for place in every_place(maps))
    assert norms == sorted(float(other.map(*place).norm()) for place in every_place(maps))
    for place in every_place(maps):
        assert not torch.equal(maps.map(*place), other.map(*place))
    with pytest.raises(ValueError, match="one head has no other"):
        of_other_heads(
            bwlens.reversed_attention(bridge("llama"), PROMPTS[0], 17, layers=0, heads=0)
        )


def test_the_commonest_length(bridge):
    prompts = ["t5 t6", "t7", "t8 t9", "t8 t9", "t4 t5 t6", "t7 t7 t7"]
    kept = commonest_length(bridge("gpt2"), prompts, ["t10", "t11", "t12", "t12", "t13", "t14"])
    assert kept == (["t5 t6", "t8 t9"], ["t10", "t12"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["best"]}, r"kinds \['best'\]; expected some of reversed"),
        ({"kinds": []}, r"kinds \[\]; expected some of reversed"),
        ({"n_training": 6}, "n_training is 6 of 6 prompts"),
        ({"prompts": [*PROMPTS[:5], [5, 9]]}, "the prompts have 2 to 7 tokens"),
        ({"targets": TARGETS[1:]}, "6 prompts but 5 targets"),
    ],
)
def test_bad_settings(change, message, bridge):
    given = {"prompts": PROMPTS, "targets": TARGETS, **SETTINGS, **change}
    with pytest.raises(ValueError, match=message):
        bwlens.experiments.patching_alphas(bridge("llama"), **given)
