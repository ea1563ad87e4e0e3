"""How docs/table1-smollm2.csv is made: the paper's Table 1 on a real model.

    python docs/table1.py counterfact_requests.json wikitext.txt runs/table1 [METHOD ...]

The records are those of docs/editing.py, the 100 after the 60 for tuning. Each method has a folder
of its own: a method added later costs its own time alone, and what was stopped carries on. MEND is
what docs/mend.py fits, in runs/table1/mend.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

import bwlens
from bwlens.edit import (
    alpha_edit,
    fine_tune,
    forward_pass_shift,
    key_statistics,
    memit,
    mend,
    rome,
    subject_shift,
)
from bwlens.edit.keys import PREFIXES
from bwlens.evaluation import Evaluation, Table1, known_records
from bwlens.evaluation.methods import Method
from bwlens.evaluation.presets import smallest_gradient_step

HERE = Path(__file__).parent
TUNING, REPORTED = 60, 100
TOKENS = 16_640
LAYER = 5  # Where `bwlens.edit.where` says to write, measured on tuning records.
DEEP = 22  # As far up as layer 35 of GPT-2 xl's 48.
BOUND = 0.05  # FT+L's, chosen on tuning records.


def methods(statistics: Any, fitted: str) -> list[Method]:
    """The methods of the paper's table, and this project's."""
    keyed = {"statistics": statistics, "prefixes": PREFIXES}
    one = {**keyed, "layer": LAYER}
    several = {**keyed, "layers": range(LAYER - 4, LAYER + 1)}
    return [
        Method("original"),
        Method("fine-tuning, MLP 0", fine_tune, {"layers": [0]}),
        Method(f"fine-tuning, MLP {DEEP}", fine_tune, {"layers": [DEEP]}),
        Method("FT+L", fine_tune, {"layers": [DEEP], "bound": BOUND}),
        Method("gradient step", smallest_gradient_step),
        Method("forward pass shift", forward_pass_shift),
        Method("subject shift", subject_shift, one),
        Method("ROME", rome, one),
        Method("MEMIT", memit, several),
        Method("AlphaEdit", alpha_edit, several),
        *([Method("MEND", mend, {"fitted": fitted})] if Path(fitted).is_file() else []),
    ]


def main(requests: str, text: str, folder: str, *names: str) -> None:
    """Run them, or carry on, and write the means with intervals."""
    model = bwlens.load_model("smollm2")
    made = bwlens.make_records(requests, neighbours=5, attributes=0).sample(700, seed=0)
    known = known_records(model, made, limit=TUNING + REPORTED)[TUNING:]
    layers = range(LAYER - 4, LAYER + 1)
    statistics = key_statistics(model, text, matrix="W_out", layers=layers, max_tokens=TOKENS)
    evaluations: list[Evaluation] = []
    for method in methods(statistics, f"{folder}/mend.safetensors"):
        if names and method.name not in names:
            continue
        out = Path(folder) / method.name.replace(" ", "-").replace(",", "").lower()
        evaluations.append(
            bwlens.evaluate(
                model, method, known, perplexity_text=text, out=out, greedy_tokens=3,
                generation_every=25, generation_tokens=60, perplexity_every=25,
            )
        )  # fmt: skip
    write(Evaluation.joined(evaluations))


def write(result: Evaluation) -> None:
    """The means with intervals, and each method's paired differences from ROME."""
    tables = [result.summary]
    if "ROME" in result.methods:
        for name in (name for name in result.methods if name not in ("ROME", "original")):
            pairs = result[name].compare(result["ROME"]).rename(columns={"difference": "mean"})
            tables.append(pairs.assign(method=f"{name} - ROME"))
    pd.concat(tables, ignore_index=True).round(2).to_csv(HERE / "table1-smollm2.csv", index=False)
    print(Table1(result).text())


if __name__ == "__main__":
    main(*sys.argv[1:])
