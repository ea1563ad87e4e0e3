"""How results/paper_few-smollm2.csv is made: what of the paper is dear to run, on few prompts.

    python docs/scripts/paper_few.py counterfact_requests.json runs/few

Appendix C (`naive_reading`, every layer, 24 edits) and lemma 5.2 (`imprint_shift`, three layers, 8
edits) of SmolLM2: the first of the hundred edits of paper_on_smollm2.py. Stopped and started again
it carries on.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pandas as pd

import bwlens
from bwlens.experiments import ImprintShift, NaiveReading, sweep

RESULTS = Path(__file__).parents[1] / "results"
TUNING = 60
RUNS = {
    "naive_reading": (NaiveReading(), 24),
    "imprint_shift": (ImprintShift(layers=(2, 15, 27), etas=(0.001, 0.01, 0.1)), 8),
}


def main(data: str, folder: str) -> None:
    """Run both, or carry on, and write the means with their intervals."""
    model = bwlens.load_model("smollm2")
    records = bwlens.read_records(data).records
    order = random.Random(0).sample(range(len(records)), len(records))
    tables = []
    for name, (experiment, n) in RUNS.items():
        edits = [records[i] for i in order[TUNING : TUNING + n]]
        swept = sweep(experiment, model, edits, Path(folder) / name, max_memory=2**28, page=False)
        tables.append(swept[name].summary.assign(experiment=name))
        table = pd.concat(tables, ignore_index=True).round(4)
        table.to_csv(RESULTS / "paper_few-smollm2.csv", index=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
