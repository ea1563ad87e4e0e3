"""How results/backpack.png and results/backpack-editing.csv are made.

    python docs/scripts/backpack.py            # the picture, of what tools/backpack/arms.py wrote
    python docs/scripts/backpack.py editing    # edits of backpack-demo; some minutes
    python docs/scripts/backpack.py matched    # the same records in both models; some minutes

Edits: the records of the demo whose subject is one token. The sense edit of 30 of them with every
strength; ROME of the 13 others in every layer, at the subject's and at the prompt's last token.
Matched: those of the 30 that the Backpack and the demo model both answer; the sense edit, ROME in
the Backpack where the 13 others had it best, ROME in the demo model where it does best (layer 4,
the last token: chosen on half of the demo's records, some of these among them).
"""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import bwlens
from bwlens.demo import facts
from bwlens.edit import WeightChange, key_statistics, rome
from bwlens.edit.keys import PREFIXES
from bwlens.knowledge import sense_edit
from bwlens.model.prompts import make_batch
from bwlens.runs.intervals import mean_ci
from bwlens.show.drawing import Drawing, plain

RESULTS = Path(__file__).parents[1] / "results"
OTHERS = 13
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


def answers(model: Any, record: Any) -> bool:
    """Whether the model says the true answer to the record's own question."""
    tokens = model.to_tokens(record.edit.text)
    with torch.no_grad():
        said = int(model(tokens)[0, -1].argmax())
    return said == int(model.to_tokens(record.edit.target_true, prepend_bos=False)[0, 0])


def one_token_records(model: Any) -> list[Any]:
    """The demo's records whose subject is one token behind a space."""
    return [
        record
        for record in bwlens.read_records("demo")
        if len(model.to_tokens(" " + record.edit.subject, prepend_bos=False)[0]) == 1
    ]


def figures(model: Any, methods: dict[str, Any], records: list[Any]) -> Any:
    """One row a method: the harness' figures, and the subject's other facts kept."""
    table = run(model, methods, records, perplexity_text="demo", perplexity_every=10)
    kept = {}
    for name, method in methods.items():
        right: list[bool] = []
        for record in records:
            change = WeightChange() if method == "none" else method(model, record.edit)
            right += others_kept(model, change, record)
        kept[name] = 100 * sum(right) / len(right)
        print(name, len(right), kept[name], flush=True)
    table = table[[c for c in COLUMNS if c in table]].assign(other_facts=pd.Series(kept))
    return table.round(1).loc[list(methods)]


def run(model: Any, methods: dict[str, Any], records: list[Any], **options: Any) -> Any:
    """The means of the harness' metrics, a row a method."""
    result = bwlens.evaluate(model, methods, records, generation_every=0, progress=False, **options)
    assert not result.failures, result.failures
    return result.summary.pivot(index="method", columns="metric", values="mean")


def fact_statistics(model: Any) -> Any:
    """Key statistics of the demo's facts and stories."""
    sentences = [f.prompts()[0] + f.answer + "." for f in facts()]
    stories = (bwlens.demo.ROOM / "stories.txt").read_text(encoding="utf-8").split("\n\n\n")
    return key_statistics(model, [*stories, *sentences], cache=False)


def editing() -> Any:
    """The sense edit with every strength on 30 records; on 13 others, ROME in every layer."""
    model = bwlens.load_model("backpack-demo")
    records = one_token_records(model)
    senses = {f"senses, strength {s:g}": partial(sense_edit, strength=s) for s in STRENGTHS}
    table = figures(model, {"none": "none", **senses}, records[OTHERS:])
    statistics = fact_statistics(model)
    everywhere = {
        f"ROME, layer {layer}, {position}": partial(
            rome, layer=layer, position=position, statistics=statistics
        )
        for layer in range(4)
        for position in ("subject", "last")
    }
    written = run(model, everywhere, records[:OTHERS])
    return pd.concat([table, written[[c for c in COLUMNS if c in written]].round(1)])


def matched() -> tuple[Any, Any]:
    """Means of each method on records that both models know, and paired differences from ROME."""
    backpack, demo = bwlens.load_model("backpack-demo"), bwlens.load_model("demo")
    records = one_token_records(backpack)[OTHERS:]
    records = [r for r in records if answers(backpack, r) and answers(demo, r)]
    print(len(records), "records known to both", flush=True)
    statistics = fact_statistics(backpack)
    asked: dict[str, tuple[Any, Any]] = {
        "senses, strength 1": (backpack, partial(sense_edit, strength=1.0)),
        "senses, strength 1.5": (backpack, partial(sense_edit, strength=1.5)),
        "ROME in the Backpack": (
            backpack, partial(rome, layer=0, position="last", statistics=statistics)
        ),
        "ROME in the demo model": (
            demo, partial(rome, layer=4, position="last", clamp=5.0, prefixes=PREFIXES)
        ),
    }  # fmt: skip
    found, kept = {}, {}
    for name, (model, edited) in asked.items():
        method = cache(edited)
        result = bwlens.evaluate(model, {name: method}, records, generation_every=0, progress=False)
        assert not result.failures, result.failures
        found[name] = result
        own = [others_kept(model, method(model, record.edit), record) for record in records]
        kept[name] = [100 * sum(some) / len(some) if some else float("nan") for some in own]
        print(name, flush=True)
    others = pd.DataFrame(kept)
    other_facts = mean_ci(others.to_numpy())._asdict()
    means = pd.concat([result.summary for result in found.values()])
    shown = pd.DataFrame({"method": list(asked), "metric": "other facts", **other_facts})
    means = pd.concat([means[means["metric"].isin(COLUMNS)], shown])
    last = "ROME in the demo model"
    gaps = []
    for name in [*asked][:-1]:
        gap = found[name].compare(found[last])
        gap = gap[gap["metric"].isin(COLUMNS)]
        away = mean_ci((others[name] - others[last]).to_numpy()[:, None])
        (row,) = zip(*away, strict=True)
        gap.loc[len(gap) + 99] = ["other facts", *row]
        gaps.append(gap.assign(method=f"{name} - {last}"))
    return means, pd.concat(gaps)


def main() -> None:
    """The command line."""
    if sys.argv[1:] == ["matched"]:
        means, gaps = matched()
        table = pd.concat([means, gaps.rename(columns={"difference": "mean"})])
        table = table[["method", "metric", "mean", "low", "high", "n"]].round(1)
        table.to_csv(RESULTS / "backpack-matched.csv", index=False)
        print(table.to_string())
        return
    if sys.argv[1:] == ["editing"]:
        table = editing()
        table.to_csv(RESULTS / "backpack-editing.csv")
        print(table.to_string())
        return
    rows = pd.read_csv(RESULTS / "backpack.csv")
    arms = rows[~rows["arm"].str.startswith("demo")]
    print(summary(arms).to_string())
    picture(arms).savefig(RESULTS / "backpack.png", dpi=150)


if __name__ == "__main__":
    main()
