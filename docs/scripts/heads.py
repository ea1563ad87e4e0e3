"""Which rankings of heads find those that a task needs; and what R does in other prompts' patterns.

    python docs/scripts/heads.py ranking LRE [--device cuda] [--seeds 3] [--rank 25] [--judge 100]
    python docs/scripts/heads.py alpha LRE [--device cuda] [--train 25] [--judge 100]

LRE is the folder of its relations. Writes results/heads*.csv and .png; what was measured before is
taken from docs/.heads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

import bwlens
from bwlens.experiments._head_ranking import HeadRanking, head_ranking, in_context, induction
from bwlens.experiments._patching_alphas import commonest_length, patching_alphas

RESULTS = Path(__file__).parents[1] / "results"
KEPT = RESULTS.parent / ".heads"
RELATIONS = ("factual/country_capital_city", "factual/country_language", "linguistic/adj_antonym")
PATCHED = ("linguistic/adj_antonym", "linguistic/verb_past_tense", "factual/landmark_in_country")


def relations(folder: Path, names: tuple[str, ...]) -> list[Any]:
    """LRE relations by their names."""
    return [json.loads((folder / f"{name}.json").read_text("utf-8")) for name in names]


def ranking(model: Any, ask: argparse.Namespace) -> None:
    """Both tasks, prompts drawn anew for each seed."""
    n, tables, areas = ask.rank + ask.judge, [], []
    for task in ("induction", "in context"):
        seeds, stem = [], task.replace(" ", "-")
        for seed in range(ask.seeds):
            print(f"{task}, seed {seed}: {ask.rank} prompts rank, {ask.judge} judge", flush=True)
            if task == "induction":
                prompts, targets = induction(model.cfg.d_vocab, n_prompts=n, seed=seed)
            else:
                drawn = relations(ask.folder, RELATIONS)
                prompts, targets = in_context(drawn, n_prompts=n, shots=2, seed=seed)
            seeds.append(
                head_ranking(
                    model, prompts, targets, n_ranking=ask.rank, seeds=3, batch_size=ask.batch,
                    kept=(0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
                    out=KEPT / f"{stem}-{ask.rank}-{ask.judge}-{seed}",
                )
            )  # fmt: skip
        rows = pd.concat(
            [one.rows.assign(prompt=one.rows["prompt"] + s * n) for s, one in enumerate(seeds)]
        )
        costs: Any = pd.DataFrame([one.seconds for one in seeds])
        result = HeadRanking(rows, seeds[0].orders, costs.mean().to_dict())
        figure = result.plot()
        figure.axes[0].set_title(f"SmolLM2-135M, {task}", fontsize=7)
        figure.savefig(RESULTS / f"heads-{stem}.png", dpi=200)
        tables += [result.summary(top).assign(task=task, top=top) for top in (1, 2, 3)]
        each: Any = pd.concat(one.area().assign(seed=s) for s, one in enumerate(seeds))
        spread = each.groupby("ranking")["mean"].agg(["min", "max"]).add_prefix("seed_")
        areas.append(result.area().assign(task=task).merge(spread, on="ranking"))
        print(areas[-1].to_string(), flush=True)
        areas[-1].to_csv(RESULTS / f"heads-{stem}.csv", index=False, float_format="%.3f")
    pd.concat(tables).to_csv(RESULTS / "heads.csv", index=False, float_format="%.3f")


def alpha(model: Any, ask: argparse.Namespace) -> None:
    """A mean R for each task, in the patterns of prompts that it was not taken of."""
    n, tables = ask.train + ask.judge, []
    tasks: dict[str, Any] = {"induction": induction(model.cfg.d_vocab, n_prompts=n)}
    for name, relation in zip(PATCHED, relations(ask.folder, PATCHED), strict=True):
        drawn = commonest_length(model, *in_context([relation], n_prompts=12 * n, shots=2))
        tasks[name.split("/")[1]] = (drawn[0][:n], drawn[1][:n])
    for task, (prompts, targets) in tasks.items():
        print(f"{task}: {ask.train} train, {len(prompts) - ask.train} judge", flush=True)
        result = patching_alphas(
            model, prompts, targets, n_training=ask.train, batch_size=ask.batch,
            out=KEPT / f"alpha-{task}-{ask.train}-{ask.judge}",
        )  # fmt: skip
        figure = result.plot()
        figure.axes[0].set_title(f"SmolLM2-135M, {task}", fontsize=7)
        figure.savefig(RESULTS / f"heads-alpha-{task.replace('_', '-')}.png", dpi=200)
        tables += [
            result.summary(v).assign(task=task, value=v) for v in ("top1", "top2", "top3", "loss")
        ]
        shown: Any = pd.concat(tables[-4::3])
        print(shown.pivot_table("mean", ["value", "kind"], "alpha").to_string(), flush=True)
    pd.concat(tables).to_csv(RESULTS / "heads-alpha.csv", index=False, float_format="%.3f")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("ranking", "alpha"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    for name, default in (("rank", 25), ("train", 25), ("judge", 100), ("seeds", 3), ("batch", 45)):
        parser.add_argument(f"--{name}", type=int, default=default)
    ask = parser.parse_args()
    model = bwlens.load_model("smollm2", device=ask.device)
    (ranking if ask.what == "ranking" else alpha)(model, ask)


if __name__ == "__main__":
    main()
