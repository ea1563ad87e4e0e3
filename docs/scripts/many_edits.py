"""How results/many_edits-smollm2.* are made: many facts written at once, on a real model.

    python docs/scripts/many_edits.py counterfact_requests.json wikitext.txt runs/many 1000

The text may also be key statistics that were saved (`bwlens statistics`).

Records are made of CounterFact's requests, and only facts that the model knows are kept; of a
subject only one. The first 60, by which layers and settings were chosen, are left out. An edit's
value does not depend on the others, so that each is searched once, in parts that are kept; for each
number of edits it is spread anew, and a sample of the edited records is asked. The subject shift
writes in one layer; "weighted" solves its rows beside the text's keys, as MEMIT does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import bwlens
from bwlens import Edit, WeightChange
from bwlens.data.records import Record
from bwlens.edit import key_statistics, load_statistics, subject_shift
from bwlens.edit._alpha_edit import null_space, projected_rows
from bwlens.edit._memit import normal_rows
from bwlens.edit.keys import PREFIXES
from bwlens.edit.known import open_edits
from bwlens.edit.spread import Places, spread
from bwlens.edit.value import ValueSearch, ValueSettings
from bwlens.evaluation import Evaluation, known_records
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.passes import device_of
from bwlens.show import drawing

RESULTS = Path(__file__).parents[1] / "results"
TUNING, ASKED, PART = 60, 50, 64
NUMBERS = (1000, 300, 100, 10, 1)
TOKENS = 16_640
LAYER = 5  # As docs/scripts/table1.py.
METRICS = ("S", "ES", "PS", "NS", "efficacy", "paraphrase")
SEARCH = ValueSearch(ValueSettings(clamp=0.75), PREFIXES, "subject", None)


def main(requests: str, text: str, folder: str, most: str) -> None:
    """Run it, or carry on."""
    room = Path(folder)
    room.mkdir(parents=True, exist_ok=True)
    model = bwlens.load_model("smollm2")
    records = chosen(model, requests, room, int(most))
    known = text.endswith(".safetensors")
    statistics = load_statistics(text) if known else key_statistics(model, text, max_tokens=TOKENS)
    sites = [bwlens.Site("W_out", layer) for layer in range(LAYER - 2, LAYER + 1)]
    edited = records[TUNING:]
    top, weight = sites[-1], 20_000 * statistics[sites[0]].second_moment.shape[0] / 6_400

    def by_adam(edits: list[Edit]) -> Tensor:
        values = SEARCH.values(model, edits, top, of_stream=True)
        return torch.stack([value.delta for value in values])

    def by_newton(edits: list[Edit]) -> Tensor:
        change = subject_shift(model, edits, layer=top.layer, statistics=statistics)
        return change[top].delta

    shifts = searched(model, by_adam, edited, room, "values")
    own = searched(model, by_newton, edited, room, "own")
    spans = {site: null_space(statistics[site], 1.0) for site in sites}
    solvers: dict[str, Any] = {
        "memit": lambda site, keys: normal_rows(statistics[site], keys, weight),
        "alpha_edit": lambda site, keys: projected_rows(spans[site], keys, 0.1, len(keys)),
    }

    def one_layer(edits: list[Edit], values: Tensor, weight: float) -> WeightChange:
        keys, _ = Places(model, edits, SEARCH, top.layer).passed(top)
        rows = normal_rows(statistics[top], keys, weight)
        return WeightChange({top: LowRankMatrix(rows.to(values), values)})

    writers: dict[str, Callable[[list[Edit], int], WeightChange]] = {
        name: lambda edits, start, rows=rows: spread(
            model, edits, sites, SEARCH, shifts[start : start + len(edits)], rows
        )[0]
        for name, rows in solvers.items()
    }
    for name, of_text in (("subject_shift", 0.0), ("subject_shift, weighted", weight)):
        writers[name] = lambda edits, start, of_text=of_text: one_layer(
            edits, own[start : start + len(edits)], of_text
        )
    tables = []
    for n in [n for n in NUMBERS if n <= len(edited)]:
        for name, written in writers.items():
            answers = []
            # Of few edits several sets, so that as many records are asked.
            for start in range(0, max(n, min(ASKED, len(edited) - n + 1)), n):
                some = edited[start : start + n]
                change = written([record.edit for record in some], start)
                answers.append(asked(model, some[:: max(1, n // ASKED)][:ASKED], change))
            result = Evaluation(pd.concat(answers, ignore_index=True), (), len(answers))
            table = result.summary[result.summary["metric"].isin(METRICS)]
            tables.append(table.assign(method=name, edits=n).round(2))
            write(pd.concat(tables, ignore_index=True))


def chosen(model: Any, requests: str, room: Path, most: int) -> list[Record]:
    """The first known records of a seeded sample, of a subject one."""
    made = bwlens.make_records(requests, neighbours=5, attributes=0)
    made = made.sample(700 if most <= 180 else 4 * most, seed=0)
    path = room / f"known-{len(made)}.json"
    if not path.exists():
        known = known_records(model, made)
        left, _ = open_edits(model, [record.edit for record in known])
        path.write_text(json.dumps([r.case_id for r in known if r.edit in left]))
    known = set(json.loads(path.read_text()))
    by_subject = {record.edit.subject: record for record in made if record.case_id in known}
    return list(by_subject.values())[: TUNING + most]


def searched(
    model: Any,
    search: Callable[[list[Edit]], Tensor],
    records: Sequence[Record],
    room: Path,
    name: str,
) -> Tensor:
    """What is to be written for each edit, in parts on disk."""
    values = []
    for start in range(0, len(records), PART):
        path = room / f"{name}-{start}.pt"
        if not path.exists():
            edits = [record.edit for record in records[start : start + PART]]
            torch.save(search(edits).cpu(), path)
            print(name, start, flush=True)
        values.append(torch.load(path))
    return torch.cat(values).to(device_of(model))


def asked(model: Any, records: Sequence[Record], change: WeightChange) -> pd.DataFrame:
    """The answers to some of the edited records, with the whole change applied."""
    settings: dict[str, Any] = {"greedy_tokens": 0, "generation_every": 0, "perplexity_every": 0}
    with change.applied(model):
        return bwlens.evaluate(model, "none", records, progress=False, **settings).rows


def write(table: pd.DataFrame) -> None:
    """The table and its picture."""
    table = table.sort_values(["method", "edits"], kind="stable")
    table.to_csv(RESULTS / "many_edits-smollm2.csv", index=False)
    print(table[table["metric"] == "S"].to_string(), flush=True)
    figure = drawing.Drawing(figsize=(2 * drawing.COLUMN, 2.4), layout="constrained")
    both = figure.subplots(1, 2)
    for axes, metric in zip(both, ("S", "efficacy"), strict=True):
        lines = table[table["metric"] == metric].groupby("method")
        for color, (name, rows) in zip(drawing.LINES, lines, strict=False):
            shown = {"color": color, "marker": "o", "markersize": 2.5, "linewidth": 1.0}
            axes.plot(rows["edits"], rows["mean"], label=str(name), **shown)
            axes.fill_between(rows["edits"], rows["low"], rows["high"], color=color, alpha=0.12)
        axes.set(xscale="log", xlabel="edits at once", ylabel=metric, ylim=(0, 100))
        drawing.plain(axes)
    drawing.legend(both[-1])
    figure.savefig(RESULTS / "many_edits-smollm2.png", dpi=200)


if __name__ == "__main__":
    main(*sys.argv[1:])
