"""How results/table1-smollm2.csv is made: the paper's Table 1 on a real model.

    python docs/scripts/table1.py counterfact_requests.json wikitext.txt runs/table1 [METHOD ...]
    python docs/scripts/table1.py --more counterfact_requests.json wikitext.txt runs/more ROME ...
    python docs/scripts/table1.py --unknown counterfact_requests.json wikitext.txt runs/new ROME ...

Records are made of CounterFact's requests, and only facts that the model knows are kept (the true
answer more probable than the new one). The first 60 of a seeded sample were for tuning, the 100
after them are reported. With `--more`, these and 100 others, asked without texts and perplexity
(results/table1-smollm2-200.csv: ROME, MEMIT and this project's two); with `--unknown`, some that
the model does not know (the file holds the first 30, by ROME and the subject shift). CounterFact's
requests have no beginnings to continue, so that n-gram entropy (GE) is of the edit's own prompt and
two paraphrases. Each method has a folder of its own: a method added later costs its own time alone,
and what was stopped carries on. MEND is what mend.py fits, in runs/table1/mend.safetensors. The
mapped shift's map is fitted first, to 1,504 edits of other subjects (40 CPU minutes).
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

import bwlens
from bwlens.edit import (
    ValueMap,
    alpha_edit,
    fine_tune,
    forward_pass_shift,
    key_statistics,
    mapped_shift,
    memit,
    mend,
    rome,
    subject_shift,
)
from bwlens.edit.keys import PREFIXES
from bwlens.evaluation import Evaluation, Table1, known_records
from bwlens.evaluation.methods import Method
from bwlens.evaluation.presets import smallest_gradient_step

RESULTS = Path(__file__).parents[1] / "results"
TUNING, REPORTED, MAPPED = 60, 100, 1504
TOKENS = 16_640
LAYER = 5  # Where `bwlens.edit.where` says to write, measured on tuning records.
DEEP = 22  # As far up as layer 35 of GPT-2 xl's 48.
BOUND = 0.05  # FT+L's, of .01 to 1 on tuning records; from .1 on none is reached.


def methods(statistics: Any, folder: Path) -> list[Method]:
    """The methods of the paper's table, and this project's."""
    keyed = {"statistics": statistics, "prefixes": PREFIXES}
    one = {**keyed, "layer": LAYER}
    fitted = {name: folder / f"{name}.safetensors" for name in ("mend", "value-map")}
    several = {**keyed, "layers": range(LAYER - 4, LAYER + 1)}
    return [
        Method("original"),
        Method("fine-tuning, MLP 0", fine_tune, {"layers": [0]}),
        Method(f"fine-tuning, MLP {DEEP}", fine_tune, {"layers": [DEEP]}),
        Method("FT+L", fine_tune, {"layers": [LAYER], "bound": BOUND}),
        Method("gradient step", smallest_gradient_step),
        Method("forward pass shift", forward_pass_shift),
        Method("subject shift", subject_shift, one),
        Method("ROME", rome, one),
        Method("MEMIT", memit, several),
        Method("AlphaEdit", alpha_edit, several),
        Method("mapped shift", mapped_shift, {**keyed, "fitted": fitted["value-map"]}),
        Method("MEND", mend, {"fitted": fitted["mend"]}),
    ]


def main(requests: str, text: str, folder: str, *names: str, kind: str = "") -> None:
    """Run them, or carry on, and write the means with intervals."""
    model = bwlens.load_model("smollm2")
    every = bwlens.make_records(requests, neighbours=5, attributes=0)
    made = every.sample(700, seed=0)
    reported = 2 * REPORTED if kind == "more" else REPORTED
    some = list(known_records(model, made, limit=TUNING + reported))
    records = some[TUNING:]
    if kind == "unknown":
        asked = list(made)[: list(made).index(some[-1])]
        records = [record for record in asked if record not in some][:REPORTED]
    records = [
        replace(r, generation_prompts=(r.edit.prompt, *r.paraphrase_prompts[:2])) for r in records
    ]
    layers = range(LAYER - 4, LAYER + 1)
    statistics = key_statistics(model, text, matrix="W_out", layers=layers, max_tokens=TOKENS)
    texts: dict[str, Any] = {
        "generation_every": 10,
        "generation_tokens": 100,
        "perplexity_every": 25,
    }
    if kind == "more":
        texts = {"generation_every": 0, "perplexity_every": 0}
    evaluations: list[Evaluation] = []
    for method in methods(statistics, Path(folder)):
        if names and method.name not in names:
            continue
        if method.function is mapped_shift and not method.settings["fitted"].is_file():
            subjects = {record.edit.subject for record in made}
            others = [record.edit for record in every if record.edit.subject not in subjects]
            random.Random(1).shuffle(others)
            value_map = ValueMap.fit(model, others[:MAPPED], folder=Path(folder) / "values")
            value_map.save(method.settings["fitted"])
        out = Path(folder) / method.name.replace(" ", "-").replace(",", "").lower()
        evaluations.append(
            bwlens.evaluate(
                model, method, records, perplexity_text=text, out=out, greedy_tokens=3, **texts
            )
        )
    stem = {"": "table1-smollm2", "more": "table1-smollm2-200"}
    write(Evaluation.joined(evaluations), stem.get(kind, "table1-smollm2-unknown"))


def write(result: Evaluation, stem: str) -> None:
    """The means with intervals, and each method's paired differences from ROME."""
    tables = [result.summary]
    if "ROME" in result.methods:
        for name in (name for name in result.methods if name not in ("ROME", "original")):
            pairs = result[name].compare(result["ROME"]).rename(columns={"difference": "mean"})
            tables.append(pairs.assign(method=f"{name} - ROME"))
    pd.concat(tables, ignore_index=True).round(2).to_csv(RESULTS / f"{stem}.csv", index=False)
    print(Table1(result).text())


if __name__ == "__main__":
    kinds = [a.removeprefix("--") for a in sys.argv[1:] if a in ("--more", "--unknown")]
    main(*[a for a in sys.argv[1:] if not a.startswith("--")], kind="".join(kinds[:1]))
