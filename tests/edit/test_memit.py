"""MEMIT solves its normal equations in each layer and spreads what is missing."""

import pytest
import torch

from bwlens import Edit, Site
from bwlens.changes.change import WeightChange
from bwlens.edit._memit import memit, normal_rows
from bwlens.edit.counting import key_statistics
from bwlens.edit.keys import contexts_of, keys_of
from bwlens.edit.value import ValueSearch, ValueSettings
from bwlens.model.passes import run
from bwlens.model.sites import Point
from tests import tiny

EDITS = [
    Edit("{} t9 t30 t41", subject="t5 t6", target_new=" t17"),
    Edit("{} t8", subject="t7", target_new=" t23 t44"),
    Edit("t12 {} t21 t50", subject="t33", target_new=" t9"),
]
PREFIXES = ("t20 t21",)
TEXTS = [" ".join(f"t{4 + (7 * i + 3 * j * j) % 57}" for j in range(40)) for i in range(12)]
SETTINGS = {"layers": [0, 1], "steps": 4, "prefixes": PREFIXES}


def stream_after(model, batch, layer):
    point = Point(model.blocks[layer], "output")
    return run(model, batch.tokens, points=[point]).seen[point][0]


def test_rows_are_the_normal_equations(bridge):
    one = key_statistics(bridge("gpt2"), TEXTS, cache=False)[Site("W_out", 1)]
    keys = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for weight in (0.5, 30.0):
        rows, k = normal_rows(one, keys, weight), keys.double()
        expected = torch.linalg.solve(weight * one.second_moment + k.T @ k, k.T).T
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-8)
    # With no weight on the text, each row answers to its own key alone.
    rows = normal_rows(one, keys, 0.0)
    torch.testing.assert_close(rows @ keys.double().T, torch.eye(3).double())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_against_the_algorithm_written_out(name, boot):
    model = boot(name)
    held = key_statistics(model, TEXTS, cache=False)
    change = memit(model, EDITS, weight=5.0, statistics=held, **SETTINGS)
    sites = [Site("W_out", layer) for layer in range(2)]
    assert list(change) == sites
    plain = contexts_of(model, EDITS, (), "subject", None, targets=False)
    around = contexts_of(model, EDITS, PREFIXES, "subject", None, targets=False)
    search = ValueSearch(ValueSettings(steps=4, clamp=0.75), PREFIXES, "subject", None)
    goals = []
    for edit in EDITS:
        value = search.values(model, [edit], sites[-1], of_stream=True)[0]
        alone = contexts_of(model, [edit], (), "subject", None, targets=False)
        goals.append(alone.at(stream_after(model, alone.batch, 1))[0, 0] + value.delta)
    twin, goal = tiny.bridge(name, model.tokenizer), torch.stack(goals)
    for site, left in zip(sites, (2, 1), strict=True):
        keys = around.at(keys_of(twin, around.batch, "W_out", site.layer)[site]).mean(1).double()
        missing = goal - plain.at(stream_after(twin, plain.batch, 1))[:, 0]
        system = 5.0 * held[site].second_moment + keys.T @ keys
        expected = torch.linalg.solve(system, keys.T @ (missing.double() / left))
        torch.testing.assert_close(change[site].dense().double(), expected, rtol=1e-3, atol=1e-4)
        WeightChange({site: change[site]}).apply(twin)


def test_what_is_missing_is_spread_and_shrinks(boot):
    model = boot("gpt2")
    held = key_statistics(model, TEXTS, cache=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change = memit(model, EDITS, weight=1e-6, statistics=held, **SETTINGS)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    first, *_, last = change.details["missing"]
    assert last < 0.5 * first
    # With nothing held back, W_out writes half of what is missing at the mean keys in layer 0.
    around = contexts_of(model, EDITS, PREFIXES, "subject", None, targets=False)
    keys = around.at(keys_of(model, around.batch, ["W_out"], 0)[Site("W_out", 0)]).mean(1)
    written = (keys @ change["W_out", 0].dense()).norm(dim=1).mean()
    assert float(written) == pytest.approx(first / 2, rel=1e-2)


def test_more_weight_on_the_text_writes_less(boot):
    model = boot("gpt2")
    held = key_statistics(model, TEXTS, cache=False)
    norms = [
        memit(
            model, EDITS[0], layers=1, steps=4, prefixes=(), weight=weight, statistics=held
        ).norm()
        for weight in (1.0, 100.0, 10_000.0)
    ]
    assert norms[0] > norms[1] > norms[2] > 0


def test_bad_input(boot):
    model = boot("gpt2")
    with pytest.raises(ValueError, match="weight is 0"):
        memit(model, EDITS, weight=0.0)
    with pytest.raises(ValueError, match="key statistics"):
        memit(model, EDITS, layers=1)
    with pytest.raises(NotImplementedError, match="mixture"):
        memit(boot("mixtral"), EDITS, layers=1, statistics={})


def test_several_facts_of_the_demo_model(demo):
    facts = [
        Edit("{} plays for", "Lionel Messi", " Paris"),
        Edit("{}, developed by", "iPod Nano", " Google"),
    ]
    change = memit(demo, facts, layers=[4, 5], position="last", prefixes=(), weight=1.0, clamp=4.0)
    with change.applied(demo), torch.no_grad():
        for fact in facts:
            answer = int(demo(fact.text)[0, -1].argmax())
            assert demo.tokenizer.decode([answer]) == fact.target_new
