"""How results/residual_removal-*.* are made: a block without its residual, and controls.

    python docs/scripts/knowledge.py smollm2 counterfact_requests.json wikitext.txt runs/smollm2 24
    python docs/scripts/knowledge.py demo demo demo runs/demo 60 attention

So many facts in a seeded order, and 26 beginnings of lines of prose, each cut before a word; round
the feed-forward part of each block, or round its attention. Nothing was tuned on either. Stopped
and started again it carries on; `--write` only writes what is there.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pandas as pd

import bwlens
from bwlens.data.prose import read_prose
from bwlens.experiments import ResidualRemoval, prose_edits, read_sweep, sweep

RESULTS = Path(__file__).parents[1] / "results"
PROSE, WORDS = 26, 32
"""How many lines, and how many words of a line are read."""


def main(name: str, facts: str, prose: str, folder: str, n: str, part: Any = "mlp") -> None:
    """Run it, or carry on, and write the figures and the means."""
    tables = []
    stem = f"residual_removal-{name}" + ("" if part == "mlp" else f"-{part}")
    for kind in ("prose", "facts"):
        where = Path(folder) / part / kind
        if "--write" in sys.argv and not where.exists():
            continue
        if "--write" not in sys.argv:
            if kind == "facts":
                every = bwlens.read_records(facts).records
                chosen = [every[i] for i in random.Random(0).sample(range(len(every)), int(n))]
            else:
                lines = [" ".join(line.split()[:WORDS]) for line in read_prose(prose)]
                chosen = random.Random(0).sample(prose_edits(lines), PROSE)
            model = bwlens.load_model(name)
            task = ResidualRemoval(part=part)
            sweep(task, model, chosen, where, max_memory=2**29, page=False)
        result = read_sweep(where)["residual_removal"]
        tables.append(result.summary.assign(text=kind))
        result.figure().savefig(RESULTS / f"{stem}-{kind}.png", dpi=110)
        print(f"{part}, {kind}: {result.rows['item'].nunique()} prompts")
    table = pd.concat(tables)[
        ["text", "layer", "condition", "quantity", "mean", "low", "high", "n"]
    ]
    table.round(3).to_csv(RESULTS / f"{stem}.csv", index=False)


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if argument != "--write"])
