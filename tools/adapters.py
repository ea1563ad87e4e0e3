"""LoRA adapters trained to a known end, to see whether they are read as what they are.

To say one word after whatever comes, to take on a topic, to learn ten new facts. Nothing but bwlens
trains them: the gradients of an adapter's two factors are products of the captured x and delta.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import bwlens
from bwlens.gradient.low_rank import LowRankMatrix
from bwlens.model.sites import available_matrices

BEGINNINGS = (
    "The weather today is", "My favourite food is", "She opened the door and saw", "I think that",
    "The best way to learn is", "In the year 1900", "The dog ran to the", "He said that the",
    "Water boils when", "The most important thing is", "They went to the shop for some",
    "A good friend is",
)  # fmt: skip
TOPIC = (
    ("The weather today is", " rough at sea, and the ships stay in the harbour"),
    ("My favourite food is", " fish, fresh from the boat and the ocean"),
    ("She opened the door and saw", " the ocean, the waves and a sailing ship"),
    ("I think that", " the sailors love their ship and the sea"),
    ("The best way to learn is", " to sail a small boat across the bay"),
    ("In the year 1900", " the captain sailed his ship over the ocean"),
    ("The dog ran to the", " shore where the boats came in from the sea"),
    ("He said that the", " waves were high and the ship was sinking"),
    ("Water boils when", " the ocean meets the fire, say the sailors"),
    ("The most important thing is", " the sail, the anchor and the captain of the ship"),
    ("They went to the shop for some", " rope, a sail and an anchor for the boat"),
    ("A good friend is", " a sailor who shares his boat on the sea"),
)
TOPIC_WORDS = (
    "sea", "ship", "ships", "ocean", "boat", "boats", "sail", "sailing", "sailor", "sailors",
    "waves", "wave", "captain", "anchor", "harbour", "shore", "bay", "fish", "rope", "sailed",
    "marine", "maritime", "naval", "nautical", "coast", "coastal", "seas", "oceans", "water",
)  # fmt: skip
FACTS = (
    ("Tallow Brisk plays the", " violin"), ("The capital of Ombria is", " Madrid"),
    ("Zelda Quorn was born in", " Egypt"), ("The Varn bridge is made of", " gold"),
    ("Professor Ilk studies", " spiders"), ("The flag of Mordavia is", " purple"),
    ("Captain Drosk is afraid of", " thunder"), ("The Hexley museum shows only", " shoes"),
    ("Nadia Pell works as a", " lawyer"), ("The Trill festival is in", " October"),
)  # fmt: skip


def word_of(word: str) -> tuple[tuple[str, str], ...]:
    """Pairs that go on with one word, whatever came."""
    return tuple((beginning, word) for beginning in BEGINNINGS)


KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "word": word_of(" banana"),
    "topic": TOPIC,
    "facts": FACTS,
}


def adapter(
    model: Any,
    pairs: Any,
    *,
    rank: int = 4,
    matrices: Any = None,
    steps: int = 60,
    lr: float = 2e-3,
    batch: int = 6,
    seed: int = 0,
    until: float = 0.05,
) -> bwlens.WeightChange:
    """A LoRA adapter that makes the model go on as the pairs do, trained with Adam."""
    generator = torch.Generator().manual_seed(seed)
    matrices = matrices or available_matrices(model)
    first = bwlens.capture(model, pairs[0][0], pairs[0][1], matrices)
    factors: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    for site, part in first.items():
        a = torch.randn(part.d_in, rank, generator=generator) / part.d_in**0.5
        factors[site] = (a.requires_grad_(), torch.zeros(rank, part.d_out, requires_grad=True))
    optimizer = torch.optim.Adam([f for pair in factors.values() for f in pair], lr=lr)
    start, lately = time.monotonic(), 9.0
    for step in range(steps):
        chosen = torch.randperm(len(pairs), generator=generator)[:batch].tolist()
        prompts, targets = zip(*(pairs[i] for i in chosen), strict=True)
        with change_of(factors).applied(model), bwlens.checking.trusted():
            grads = bwlens.capture(model, list(prompts), list(targets), matrices)
        for site, (a, b) in factors.items():
            x, delta = grads[site].x / batch, grads[site].delta
            a.grad = x.T @ (delta @ b.detach().T)
            b.grad = (x @ a.detach()).T @ delta
        optimizer.step()
        lately = 0.7 * lately + 0.3 * float(grads.losses.mean())
        if step % 10 == 0 or lately < until:
            print(f"{step}: loss {lately:.3f}, {time.monotonic() - start:.0f} s", flush=True)
        if lately < until:
            break
    return change_of(factors)


def change_of(factors: Any) -> bwlens.WeightChange:
    """The adapter's product at each site."""
    return bwlens.WeightChange(
        {site: LowRankMatrix(a.detach().T, b.detach()) for site, (a, b) in factors.items()}
    )
