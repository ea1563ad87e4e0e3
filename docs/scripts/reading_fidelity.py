"""How results/reading_fidelity-*.csv and .png are made: which reading says what a step does.

    python docs/scripts/reading_fidelity.py smollm2 counterfact_requests.json runs/smollm2
    python docs/scripts/reading_fidelity.py demo demo runs/demo

A seeded order of the records: the first 60 are for tuning, the 100 after them are reported (of the
demo's, which nothing was tuned on, the first 100). Stopped and started again it carries on; of an
unfinished run the parts that are there are written. `--write` only writes.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import bwlens
from bwlens.experiments import read_sweep, sweep

RESULTS = Path(__file__).parents[1] / "results"
KEPT = ("in_ten", "r", "r_plausible", "promoted", "median_place")
TUNING, REPORTED = 60, 100


def main(name: str, data: str, folder: str) -> None:
    """Run it, or carry on, and write the figure and the aggregated numbers."""
    if "--write" not in sys.argv:
        records = bwlens.read_records(data).records
        order = random.Random(0).sample(range(len(records)), len(records))
        start = 0 if name == "demo" else TUNING
        chosen = [records[i] for i in order[start : start + REPORTED]]
        model = bwlens.load_model(name)
        sweep("reading_fidelity", model, chosen, folder, max_memory=2**28, page=False)
    result = read_sweep(folder)["reading_fidelity"]
    summary = result.summary
    bare = summary["quantity"].str.replace("_(random|other|object)$", "", regex=True)
    table = summary[bare.isin(KEPT)].round(3)
    table.to_csv(RESULTS / f"reading_fidelity-{name}.csv", index=False)
    result.figure().savefig(RESULTS / f"reading_fidelity-{name}.png", dpi=110)
    print(f"{result.rows['item'].nunique()} prompts")


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if argument != "--write"])
