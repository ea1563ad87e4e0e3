"""How docs/paper_on_smollm2.csv, the claims in docs/paper.md and their figures are made.

    python docs/paper_on_smollm2.py smollm2 counterfact_requests.json runs/paper
    python docs/paper_on_smollm2.py demo demo runs/paper
    python docs/paper_on_smollm2.py --write runs/paper

The same hundred records as those of docs/reading_fidelity.py. Each run is a sweep: stopped and
started again it carries on. `--only NAME` takes one run of `RUNS`.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import bwlens
from bwlens.experiments import (
    Experiment,
    GradientRank,
    LayerCosine,
    SegmentNorms,
    TargetRank,
    sweep,
)
from bwlens.model.protocol import LensModel

HERE = Path(__file__).parent
TUNING, REPORTED = 60, 100
CHEAP = (GradientRank(), SegmentNorms(), TargetRank(), LayerCosine())
ENDS = ("first subject", "last subject", "last")
EFFECT = {"read_by": "effect", "layers": (*range(0, 30, 2), -1)}
RUNS = {
    "plain": (None, CHEAP),
    "effect": (
        None,
        (
            TargetRank(matrices=("W_out",), segments=ENDS, **EFFECT),
            LayerCosine(**EFFECT),
        ),
    ),
    "no BOS": (
        False,
        (GradientRank(), SegmentNorms(), TargetRank(segments=ENDS), LayerCosine()),
    ),
    "dual": (None, (TargetRank(matrices=("W_out",), read_by="dual", segments=ENDS),)),
    "effect of W_in": (
        None,
        (TargetRank(matrices=("W_in",), segments=("last",), **EFFECT),),
    ),
    "effect, no BOS": (
        False,
        (TargetRank(matrices=("W_out",), segments=("last",), **EFFECT),),
    ),
}
"""Each run's BOS (None: the model's default) and experiments. An effect costs a replay for each
token and layer: of the subject's ends and the last token, in every second layer and the last."""


def measure(name: str, data: str, folder: Path, only: str | None) -> None:
    """Run all sweeps of a model, or one, or carry on."""
    records = bwlens.read_records(data).records
    order = random.Random(0).sample(range(len(records)), len(records))
    start = 0 if name == "demo" else TUNING
    chosen = [records[i] for i in order[start : start + REPORTED]]
    model = bwlens.load_model(name)
    for run, (bos, experiments) in RUNS.items():
        if only in (None, run):
            where = folder / name / run.replace(",", "").replace(" ", "_")
            mine = [_fitted(one, model) for one in experiments]
            sweep(mine, model, chosen, where, prepend_bos=bos, max_memory=2**28, page=False)


def _fitted(experiment: Experiment, model: LensModel) -> Experiment:
    """Every layer of a small model."""
    few = len(model.blocks) < 12
    return replace(experiment, layers=None) if few else experiment


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    only = given.pop() if "--only" in sys.argv else None
    measure(given[0], given[1], Path(given[2]), only)
