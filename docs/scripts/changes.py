"""How results/changes.md's figures are made: adapters trained to a known end, read in words.

    python -m docs.scripts.changes runs/changes       # SmolLM2, a minute an adapter, five to read
    python -m docs.scripts.changes runs/changes demo  # the demo model, a minute

The adapters are those of tools/adapters.py; a change with the same singular values and random
directions is the control. What lies in the folder already is not made again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

import bwlens
from bwlens.changes.reading import random_change
from tools.adapters import FACTS, KINDS, TOPIC_WORDS, adapter

RESULTS = Path(__file__).parents[1] / "results"
READINGS: tuple[Any, ...] = ("dual", "cosine", "plain")


def measured(model: Any, kind: str, change: Any, reading: Any) -> list[dict[str, Any]]:
    """What a reading names of what was trained, and of a random change, in its first words."""
    known = {
        "word": {"banana"},
        "topic": set(TOPIC_WORDS),
        "facts": {answer.strip() for _, answer in FACTS},
    }[kind]
    rows = []
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
    return rows


def explained(model: Any, kind: str, change: Any) -> list[dict[str, Any]]:
    """How many of the closest examples are those that it was trained on."""
    examples = [pair for pairs in KINDS.values() for pair in pairs]
    of = [name for name, pairs in KINDS.items() for _ in pairs]
    frame = bwlens.explain(model, change, examples, matrices=("W_out", "W_O"))
    first = [of[item] for item in frame["item"][: len(KINDS[kind])]]
    return [{"change": kind, "own_examples_first": first.count(kind) / len(first)}]


def main(folder: str, name: str = "smollm2") -> None:
    """Train and measure what is not there."""
    model, out = bwlens.load_model(name), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Any]] = {"changes": [], "changes-explained": []}
    for kind, pairs in KINDS.items():
        path = out / f"{name}-{kind}.safetensors"
        if not path.exists():
            print(kind, flush=True)
            adapter(model, pairs).save(path)
        change = bwlens.WeightChange.load(path)
        work: list[Any] = [("changes", measured, (reading,)) for reading in READINGS]
        for table, measure, more in [*work, ("changes-explained", explained, ())]:
            file = out / "-".join([name, kind, table, *more, "rows.json"])
            if not file.exists():
                file.write_text(json.dumps(measure(model, kind, change, *more)))
            rows[table] += json.loads(file.read_text())
            print(file.name, flush=True)
    for table, made in rows.items():
        frame = pd.DataFrame(made)
        frame.to_csv(RESULTS / f"{table}-{name}.csv", index=False, float_format="%.3g")


if __name__ == "__main__":
    main(*sys.argv[1:])
