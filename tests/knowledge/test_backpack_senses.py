"""Senses in words, their weights, and a logit as the sum of what they give."""

import copy

import pytest
import torch

import bwlens
from bwlens import knowledge
from tests.knowledge.backpacks import ARMS, bridge, tiny

PROMPT = "Lionel Messi plays for"


@pytest.fixture(scope="module", params=["published", "one store", "signed", "wide, scaled"])
def pair(request):
    """A bridge and an unbridged copy of the same model."""
    model = tiny(**ARMS[request.param]).double()
    return bridge(copy.deepcopy(model)), model


def test_senses_are_those_of_the_network_whatever_stands_around(pair):
    bridged, model = pair
    word = bridged.to_tokens(" France", prepend_bos=False)[0, 0]
    embedded = model.backpack.gpt2_model.wte(word)[None, None]
    vectors = model.backpack.sense_network(embedded)[0, :, 0]
    torch.testing.assert_close(knowledge.sense_vectors(bridged, " France"), vectors)
    read = knowledge.senses(bridged, " France", top_k=4, targets=int(word))
    logits = vectors @ model.lm_head.weight.T
    assert torch.equal(read.top_ids, logits.topk(4).indices)
    torch.testing.assert_close(read.top_scores, logits.topk(4).values)
    assert torch.equal(read.ranks[:, 0], (logits > logits[:, word][:, None]).sum(1))


def test_weights_look_at_no_later_word(pair):
    bridged, model = pair
    weights = knowledge.contextualization(bridged, PROMPT)
    assert torch.equal(weights, weights.tril())
    if not model.config.signed_weights:
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    else:
        assert (weights < 0).any()
        assert (weights.abs().sum(-1) <= 1 + 1e-9).all()


@pytest.mark.parametrize("position", ["last", 1, -2])
def test_a_logit_is_the_sum_of_its_contributions(pair, position):
    bridged, model = pair
    tokens = bridged.to_tokens(PROMPT)
    logits = model(input_ids=tokens).logits.detach()[0, -1 if position == "last" else position]
    paris, rome = bridged.to_tokens(" Paris Rome", prepend_bos=False)[0].tolist()
    one = knowledge.contributions(bridged, PROMPT, " Paris", position=position)
    torch.testing.assert_close(one.values.sum(), logits[paris], rtol=1e-10, atol=1e-10)
    assert one.logit == pytest.approx(float(logits[paris]), rel=1e-10)
    two = knowledge.contributions(bridged, PROMPT, " Paris", " Rome", position=position)
    torch.testing.assert_close(two.values.sum(), logits[paris] - logits[rome])
    assert one.frame["logit"].sum() == pytest.approx(float(logits[paris]))
    assert one.values.shape == (model.config.num_senses, tokens.shape[1])
    assert not one.values[:, one.position + 1 :].any()


def test_a_contribution_is_what_the_logit_loses_without_that_sense():
    bridged = bridge(tiny().double())
    before = knowledge.contributions(bridged, PROMPT, " Paris", prepend_bos=False)
    place = before.tokens.index(" plays")
    with knowledge.scale_sense(bridged, " plays", 2, 0.0).applied(bridged):
        after = knowledge.contributions(bridged, PROMPT, " Paris", prepend_bos=False)
    assert before.logit - after.logit == pytest.approx(float(before.values[2, place]), rel=1e-9)


def test_bad_input_is_refused(pair):
    bridged, _ = pair
    with pytest.raises(ValueError, match=r"'Lionel Messi' is 2 tokens .*'Lionel', ' Messi'"):
        knowledge.senses(bridged, "Lionel Messi")
    with pytest.raises(ValueError, match="outside the vocabulary of 5000"):
        knowledge.senses(bridged, 5000)
    with pytest.raises(ValueError, match="a word as it is written"):
        knowledge.senses(bridged, "")
    with pytest.raises(ValueError, match="position is 9"):
        knowledge.contributions(bridged, PROMPT, " Paris", position=9)
    with pytest.raises(NotImplementedError, match="mixes no senses"):
        knowledge.senses(bwlens.load_model("demo"), " France")
