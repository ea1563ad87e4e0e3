"""How docs/editing-smollm2.csv is made: editing methods side by side on a real model.

    python docs/editing.py counterfact_requests.json wikitext.txt runs/editing

Records are made of CounterFact's requests, and only facts that the model knows are kept (the true
answer more probable than the new one). The first 60 of a seeded sample were for tuning, the 200
after them are reported (the file holds the first 70). Stopped and started again it carries on.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

import bwlens
from bwlens.edit import key_statistics, rome, subject_shift
from bwlens.edit.keys import PREFIXES
from bwlens.evaluation import Evaluation, known_records

HERE = Path(__file__).parent
TUNING, REPORTED = 60, 200
TOKENS = 16_640
LAYER = 5


def main(requests: str, text: str, folder: str) -> None:
    """Run it, or carry on, and write the aggregated numbers."""
    model = bwlens.load_model("smollm2")
    made = bwlens.make_records(requests, neighbours=5, attributes=0).sample(700, seed=0)
    known = known_records(model, made)[: TUNING + REPORTED]
    of_mlp = key_statistics(model, text, matrix="W_out", layers=[LAYER], max_tokens=TOKENS)
    at: dict[str, Any] = {"layer": LAYER, "statistics": of_mlp, "prefixes": PREFIXES}
    methods = {
        "none": "none",
        "subject_shift": partial(subject_shift, **at),
        "rome": partial(rome, **at),
    }
    settings: dict[str, Any] = {"greedy_tokens": 3, "generation_every": 0, "perplexity_every": 0}
    write(bwlens.evaluate(model, methods, known[TUNING:], out=folder, **settings))


def write(result: Evaluation) -> None:
    """The means with intervals, and the paired differences of the subject shift from ROME."""
    pairs = result["subject_shift"].compare(result["rome"])
    pairs = pairs.rename(columns={"difference": "mean"}).assign(method="subject_shift - rome")
    tables = [result.summary, pairs]
    table = pd.concat(tables, ignore_index=True)
    table = table[table["metric"] != "seconds"]  # `python -m benchmarks edits` times them
    table.round(2).to_csv(HERE / "editing-smollm2.csv", index=False)
    print(table.to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
