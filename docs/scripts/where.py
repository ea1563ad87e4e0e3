"""How results/where-smollm2.* are made: where a fact is to be written, and how sure that is.

    python docs/scripts/where.py counterfact_requests.json wikitext.txt runs/where

`bwlens.edit.where` record by record, on 120 facts that the model knows, of other subjects than
those of table1.py; W_out's keys at the subject's last token. Then the layer that it names by 10, 20
and 40 of these records, drawn 1,000 times.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import bwlens
from bwlens.edit import KeyResponses, key_statistics, where
from bwlens.evaluation import known_records
from bwlens.runs.intervals import mean_ci

RESULTS = Path(__file__).parents[1] / "results"
RECORDS, LAYERS, TOKENS = 120, range(16), 16_640
NUMBERS, DRAWS = (10, 20, 40), 1000


def main(requests: str, text: str, folder: str) -> None:
    """Run it; what was measured is kept."""
    kept = Path(folder) / "responses.pt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        torch.save(measured(requests, text), kept)
    sites, paraphrases, neighbours = torch.load(kept, weights_only=False)
    result = KeyResponses(sites, paraphrases.mean(0), neighbours.mean(0), len(paraphrases))
    result.figure().savefig(RESULTS / "where-smollm2.png", dpi=200)
    table = result.frame[result.frame["position"] == "subject"].set_index("layer")
    interval = mean_ci((paraphrases - neighbours)[:, :, 0].numpy())
    table = table.assign(low=interval.low, high=interval.high)
    generator = np.random.default_rng(0)
    for n in NUMBERS:
        named = []
        for _ in range(DRAWS):
            some = generator.choice(len(paraphrases), n, replace=False)
            means = (paraphrases[some].mean(0), neighbours[some].mean(0))
            named.append(KeyResponses(sites, *means, n).best())
        table[f"named_by_{n}"] = pd.Series(named).value_counts(normalize=True)
    table = table.drop(columns=["matrix", "position"]).fillna(0.0).round(3)
    table.to_csv(RESULTS / "where-smollm2.csv")
    print(table.to_string())


def measured(requests: str, text: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The sites, and answers [record, site, position] of paraphrases and neighbours."""
    model = bwlens.load_model("smollm2")
    every = bwlens.make_records(requests, neighbours=5, attributes=0)
    used = {record.edit.subject for record in every.sample(700, seed=0)}
    others = [record for record in every.sample(900, seed=3) if record.edit.subject not in used]
    statistics = key_statistics(model, text, layers=LAYERS, max_tokens=TOKENS)
    found = [
        where(model, record, statistics, layers=LAYERS)
        for record in known_records(model, others, limit=RECORDS)
    ]
    paraphrases, neighbours = (
        torch.stack([getattr(one, kind) for one in found]) for kind in ("paraphrases", "neighbours")
    )
    return found[0].sites, paraphrases, neighbours


if __name__ == "__main__":
    main(*sys.argv[1:])
