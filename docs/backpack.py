"""How docs/backpack.png and docs/backpack-editing.csv are made.

    python docs/backpack.py            # the picture, of docs/backpack.csv (tools/backpack/arms.py)
    python docs/backpack.py editing    # edits of backpack-demo; some minutes

Edits: the records of the demo whose subject is one token. ROME's layer and position are chosen by S
on the first 13; the other 30 are reported, the sense edit with every strength.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import bwlens
from bwlens.demo import facts
from bwlens.edit import WeightChange, forward_pass_shift, key_statistics, rome
from bwlens.knowledge import sense_edit
from bwlens.model.prompts import make_batch
from bwlens.show.drawing import Drawing, plain

HERE = Path(__file__).parent
TUNING = 13
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 4.0)
COLUMNS = ("ES", "PS", "NS", "S", "efficacy", "paraphrase", "neighbourhood", "perplexity")


def picture(rows: Any) -> Drawing:
    """Each arm's seeds: perplexity of the prose, and facts known."""
    order = list(dict.fromkeys(rows["arm"]))[::-1]
    figure = Drawing(figsize=(6.4, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, column, name in (
        (left, "perplexity", "perplexity of held-out prose"),
        (right, "known", "facts known (%)"),
    ):
        for at, arm in enumerate(order):
            values = rows.loc[rows["arm"] == arm, column]
            ax.plot([values.min(), values.max()], [at, at], color="#9db4c0", lw=3, zorder=1)
            ax.plot(values, [at] * len(values), "o", color="#1f4e79", ms=3, zorder=2)
        ax.set_xlabel(name)
        ax.grid(axis="x", lw=0.3)
        plain(ax)
    left.set_yticks(range(len(order)), order)
    left.tick_params(axis="y", labelsize=6)
    return figure


def summary(rows: Any) -> Any:
    """Mean and standard deviation over the seeds, in the order of the arms."""
    groups = rows.groupby("arm", sort=False)
    table = groups[["parameters"]].first()
    for column in ("perplexity", "trained", "unseen", "known"):
        table[column] = [f"{v.mean():.1f} ± {v.std():.1f}" for _, v in groups[column]]
    return table


def others_kept(model: Any, change: WeightChange, record: Any) -> list[bool]:
    """Whether the subject's other facts, which the model knew, are still answered with a change."""
    edit = record.edit
    own = [f for f in facts() if f.subject == edit.subject and f.answer != edit.target_true]
    prompts, answers = [f.prompts()[0] for f in own], [f.answer for f in own]

    def said() -> list[str]:
        batch = make_batch(model, prompts)
        with torch.no_grad():
            logits = model(batch.tokens)[torch.arange(len(batch)), batch.last]
        return [model.tokenizer.decode([i]) for i in logits.argmax(-1).tolist()]

    if not prompts:
        return []
    before = said()
    with change.applied(model):
        after = said()
    return [a == right for b, a, right in zip(before, after, answers, strict=True) if b == right]


def editing() -> Any:
    """One row a method: the harness' figures, and the subject's other facts kept."""
    model = bwlens.load_model("backpack-demo")
    records = [
        record
        for record in bwlens.read_records("demo")
        if len(model.to_tokens(" " + record.edit.subject, prepend_bos=False)[0]) == 1
    ]
    sentences = [f.prompts()[0] + f.answer + "." for f in facts()]
    stories = (bwlens.demo.ROOM / "stories.txt").read_text(encoding="utf-8").split("\n\n\n")
    statistics = key_statistics(model, [*stories, *sentences], cache=False)

    def run(methods: dict[str, Any], some: list[Any], **options: Any) -> pd.DataFrame:
        result = bwlens.evaluate(
            model, methods, some, generation_every=0, progress=False, **options
        )
        assert not result.failures, result.failures
        return result.summary.pivot(index="method", columns="metric", values="mean")

    candidates: dict[str, Any] = {
        f"ROME, layer {layer}, {position}": partial(
            rome, layer=layer, position=position, statistics=statistics
        )
        for layer in range(4)
        for position in ("subject", "last")
    }
    tuned = run(candidates, records[:TUNING])
    print(tuned.round(1).to_string(), flush=True)
    best = str(tuned["S"].idxmax())
    chosen: dict[str, Any] = {"none": "none"}
    chosen |= {f"senses, strength {s:g}": partial(sense_edit, strength=s) for s in STRENGTHS}
    chosen |= {best: candidates[best], "forward pass shift": forward_pass_shift}
    table = run(chosen, records[TUNING:], perplexity_text="demo", perplexity_every=1)
    kept = {}
    for name, method in chosen.items():
        right: list[bool] = []
        for record in records[TUNING:]:
            change = WeightChange() if method == "none" else method(model, record.edit)
            right += others_kept(model, change, record)
        kept[name] = 100 * sum(right) / len(right)
        print(name, len(right), kept[name], flush=True)
    table = table[[c for c in COLUMNS if c in table]].assign(other_facts=pd.Series(kept))
    return table.round(1).loc[list(chosen)]


def main() -> None:
    """The command line."""
    if sys.argv[1:] == ["editing"]:
        table = editing()
        table.to_csv(HERE / "backpack-editing.csv")
        print(table.to_string())
        return
    rows = pd.read_csv(HERE / "backpack.csv")
    arms = rows[~rows["arm"].str.startswith("demo")]
    print(summary(arms).to_string())
    picture(arms).savefig(HERE / "backpack.png", dpi=150)


if __name__ == "__main__":
    main()
