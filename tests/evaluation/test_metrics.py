"""Metrics: exactly the definitions, on cases worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bwlens.evaluation import metrics
from bwlens.evaluation.metrics import (
    TfIdf,
    accuracy,
    consistency,
    generation_entropy,
    magnitude,
    n_gram_entropy,
    perplexity,
    score,
    success,
)

# Probabilities of the new and the true answer at four prompts.
NEW = [0.5, 0.25, 0.125, 0.25]
TRUE = [0.25, 0.5, 0.0625, 0.25]


def nll(probabilities):
    return -torch.tensor(probabilities, dtype=torch.float64).log()


def test_success_counts_the_prompts_where_the_wanted_answer_wins():
    assert success(nll(NEW), nll(TRUE)) == 50.0  # the first and the third; the tie is none
    assert success(nll(TRUE), nll(NEW)) == 25.0  # the second


def test_magnitude_is_the_mean_difference_of_probabilities():
    assert magnitude(nll(NEW), nll(TRUE)) == pytest.approx(100 * 0.0625 / 4, abs=1e-12)
    assert magnitude(nll(TRUE), nll(NEW)) == pytest.approx(-100 * 0.0625 / 4, abs=1e-12)


def test_an_answer_of_several_tokens_has_their_geometric_mean():
    # Two tokens of probability 1/2 and 1/8: mean NLL ln 4, so p = 1/4.
    two = nll([0.5, 0.125]).mean()[None]
    assert magnitude(two, nll([0.125])) == pytest.approx(12.5, abs=1e-12)


def test_accuracy_is_a_share():
    assert accuracy(torch.tensor([True, False, False, True, True])) == 60.0


def test_score_is_the_harmonic_mean():
    assert score(100.0, 96.4, 75.4) == pytest.approx(89.2, abs=0.05)  # ROME's own table
    assert score(50.0, 50.0, 50.0) == 50.0
    assert score(0.0, 100.0, 100.0) == 0.0


def test_what_is_missing_is_blank_not_zero():
    none, gap = nll([]), torch.tensor([0.1, math.nan])
    assert math.isnan(success(none, none))
    assert math.isnan(magnitude(none, none))
    assert math.isnan(success(nll([0.5, 0.5]), gap))
    assert math.isnan(success(gap, nll([0.5, 0.5])))
    assert math.isnan(magnitude(nll([0.5, 0.5]), gap))
    assert math.isnan(accuracy(torch.zeros(0, dtype=torch.bool)))
    assert math.isnan(score(100.0, math.nan, 100.0))
    assert math.isnan(generation_entropy([]))
    assert math.isnan(consistency([], ["a text"], TfIdf.of(["a text"])))
    assert math.isnan(consistency(["a text"], [], TfIdf.of(["a text"])))
    assert math.isnan(perplexity(0.0, 0))


def test_n_gram_entropy():
    assert n_gram_entropy("a b c d e", 2) == 2.0  # four bigrams, each once
    assert n_gram_entropy("a a a a a", 2) == 0.0
    # ab ba ab: 2/3 and 1/3.
    assert n_gram_entropy("a b a b", 2) == pytest.approx(math.log2(3) - 2 / 3)
    assert n_gram_entropy("Yes, it's so.", 2) == 2.0  # Yes | , | it's | so | .
    assert n_gram_entropy("one two", 3) == 0.0


def test_generation_entropy_weighs_trigrams_twice():
    # Nine words, all different: eight bigrams (3 bits), seven trigrams (log2 7).
    text = "a b c d e f g h i"
    one = (2 / 3 * 3 + 4 / 3 * math.log2(7)) / 2
    assert generation_entropy([text]) == pytest.approx(100 * one)
    assert generation_entropy([text, "a a a a"]) == pytest.approx(50 * one)


def test_tf_idf_by_hand():
    # scikit-learn's smoothing: ln((1 + 2) / (1 + 2)) + 1 = 1 and ln(3 / 2) + 1.
    weights = TfIdf.of(["the cat sat, the cat", "The dog sat"])
    rare = math.log(1.5) + 1
    assert weights.idf == pytest.approx({"the": 1.0, "sat": 1.0, "cat": rare, "dog": rare})
    # "the" twice and "cat" once, against "cat": rare / |(2, rare)|. Unknown words count nothing.
    expected = rare / math.hypot(2, rare)
    assert weights.cosine("the the cat", "A CAT zebra") == pytest.approx(expected)
    assert weights.cosine("the cat", "the cat") == pytest.approx(1.0)
    assert weights.cosine("cat", "dog") == 0.0
    assert math.isnan(weights.cosine("zebra", "dog"))
    assert consistency(["the the", "cat"], ["cat"], weights) == pytest.approx(100 * expected)


def test_perplexity():
    assert perplexity(4 * math.log(7), 4) == pytest.approx(7)
    assert perplexity(1e9, 1) == math.inf


@given(st.lists(st.tuples(*[st.floats(0.01, 20)] * 2), min_size=1, max_size=8))
def test_agrees_with_a_loop_over_prompts(pairs):
    new, true = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    wins = [b > a for a, b in pairs]
    gaps = [math.exp(-a) - math.exp(-b) for a, b in pairs]
    assert success(new, true) == pytest.approx(100 * sum(wins) / len(pairs))
    assert magnitude(new, true) == pytest.approx(100 * sum(gaps) / len(pairs), abs=1e-9)
    assert magnitude(true, new) == pytest.approx(-magnitude(new, true), abs=1e-9)


def test_every_metric_is_explained():
    assert {"S", "ES", "PS", "NS", "EM", "PM", "NM", "GE", "RS"} <= set(metrics.METRICS)
    assert {"efficacy", "paraphrase", "neighbourhood", "perplexity"} <= set(metrics.METRICS)
