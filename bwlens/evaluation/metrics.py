"""The field's metrics of an edit, as functions of probabilities and texts; no model is asked here.

Two families judge the same answers and are easily taken for one another. *Success* (ROME) asks
whether the wanted answer beats the other one; *accuracy* (Backward Lens) whether it beats the whole
vocabulary. Everything is in percent, entropies in hundredths of a bit, as the papers print them.
A metric without the data it needs is nan, never 0.

Source: Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, section 3.4
(success, magnitude, entropy, consistency); Katz et al., "Backward Lens", EMNLP 2024, Table 1.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

METRICS = {
    "S": "score: harmonic mean of ES, PS and NS",
    "ES": "efficacy success: the new answer beats the old one",
    "PS": "paraphrase success: the same for paraphrases",
    "NS": "neighbourhood success: the true answer still beats the new one",
    "AS": "attribute success: where the new answer is true, it still beats the old one",
    "EM": "efficacy magnitude: by how much, in probability",
    "PM": "paraphrase magnitude",
    "NM": "neighbourhood magnitude",
    "AM": "attribute magnitude",
    "efficacy": "the new answer is the most probable of all words",
    "paraphrase": "the same for paraphrases",
    "neighbourhood": "the true answer is still the most probable of all words",
    "attribute": "where the new answer is true, it still is the most probable of all words",
    "greedy": "greedy text from the prompt contains the new answer",
    "greedy_paraphrase": "the same for paraphrases",
    "GE": "generation entropy: bigrams and trigrams, bits x 100",
    "RS": "consistency with reference texts: TF-IDF cosine x 100",
    "perplexity": "of a text that has nothing to do with the edit",
    "seconds": "time to compute the edit",
}
"""Every metric by its name in a table, and what it says."""


def success(nll_wanted: Float[Tensor, " prompts"], nll_other: Float[Tensor, " prompts"]) -> float:
    """Share of prompts where the wanted answer is more probable than the other, in percent.

    `100 mean[nll_other > nll_wanted]`, a tie is no success. ES and PS want the new answer
    (`success(new, true)`), NS the true one (`success(true, new)`).

    Args:
        nll_wanted: Mean NLL of the wanted answer's tokens, in nats.
        nll_other: The same of the other answer.

    Returns:
        nan without prompts, or where a number is missing (nan).

    Example:
        >>> success(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
        50.0
    """
    return _percent((nll_other > nll_wanted).double(), nll_wanted, nll_other)


def magnitude(nll_wanted: Float[Tensor, " prompts"], nll_other: Float[Tensor, " prompts"]) -> float:
    """How much more probable the wanted answer is than the other, in percentage points.

    `100 mean[p_wanted - p_other]` with `p = exp(-nll)`. EM and PM want the new answer, NM the
    true one.

    Returns:
        nan without prompts, or where a number is missing (nan).
    """
    gap = (-nll_wanted.double()).exp() - (-nll_other.double()).exp()
    return _percent(gap, nll_wanted, nll_other)


def accuracy(right: Bool[Tensor, " prompts"]) -> float:
    """Share of prompts where every token of the answer is the most probable one, in percent.

    Under teacher forcing: each token is judged after the answer's own tokens before it.

    Returns:
        nan without prompts.
    """
    return _percent(right.double())


def score(efficacy: float, paraphrase: float, neighbourhood: float) -> float:
    """S, the harmonic mean of ES, PS and NS: `3 / (1/ES + 1/PS + 1/NS)`, 0 if one of them is.

    Taken of means over records, as ROME does, not record by record.

    Example:
        >>> score(100.0, 50.0, 50.0)
        60.0
    """
    parts = (efficacy, paraphrase, neighbourhood)
    if any(map(math.isnan, parts)):
        return math.nan
    return 0.0 if 0.0 in parts else 3 / sum(1 / part for part in parts)


def n_gram_entropy(text: str, n: int) -> float:
    """Entropy of a text's n-grams of words and punctuation marks, in bits.

    `-sum_g f(g) log2 f(g)` with `f` the share of each n-gram among all of the text. A text of
    fewer than n words has none, and entropy 0.
    """
    words = re.findall(r"\w+(?:'\w+)?|[^\w\s]", text)
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) + 0.0


def generation_entropy(texts: Sequence[str]) -> float:
    """GE: how varied generated texts are; a model that repeats itself has little.

    Of each text `(2/3 H_2 + 4/3 H_3) / 2`, with H_2 and H_3 the entropies of its bigrams and
    trigrams in bits; the mean over texts, times 100.

    Returns:
        nan without texts.
    """
    each = [(2 / 3 * n_gram_entropy(t, 2) + 4 / 3 * n_gram_entropy(t, 3)) / 2 for t in texts]
    return 100 * sum(each) / len(each) if each else math.nan


@dataclass(frozen=True)
class TfIdf:
    """Word weights learnt from documents: rare words say more about a text than common ones.

    A text's vector has `count(w) idf(w)` for each known word, `idf(w) = ln((1 + n) / (1 + df(w)))
    + 1`, n documents of which df(w) hold w. Words are lower-cased and have two characters or more.
    These are scikit-learn's definitions (`TfidfVectorizer` as it comes).

    Attributes:
        idf: The weight of each word.
    """

    idf: dict[str, float]

    @staticmethod
    def of(documents: Sequence[str]) -> TfIdf:
        """Learn the weights."""
        frequency = Counter(word for document in documents for word in {*_words(document)})
        n = 1 + len(documents)
        return TfIdf({word: math.log(n / (1 + df)) + 1 for word, df in frequency.items()})

    def cosine(self, text: str, other: str) -> float:
        """The cosine between two texts' vectors, from 0 to 1; nan if one has no known word."""
        a, b = (
            {word: n * self.idf[word] for word, n in Counter(_words(t)).items() if word in self.idf}
            for t in (text, other)
        )
        if not a or not b:
            return math.nan
        dot = sum(weight * b.get(word, 0.0) for word, weight in a.items())
        return dot / math.hypot(*a.values()) / math.hypot(*b.values())


def consistency(texts: Sequence[str], references: Sequence[str], weights: TfIdf) -> float:
    """RS: how much generated texts are about what reference texts are about.

    The TF-IDF cosine between all texts joined and all references joined, times 100.

    Returns:
        nan without texts or references.
    """
    if not texts or not references:
        return math.nan
    return 100 * weights.cosine(" ".join(texts), " ".join(references))


def perplexity(nll: float, n_tokens: int) -> float:
    """`exp(nll / n_tokens)`, from a summed NLL in nats; nan without tokens, inf where too large.

    Example:
        >>> round(perplexity(3 * math.log(2), 3), 6)
        2.0
    """
    if not n_tokens:
        return math.nan
    try:
        return math.exp(nll / n_tokens)
    except OverflowError:
        return math.inf


def _percent(values: Tensor, *needed: Tensor) -> float:
    """100 times the mean; nan where there is nothing, or what it was made of has a gap."""
    if not values.numel() or any(bool(one.isnan().any()) for one in needed):
        return math.nan
    return 100 * float(values.mean(dtype=torch.float64))


def _words(text: str) -> list[str]:
    return re.findall(r"\b\w\w+\b", text.lower())
