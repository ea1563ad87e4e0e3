"""How docs/changes.md's figures are made: adapters that were trained to a known end, read in words.

    python docs/changes.py runs/changes            # SmolLM2, some five minutes an adapter on a core
    python docs/changes.py runs/changes demo       # the demo model, seconds

Three LoRA adapters on all matrices: to say one word after whatever comes, to take on a topic, to
learn ten new facts. Nothing but bwlens trains them: the gradients of an adapter's two factors are
products of the captured x and delta. A change with the same singular values and random directions
is the control. Adapters that lie in the folder already are not trained again.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import bwlens
from bwlens.changes.reading import random_change
from bwlens.gradient.low_rank import LowRankMatrix
from bwlens.model.sites import available_matrices

HERE = Path(__file__).parent
READINGS: tuple[Any, ...] = ("dual", "cosine", "plain")
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


def measured(model: Any, kind: str, change: bwlens.WeightChange) -> list[dict[str, Any]]:
    """What each reading names of what was trained, and of a random change, in its first words."""
    known = {
        "word": {"banana"},
        "topic": set(TOPIC_WORDS),
        "facts": {answer.strip() for _, answer in FACTS},
    }[kind]
    rows = []
    for reading in READINGS:
        for name, each in ((kind, change), (f"{kind}, random", random_change(change, 7))):
            lens = bwlens.read_change(model, each, reading=reading)
            table = lens.promoted(20)
            words = [word.strip() for word in table["word"]]
            rows.append(
                {
                    "change": name,
                    "reading": reading,
                    "words": " ".join(words[:10]),
                    "known_in_10": sum(word in known for word in dict.fromkeys(words[:10])),
                    "known_in_20": sum(word in known for word in dict.fromkeys(words)),
                    "nats": table["nats"].max(),
                    "chance": table["chance"].max(),
                    "effect": " ".join(word.strip() for word in lens.effect_words()),
                    "divergence": lens.effect.divergence if lens.effect else None,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main(folder: str, name: str = "smollm2") -> None:
    """Train what is not there, and measure."""
    model, out = bwlens.load_model(name), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    changes: dict[str, bwlens.WeightChange] = {}
    for kind, pairs in KINDS.items():
        path = out / f"{name}-{kind}.safetensors"
        if not path.exists():
            print(kind, flush=True)
            adapter(model, pairs).save(path)
        changes[kind] = bwlens.WeightChange.load(path)
    examples = [pair for pairs in KINDS.values() for pair in pairs]
    of = [kind for kind, pairs in KINDS.items() for _ in pairs]
    explained = []
    for kind, change in changes.items():
        frame = bwlens.explain(model, change, examples)
        first = [of[item] for item in frame["item"][: len(KINDS[kind])]]
        share = first.count(kind) / len(first)
        print(kind, "explained by its own examples first:", share, flush=True)
        explained.append({"change": kind, "own_examples_first": share})
    pd.DataFrame(explained).to_csv(HERE / f"changes-explained-{name}.csv", index=False)
    rows = [row for kind, change in changes.items() for row in measured(model, kind, change)]
    pd.DataFrame(rows).to_csv(HERE / f"changes-{name}.csv", index=False, float_format="%.3g")


if __name__ == "__main__":
    main(*sys.argv[1:])
