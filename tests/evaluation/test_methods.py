"""Methods in any form, their settings and statistics."""

import json
from functools import partial

import pytest
import torch

from bwlens.data.prose import read_prose
from bwlens.data.records import read_records
from bwlens.edit import key_statistics
from bwlens.evaluation.methods import editing_methods, methods_of, with_statistics
from tests.evaluation.made_up import nudge

# Methods.


def test_methods_in_any_form():
    (none,) = methods_of("none")
    assert none.function is None
    named = methods_of({"a": nudge, "b": partial(nudge, scale=2.0), "original": None})
    assert [m.name for m in named] == ["a", "b", "original"]
    assert named[1].described()["settings"] == {"scale": 2.0}
    assert named[1].described()["function"].endswith("made_up.nudge")
    (one,) = methods_of(nudge, {"scale": 3.0})
    assert (one.name, one.settings) == ("nudge", {"scale": 3.0})
    both = methods_of(["none", nudge], {"scale": 3.0})
    assert [m.settings for m in both] == [{}, {"scale": 3.0}]
    each = methods_of({"a": nudge, "b": nudge}, {"b": {"scale": 2.0}})
    assert [m.settings for m in each] == [{}, {"scale": 2.0}]
    assert {"forward_pass_shift", "gradient_step", "fine_tune"} <= set(editing_methods())
    assert methods_of("forward_pass_shift")[0].name == "forward_pass_shift"


def test_a_file_among_the_settings_is_what_it_holds(tmp_path):
    def described(path, holds):
        path.write_bytes(holds)
        return methods_of(nudge, {"scale": path})[0].described()

    first = described(tmp_path / "a", b"one")
    assert described(tmp_path / "b", b"one") == first
    assert methods_of(nudge, {"scale": str(tmp_path / "b")})[0].described() == first
    assert described(tmp_path / "a", b"two") != first


def test_statistics_for_the_methods_that_take_some(demo):
    stories = read_prose("demo")
    first, second = (key_statistics(demo, stories[i:60], cache=False) for i in (0, 1))
    given = methods_of(["none", "rome", "forward_pass_shift", "memit"])
    chosen = with_statistics(given, first)
    assert ["statistics" in one.settings for one in chosen] == [False, True, False, True]
    # A run on disk hangs on what they hold, and on no object.
    described = chosen[1].described()
    assert json.loads(json.dumps(described)) == described
    assert with_statistics(given, dict(first))[1].described() == described
    assert with_statistics(given, second)[1].described() != described
    edit = read_records("demo")[0].edit
    few = methods_of(chosen[1], {"prefixes": (), "steps": 1})[0]
    shipped = methods_of("rome", {"prefixes": (), "steps": 1})[0]
    assert not torch.equal(*(m(demo, edit)["W_out", 2].dense() for m in (few, shipped)))
    with pytest.raises(ValueError, match="no method takes any: none, forward_pass_shift"):
        with_statistics(given[::2], first)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("nonsense", None, "no editing method 'nonsense'; there are none"),
        (nudge, {"speed": 1}, "nudge has no setting 'speed'; it has scale, layer"),
        ({"a": nudge, "b": nudge}, {"scale": 1}, "scale is none of a, b; say whose they are"),
        ("none", {"scale": 1}, "settings belong to one method"),
        ({"a": nudge, "b": nudge}, {"c": {"scale": 1}}, "c is none of a, b"),
        ({"a": nudge, "b": nudge}, {"a": {"speed": 1}}, "a has no setting 'speed'"),
        (nudge, {"speed": {}}, "nudge has no setting 'speed'"),
        ([nudge, nudge], None, "two methods have one name"),
        ([], None, "no method given"),
        (3, None, "expected an editing method"),
        ("gradient_step", None, "gradient_step needs a setting 'lr'"),
    ],
)
def test_methods_that_cannot_be(method, settings, message):
    with pytest.raises(ValueError, match=message):
        methods_of(method, settings)
