"""How results/paper_on_smollm2.csv, the claims in results/paper.md and their figures are made.

    python docs/scripts/paper_on_smollm2.py smollm2 counterfact_requests.json runs/paper
    python docs/scripts/paper_on_smollm2.py demo demo runs/paper
    python docs/scripts/paper_on_smollm2.py --write runs/paper

The same hundred records as those of reading_fidelity.py. Each run is a sweep: stopped and
started again it carries on. `--only NAME` takes one run of `RUNS`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import bwlens
from bwlens.experiments import (
    Experiment,
    GradientRank,
    LayerCosine,
    SegmentNorms,
    TargetRank,
    read_sweep,
    sweep,
)
from bwlens.model.protocol import LensModel
from bwlens.model.segments import SEGMENTS
from bwlens.runs.intervals import mean_ci
from bwlens.show.drawing import cosine_maps, panels

Claimed = Iterator[tuple[str, Any, dict[str, Any]]]

RESULTS = Path(__file__).parents[1] / "results"
TUNING, REPORTED = 60, 100
ENDS = ("first subject", "last subject", "last")
LAYERS = (*range(0, 30, 2), -1)
"""Layers whose ranks are read of a deep model; norms, cosines and ranks of matrices are of all."""
TENS = ("target_top_ten", "target_bottom_ten", "answer_top_ten", "answer_bottom_ten")
KEPT = ("full", "delta", "x", "cosine", "target_rank", "answer_rank", *TENS)
CHEAP = (GradientRank(), SegmentNorms(), LayerCosine())
EFFECT = {"read_by": "effect", "layers": LAYERS}
FEW = {"read_by": "effect", "layers": (0, 6, 12, 18, 24, -1)}
RUNS = {
    "plain": (None, (*CHEAP, TargetRank(layers=LAYERS))),
    "effect": (
        None,
        (
            TargetRank(matrices=("W_out",), segments=ENDS, **EFFECT),
            LayerCosine(**EFFECT),
        ),
    ),
    "no BOS": (
        False,
        (
            SegmentNorms(matrices=("W_in", "W_out")),
            LayerCosine(),
            TargetRank(layers=LAYERS, matrices=("W_out",), segments=("last",)),
        ),
    ),
    "effect of W_in": (
        None,
        (TargetRank(matrices=("W_in",), segments=("last",), **FEW),),
    ),
}
"""Each run's BOS (None: the model's default) and experiments. An effect costs a replay for each
token and layer."""


def measure(name: str, data: str, folder: Path, only: str | None) -> None:
    """Run all sweeps of a model, or one, or carry on."""
    records = bwlens.read_records(data).records
    order = random.Random(0).sample(range(len(records)), len(records))
    start = 0 if name == "demo" else TUNING
    chosen = [records[i] for i in order[start : start + REPORTED]]
    model = bwlens.load_model(name)
    for run, (bos, experiments) in RUNS.items():
        if only in (None, run) and not (name == "demo" and bos is False):  # it has none
            where = _folder(folder, name, run)
            mine = [_fitted(one, model) for one in experiments]
            sweep(mine, model, chosen, where, prepend_bos=bos, max_memory=2**28, page=False)


def _fitted(experiment: Experiment, model: LensModel) -> Experiment:
    """Every layer of a small model."""
    few = len(model.blocks) < 12
    return replace(experiment, layers=None) if few else experiment


def _folder(folder: Path, model: str, run: str) -> Path:
    return folder / model / run.replace(",", "").replace(" ", "_")


# What is made of the rows.


def write(folder: Path) -> None:
    """The aggregated numbers, the claims and the figures, of the runs that are there."""
    tables: list[Any] = []
    claims: list[dict[str, Any]] = []
    rows: dict[tuple[str, str, str], Any] = {}
    for model, run in product(("smollm2", "demo"), RUNS):
        where = _folder(folder, model, run)
        if not where.exists():
            continue
        swept = read_sweep(where)
        for name, result in swept.results.items():
            rows[model, run, name] = result.rows
            summary: Any = result.summary
            kept = summary["quantity"].isin(KEPT) & summary["matrix"].isin(["W_in", "W_out"])
            if "segment" in summary:  # few targets have several tokens
                kept &= summary["segment"] != "target"
                kept &= ~summary["quantity"].isin(TENS) | summary["segment"].isin(ENDS)
            tables.append(summary[kept].assign(model=model, run=run))
    for model in ("smollm2", "demo"):
        claims += Claims(model, {k[1:]: v for k, v in rows.items() if k[0] == model}).all()
    table: Any = pd.concat([pd.DataFrame(claims), *tables], ignore_index=True)
    first = ["claim", "model", "run", "matrix", "layer", "other", "segment", "quantity"]
    table = table[[*first, "mean", "low", "high", "n"]]
    for column in ("layer", "other"):
        table[column] = table[column].astype("Int64")
    for column in ("mean", "low", "high"):
        table[column] = table[column].where(table[column].abs() < 100, table[column].round())
    table.round(4).to_csv(RESULTS / "paper_on_smollm2.csv", index=False)
    print(pd.DataFrame(claims).to_string(float_format="%.3g"))
    for name, figure in figures(table[table["claim"].isna()]).items():
        figure.savefig(RESULTS / f"paper_on_smollm2-{name}.png", dpi=110)


class Claims:
    """Figures of the paper's claims on one model: means over prompts with their intervals."""

    def __init__(self, model: str, rows: dict[tuple[str, str], Any]) -> None:
        self._model, self._rows = model, rows
        self._depth = int(rows["plain", "segment_norms"]["layer"].max()) + 1

    def all(self) -> list[dict[str, Any]]:
        """Every claim, run by run."""
        found = []
        for run, name in self._rows:
            about = {
                "gradient_rank": self._rank,
                "segment_norms": self._norms,
                "target_rank": self._ranks,
                "layer_cosine": self._cosines,
            }[name]
            for claim, values, at in about(self._rows[run, name], run):
                if not len(values):
                    continue
                mean, low, high, n = (
                    float(part[0]) for part in mean_ci(np.asarray(values, dtype=float)[:, None])
                )
                found.append(
                    {"claim": claim, "model": self._model, "run": run, **at}
                    | {"mean": mean, "low": low, "high": high, "n": int(n)}
                )
        return found

    def _rank(self, rows: Any, _: str) -> Claimed:
        """Figure 3, the worst of the layers but the last."""
        full = rows.assign(full=rows["rank"] == rows["n"])
        for matrix, its in full.groupby("matrix"):
            shares = its.pivot(index="item", columns="layer", values="full").astype(float)
            worst = int(shares.iloc[:, :-1].mean().idxmin())
            at = {"matrix": matrix}
            yield "rank is n, the worst layer but the last", shares[worst], {**at, "layer": worst}
            last = its[its["layer"] == self._depth - 1].set_index("item")
            yield (
                "rank in the last layer is that of the tokens read",
                last["rank"] == last["active"],
                at,
            )
            yield "rank in the last layer is 1", last["rank"] == 1, at
            effective = its.assign(of_n=its["effective_rank"] / its["n"])
            kept = effective[effective["layer"] < self._depth - 1]
            yield "effective rank, of n", kept.groupby("item")["of_n"].mean(), at

    def _norms(self, rows: Any, _: str) -> Claimed:
        """Figures 5, 16 and 17."""
        quarter = self._depth // 4
        words = rows[rows["segment"] != "bos"]
        for matrix in ("W_out", "W_in"):
            at = {"matrix": matrix}
            delta, x = (
                words[words["matrix"] == matrix].pivot(
                    index=["item", "layer"], columns="segment", values=value
                )
                for value in ("delta", "x")
            )
            lower = delta[delta.index.get_level_values("layer") < quarter]
            lower = lower.groupby("item").mean()
            strongest = lower.idxmax(axis=1)
            subject = strongest.str.endswith("subject")
            yield "subject has the longest delta in the first quarter", subject, at
            yield "last token has it there", strongest == "last", at
            wins = (delta.idxmax(axis=1) == "last").unstack("layer")
            upper = wins.loc[:, wins.columns >= quarter]
            yield "last token has it, share of the layers above", upper.mean(axis=1), at
            losses = (~wins).to_numpy()[:, ::-1].argmax(axis=1)
            takes = np.where(wins.all(axis=1), 0, self._depth - losses)
            yield "layer from which it has it throughout", takes, at
            rest = [s for s in ("before", "after") if s in delta]
            best = delta.max(axis=1)
            others = (delta[rest].mean(axis=1) / best).unstack("layer")
            for half, where in (
                ("lower", slice(0, self._depth // 2 - 1)),
                ("upper", slice(self._depth // 2, None)),
            ):
                yield (
                    f"other tokens' delta over the longest, {half} half",
                    others.loc[:, where].mean(axis=1),
                    at,
                )
            held = delta.drop(self._depth - 1, level="layer")
            for name, norms in (("delta", held), ("x", x)):
                spread = (norms.max(axis=1) / norms.min(axis=1)).groupby("item").median()
                yield f"longest over shortest {name} of a layer, median", spread, at
            bos = rows[(rows["segment"] == "bos") & (rows["matrix"] == matrix)]
            if len(bos):
                for name, norms in (("delta", held), ("x", x)):
                    its = bos.set_index(["item", "layer"])[name].reindex(norms.index)
                    share = (its / norms.max(axis=1)).groupby("item").median()
                    yield f"BOS' {name} over the longest, median over layers", share, at
                    most = (its / norms.max(axis=1)).groupby("item").max()
                    yield f"BOS' {name} over the longest, at most", most, at

    def _ranks(self, rows: Any, run: str) -> Claimed:
        """Figures 6 and 18-21."""
        last = self._depth - 1
        for matrix, its in rows.groupby("matrix", observed=True):
            at = {"matrix": matrix}
            others = its[(its["layer"] == last) & ~its["segment"].isin(["last", "target"])]
            if matrix == "W_out":
                silent = others.groupby("item")["silent"].min()
                yield "other tokens are silent in the last layer", silent, at
            for title, quantity in _tens(run, matrix).items():
                for segment in [s for s in ENDS if s in set(its["segment"])]:
                    kept = its[(its["segment"] == segment) & (its["layer"] < last)]
                    for half, where in (
                        ("all layers", kept["layer"] >= 0),
                        ("lower half", kept["layer"] < self._depth / 2),
                        ("upper half", kept["layer"] >= self._depth / 2),
                    ):
                        shares = kept[where].groupby("item")[quantity].mean()
                        yield f"{title}, {half} but the last", shares, {**at, "segment": segment}

    def _cosines(self, rows: Any, _: str) -> Claimed:
        """Figures 22 and 23: pairs of blocks, of a deep model without its last."""
        rows = rows[rows["other"] < self._depth - 1] if self._depth > 10 else rows
        for apart in (1, 2, 4, 8, 10):
            near = rows[rows["other"] - rows["layer"] == apart]
            if len(near):
                at = {"matrix": "W_out", "other": apart}
                means = near.pivot(index="item", columns="layer", values="cosine")
                yield "cosine of blocks so far apart", means.mean(axis=1), at
                worst = int(means.mean().idxmin())
                yield "the least of them", means[worst], {**at, "layer": worst}
                yield "share of them above 0.7", (means > 0.7).mean(axis=1), at


def _tens(run: str, matrix: str) -> dict[str, str]:
    """The columns that say whether target and answer are where the paper has them."""
    if run.startswith("effect"):
        columns = "target_top_ten", "answer_bottom_ten"
    elif matrix == "W_out":
        columns = "target_bottom_ten", "answer_top_ten"
    else:
        names = "target among the ten of x", "answer among the ten of x"
        return dict(zip(names, ("target_top_ten", "answer_top_ten"), strict=True))
    names = "target among the ten promoted", "answer among the ten suppressed"
    return dict(zip(names, columns, strict=True))


def figures(table: Any) -> dict[str, Figure]:
    """The paper's figures 5 and 17, 6 and 18-21, 22 and 23, on SmolLM2."""
    table = table[table["model"] == "smollm2"]
    of = table.groupby(["run", "matrix", "quantity"])
    drawn: dict[str, Figure] = {}

    norms = {
        f"{name}, {how}": (run, matrix, quantity)
        for run, how in (("plain", "with BOS"), ("no BOS", "without"))
        for name, matrix, quantity in (
            ("\u03b4 of W_out", "W_out", "delta"),
            ("x of W_in", "W_in", "x"),
            ("x of W_out", "W_out", "x"),
        )
    }
    rows = [of.get_group(key) for key in norms.values()]
    drawn["norms"], axes = panels(
        table, list(norms), rows, "segment", SEGMENTS, "mean norm", size=(2.3, 1.9), columns=3
    )
    for at, ax in enumerate(axes):
        if at % 3 == 2:
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, ax.get_ylim()[1])

    ranks = {
        "target in \u03b4 of W_out (0: lowered most)": ("plain", "W_out", "target_rank"),
        "answer in \u03b4 of W_out": ("plain", "W_out", "answer_rank"),
        "target in the effect (0: raised most)": ("effect", "W_out", "target_rank"),
        "answer in the effect": ("effect", "W_out", "answer_rank"),
        "target in x of W_in": ("plain", "W_in", "target_rank"),
        "answer in x of W_in": ("plain", "W_in", "answer_rank"),
    }
    rows = [of.get_group(key) for key in ranks.values()]
    drawn["ranks"], axes = panels(
        table, list(ranks), rows, "segment", SEGMENTS, "mean rank", size=(2.6, 1.9), columns=2,
        share_y=True,
    )  # fmt: skip
    axes[0].invert_yaxis()

    readings = {"plain": "plain", "effect": "effect", "no BOS": "plain, without BOS"}
    titles, shares = list(_tens("plain", "W_out")), []
    for title in titles:
        parts = [
            of.get_group((run, "W_out", _tens(run, "W_out")[title])).assign(reading=name)
            for run, name in readings.items()
        ]
        part = pd.concat(parts)
        shares.append(part[part["segment"] == "last"])
    drawn["shares"], _ = panels(
        pd.concat(shares), titles, shares, "reading", list(readings.values()), "share of prompts",
        size=(2.8, 2.1), share_y=True,
    )  # fmt: skip

    maps = {}
    for title, run in (
        ("\u03b4 of W_out", "plain"),
        ("the same, without BOS", "no BOS"),
        ("effect", "effect"),
    ):
        its = of.get_group((run, "W_out", "cosine"))
        layers = sorted({*its["layer"], *its["other"]})
        at = {layer: place for place, layer in enumerate(layers)}
        grid = np.eye(len(layers))
        for low, high, mean in zip(its["layer"], its["other"], its["mean"], strict=True):
            grid[at[low], at[high]] = grid[at[high], at[low]] = mean
        maps[title] = (layers, grid)
    drawn["cosines"] = cosine_maps(maps)
    return drawn


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    only = given.pop() if "--only" in sys.argv else None
    if "--write" in sys.argv:
        write(Path(given[0]))
    else:
        measure(given[0], given[1], Path(given[2]), only)
