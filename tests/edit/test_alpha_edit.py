"""AlphaEdit writes in the null space of the text's keys, and reaches its values there."""

import pytest
import torch

from bwlens import Edit, Site
from bwlens.changes.change import WeightChange
from bwlens.edit import alpha_edit, key_statistics, memit
from bwlens.edit._alpha_edit import null_space
from bwlens.edit.keys import contexts_of, keys_of
from tests import tiny

EDITS = [
    Edit("{} t9 t30 t41", subject="t5 t6", target_new=" t17"),
    Edit("{} t8", subject="t7", target_new=" t23 t44"),
    Edit("t12 {} t21 t50", subject="t33", target_new=" t9"),
]
PREFIXES = ("t20 t21",)
TEXTS = [" ".join(f"t{4 + (7 * i + 3 * j * j) % 57}" for j in range(40)) for i in range(12)]
SETTINGS = {"layers": [0, 1], "steps": 3, "prefixes": PREFIXES, "threshold": 0.3}


def keys(model, edits, layer):
    contexts = contexts_of(model, edits, PREFIXES, "subject", None, targets=False)
    return contexts.at(keys_of(model, contexts.batch, "W_out", layer)[Site("W_out", layer)]).mean(1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_papers_equation_in_each_layer(name, boot):
    """With earlier edits, the system solved as it is written, on a twin changed layer by layer."""
    model = boot(name)
    held = key_statistics(model, TEXTS, cache=False)
    change = alpha_edit(model, EDITS[:2], previous=EDITS[2], ridge=0.2, statistics=held, **SETTINGS)
    assert [site.layer for site in change] == [0, 1]
    twin = tiny.bridge(name, model.tokenizer)
    for site, dimension in zip(change, change.details["dimensions"], strict=True):
        sizes, vectors = torch.linalg.eigh(held[site].second_moment)
        span = vectors[:, sizes < 0.3 * sizes.mean()]
        assert 0 < span.shape[1] == dimension < len(sizes)
        p, k = span @ span.T, keys(twin, EDITS[:2], site.layer).double()
        k_p = keys(twin, EDITS[2:], site.layer).double()
        weight = 0.2 * (k @ p).square().sum(1).mean() * torch.eye(len(p))
        system = p @ (k.T @ k + k_p.T @ k_p) + weight
        expected = torch.linalg.solve(system, p @ k.T @ change[site].delta.double())
        torch.testing.assert_close(change[site].dense().double(), expected, rtol=1e-3, atol=1e-5)
        WeightChange({site: change[site]}).apply(twin)


def test_keys_outside_the_null_space_keep_their_outputs(boot):
    model = boot("llama")
    held = key_statistics(model, TEXTS, cache=False)
    change = alpha_edit(model, EDITS, statistics=held, **SETTINGS)
    freely = memit(model, EDITS, statistics=held, layers=[0, 1], steps=3, prefixes=PREFIXES)
    for site in change:
        span = null_space(held[site], 0.3)
        text = keys(model, EDITS, site.layer).double()
        preserved = text - text @ span @ span.T
        moved = (preserved @ change[site].dense().double()).norm()
        assert moved < 1e-5 * (text @ change[site].dense().double()).norm()
        assert (preserved @ freely[site].dense().double()).norm() > 1e-3


def test_earlier_edits_keep_what_they_give(boot):
    model = boot("gpt2")
    held = key_statistics(model, TEXTS, cache=False)
    settings = SETTINGS | {"layers": 1, "ridge": 1e-4}
    old, new = keys(model, EDITS[2:], 1), keys(model, EDITS[:2], 1)
    moved = [
        (old @ change["W_out", 1].dense()).norm() / (new @ change["W_out", 1].dense()).norm()
        for change in (
            alpha_edit(model, EDITS[:2], statistics=held, **settings),
            alpha_edit(model, EDITS[:2], previous=EDITS[2], statistics=held, **settings),
        )
    ]
    assert moved[1] < 1e-2 < moved[0]


def test_the_values_are_reached(boot):
    """Of one edit and of several at once, the closer the smaller lambda is."""
    model = boot("gpt2")
    held = key_statistics(model, TEXTS, cache=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for edits in (EDITS[0], EDITS):
        shares = []
        for ridge in (1e-4, 1.0):
            settings = SETTINGS | {"prefixes": (), "ridge": ridge}
            first, *_, last = alpha_edit(model, edits, statistics=held, **settings).details[
                "missing"
            ]
            shares.append(last / first)
        assert shares[0] < 0.3 < shares[1]
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_bad_input(boot):
    model = boot("gpt2")
    held = key_statistics(model, TEXTS, cache=False)
    with pytest.raises(ValueError, match=r"threshold is 1e-09, and no eigenvalue of W_out"):
        alpha_edit(model, EDITS, layers=1, threshold=1e-9, statistics=held)
    with pytest.raises(ValueError, match="ridge is 0"):
        alpha_edit(model, EDITS, layers=1, ridge=0.0, statistics=held)
    with pytest.raises(ValueError, match="key statistics"):
        alpha_edit(model, EDITS, layers=1)
    with pytest.raises(NotImplementedError, match="mixture"):
        alpha_edit(boot("mixtral"), EDITS, layers=1, statistics={})


def test_several_facts_of_the_demo_model(demo):
    facts = [
        Edit("{} plays for", "Lionel Messi", " Paris"),
        Edit("{}, developed by", "iPod Nano", " Google"),
    ]
    change = alpha_edit(demo, facts, layers=[4, 5], position="last", prefixes=(), clamp=4.0)
    with change.applied(demo), torch.no_grad():
        for fact in facts:
            answer = int(demo(fact.text)[0, -1].argmax())
            assert demo.tokenizer.decode([answer]) == fact.target_new
