"""Trust: a reading held against real steps, word by word, and a delta that is no gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bwlens
from bwlens import Site
from bwlens.gradient.objectives import NLL
from bwlens.gradient.probe import UntrueGradientError
from bwlens.model.head import head_of
from bwlens.reading.effect import EffectOf
from bwlens.reading.readouts import readout
from bwlens.reading.scoring import all_scores
from bwlens.reading.trust import FLOOR, TOP, agreement, measure_trust, other_deltas
from tests import tiny
from tests.reading.test_readings import TOKENS, effect_by_hand, scores_of


def pearson(one, other):
    """By its definition, a number at a time."""
    one, other = [float(a) for a in one], [float(b) for b in other]
    mean = [sum(side) / len(side) for side in (one, other)]
    pairs = [(a - mean[0], b - mean[1]) for a, b in zip(one, other, strict=True)]
    square = [sum(pair[side] ** 2 for pair in pairs) for side in (0, 1)]
    return sum(a * b for a, b in pairs) / (square[0] * square[1]) ** 0.5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_trust_is_what_steps_in_an_unbridged_copy_say(name, bridge):
    """Word by word, in float64; with a reading of each word by its definition."""
    model = bridge(name)
    lens = bwlens.backward_lens(model, torch.tensor(TOKENS), NLL([17]), trust=True)
    trust, vocab = lens.trust, head_of(model).W_U.shape[1]
    assert trust.position == 4
    assert trust.layers == lens.layers
    for layer in trust.layers:
        delta = lens.gradient("W_out", layer).delta[4]
        effect = effect_by_hand(name, Site("W_out", layer), 4, delta, 17).tolist()
        said = (-scores_of(head_of(model), delta[None])[0]).tolist()
        assert float(trust.vocabulary[layer]) == pytest.approx(pearson(said, effect), abs=0.01)
        assert float(trust.fall[layer]) == pytest.approx(1, abs=0.02)
        for sign, share in ((1, trust.promoted[layer]), (-1, trust.suppressed[layer])):
            one, other = (
                set(sorted(range(vocab), key=lambda i, s=s: -sign * s[i])[:TOP])
                for s in (said, effect)
            )
            assert abs(len(one & other) / TOP - float(share)) <= 1 / TOP  # ties of the difference


def test_the_likely_words_alone():
    """The likeliest thousand are told apart from the rest."""
    likely = torch.rand(3000, generator=torch.Generator().manual_seed(0)).softmax(0)
    order = likely.argsort(descending=True)
    effects = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1))
    scores = effects.clone()
    scores[0, order[1000:]] *= -1
    found = agreement(scores, effects, likely)
    assert float(found.plausible) == pytest.approx(1.0)
    assert float(found.vocabulary) == pytest.approx(pearson(scores[0], effects[0]), abs=1e-5)
    assert float(found.vocabulary) < 0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_all_scores_are_the_readouts(name, normalize, bridge):
    head = head_of(bridge(name))
    rows = torch.randn(3, head.W_U.shape[0], generator=torch.Generator().manual_seed(0))
    rows[1] = 0
    vocab = head.W_U.shape[1]
    read = readout(head, rows, top_k=vocab, normalize=normalize)
    scores = all_scores(head, rows, normalize)
    assert scores[1].isnan().all()
    for at in (0, 2):
        torch.testing.assert_close(scores[at, read.top_ids[at]], read.top_scores[at])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", [*tiny.CONFIGS])
def test_every_architecture_whose_effects_are_read(name, bridge):
    model, tokens = bridge(name), torch.tensor(TOKENS)
    if any(site.expert is not None for site in bwlens.capture(model, tokens, NLL([17]), "W_out")):
        with pytest.raises(NotImplementedError, match="expert"):
            bwlens.backward_lens(model, tokens, NLL([17]), trust=True)
        return
    lens = bwlens.backward_lens(model, tokens, NLL([17]), trust=True)
    assert lens.trust.fall.sub(1).abs().max() < 0.05
    assert lens.trust.plausible.isfinite().all()
    assert lens.trust.other.isfinite().all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_step_is_the_effect(name, bridge):
    """The cheap difference against the one of two sizes."""
    model, objective = bridge(name), NLL([17])
    grads = bwlens.capture(model, torch.tensor(TOKENS), objective, "W_out")
    task = EffectOf(model, grads, objective)
    cells = [(Site("W_out", layer), pos) for layer, pos in ((0, 1), (1, 4), (2, 4), (2, 0))]
    quick, fall = task.along(cells, [grads[site].delta[pos] for site, pos in cells])
    slow = task.of(cells)
    for at in range(3):
        assert pearson(quick[at], slow.scores[at]) > 0.999
    assert quick[3].isnan().all()
    assert fall[3].isnan()


FAULTS = {
    "doubled": lambda delta: 2 * delta,
    "of the other sign": lambda delta: -delta,
    "with a stranger's share": lambda delta: delta + delta.norm() * 0.1,
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_delta_that_is_no_gradient_is_refused(fault, bridge):
    model, objective = bridge("llama"), NLL([17])
    grads = bwlens.capture(model, torch.tensor(TOKENS), objective, "W_out")
    measure_trust(model, grads, objective, "W_out", [0, 1, 2], [4])
    right = grads["W_out", 1]
    wrong = replace(right, delta=FAULTS[fault](right.delta))
    held = {site: wrong if site.layer == 1 else grads[site] for site in grads}
    with pytest.raises(
        UntrueGradientError, match=r"W_out.*1.* was to lower the loss by .* 3 cells"
    ):
        measure_trust(model, replace(grads, _parts=held), objective, "W_out", [0, 1, 2], [4])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("reading", ["plain", "dual", "cosine", "effect"])
def test_what_a_lens_says_of_itself(reading, bridge):
    lens = bwlens.backward_lens(
        bridge("llama"), torch.tensor(TOKENS), NLL([17]), reading=reading, trust=True
    )
    trust = lens.trust
    table = trust.to_frame()
    assert table["layer"].tolist() == [0, 1, 2]
    assert f"{reading} reading" in str(trust)
    for at, verdict in enumerate(table["verdict"]):
        believed = bool(trust.believable[at])
        assert believed == (verdict in ("good", "some"))
        assert not believed or float(trust.plausible[at]) >= FLOOR
        assert trust.sentence(at).startswith(f"Layer {at}:")
    if reading == "effect":
        assert trust.plausible.min() > 0.999


@pytest.mark.usefixtures("unchecked")
def test_trust_at_several_positions(bridge):
    """At each what it is where that alone is asked for."""
    model, tokens = bridge("llama"), torch.tensor(TOKENS)
    lens = bwlens.backward_lens(model, tokens, NLL([17]), trust=[1, -1])
    assert lens.trust_positions == (1, 4)
    assert lens.trust is lens.trust_at(-1)
    for position in (1, 4):
        alone = bwlens.backward_lens(model, tokens, NLL([17]), trust=position).trust
        here = lens.trust_at(position)
        assert here.position == alone.position == position
        torch.testing.assert_close(here.plausible[:2], alone.plausible[:2])
        assert here.to_frame()["position"].tolist() == [position] * 3
    assert lens.trust_at(1).fall[:2].sub(1).abs().max() < 0.05
    assert lens.trust_at(1).plausible[2].isnan()  # no gradient in the last layer but at the last
    with pytest.raises(ValueError, match="not measured at position 2, but at 1, 4"):
        lens.trust_at(2)
    for wrong, words in ((7, "trust is 7, but the prompt has"), ("subject", "trust is 'subject'")):
        with pytest.raises(ValueError, match=words):
            bwlens.backward_lens(model, tokens, NLL([17]), trust=wrong)


@pytest.mark.usefixtures("unchecked")
def test_the_other_prompt_is_another_and_of_the_weights_as_they_are(boot):
    """Its delta is not the prompt's own, and is worked out again when a weight is written to."""
    model = boot("llama")
    ids = torch.tensor([int(part * 61) for part in (0.11, 0.31, 0.53, 0.71)])
    controls = []
    for target in (int(0.83 * 61), int(0.17 * 61)):
        grads = bwlens.capture(model, ids, NLL([target]), "W_out")
        other = other_deltas(model, grads, "W_out", [0, 1])
        assert not torch.allclose(other, torch.stack([grads["W_out", k].delta[3] for k in (0, 1)]))
        assert other_deltas(model, grads, "W_out", [0, 1]) is other
        controls.append(other)
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim == 2).mul_(1.5)
    assert not torch.allclose(other_deltas(model, grads, "W_out", [0, 1]), controls[1])


@pytest.mark.usefixtures("unchecked")
def test_a_lens_without_trust_says_how_to_have_it(bridge):
    lens = bwlens.backward_lens(bridge("llama"), torch.tensor(TOKENS), NLL([17]))
    assert not lens.has_trust
    with pytest.raises(ValueError, match=r"backward_lens\(\.\.\., trust=True\)"):
        _ = lens.trust
    with pytest.raises(ValueError, match="W_in are not read through delta"):
        bwlens.backward_lens(
            bridge("llama"), torch.tensor(TOKENS), NLL([17]), matrices="W_in", trust=True
        )


@pytest.mark.usefixtures("unchecked")
def test_the_model_is_left_as_it_was(bridge):
    model = bridge("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    state = torch.get_rng_state()
    bwlens.backward_lens(model, torch.tensor(TOKENS), NLL([17]), trust=True)
    assert torch.equal(state, torch.get_rng_state())
    assert hooks == sum(len(m._forward_hooks) for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
