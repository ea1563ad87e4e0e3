"""How reading_tries.csv is made: tries to read lower layers of SmolLM2 better than `effect`.

    python docs/scripts/reading_tries.py counterfact_requests.json rows.csv [seconds]
    python docs/scripts/reading_tries.py --write rows.csv

W_out's delta at the prompt's last token; the target's place from the promoted end. The records are
those of `reading_fidelity.py`: the first 60 of a seeded order are for tuning, what is reported
comes after them; both by turns, so that a stopped run has as many of each. Each try costs at most
four passes a cell. Stopped and started again it carries on.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pandas as pd
import torch

import bwlens
from bwlens import Site
from bwlens.gradient.capturing import captured
from bwlens.gradient.objectives import NLL
from bwlens.model.head import head_of
from bwlens.reading.effect import EffectOf, tempered
from bwlens.reading.scoring import all_scores
from bwlens.reading.standardised import dual_head

LAYERS = (0, 6, 12, 15)
PREFIXES = ("It is well known. ", "The book says so: ")
TEMPERS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
RIDGES = (0.01, 0.1, 1.0)
FAR = (0.02, 0.2, 1.0)
"""Sizes of a single step, in nats; that of `effect` is .02 and twice that, both ways."""
MEANS = 8
"""How many prompts the means are of; they are tuning's, and not judged."""


def variants(model, token: int) -> list[int]:
    """Ids of tokens that spell a word in another case, with or without a blank or an ending."""
    if not hasattr(model, "_spelled"):
        ids = list(range(model.cfg.d_vocab))
        texts = [t.replace("\u0120", " ") for t in model.tokenizer.convert_ids_to_tokens(ids)]
        spelled: dict[str, list[int]] = {}
        for i, text in zip(ids, texts, strict=True):
            spelled.setdefault(text.strip().lower(), []).append(i)
        model._spelled = spelled
    word = model.tokenizer.decode([token]).strip().lower()
    ends = ("", "s", "es", "'s", "n", "an", "ian", "ese", "ish")
    return [i for end in ends for i in model._spelled.get(word + end, ())] or [token]


def place(scores: torch.Tensor, ids: list[int]) -> list[float]:
    """Of the best of some words, row by row, each variant's higher ones counted once."""
    best = scores[:, ids].amax(1, keepdim=True)
    return ((scores > best).sum(1) + 1.0).tolist()


def own_of(model, edit) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt's effects and deltas, for the means."""
    objective = NLL(edit.target_new)
    grads, every = captured(model, edit.text, objective, "W_out", list(LAYERS), replay=True)
    cells = [(Site("W_out", layer), int(grads.batch.last[0])) for layer in LAYERS]
    rows = [grads[site].delta[pos] for site, pos in cells]
    return EffectOf(model, grads, objective, every).along(cells, rows)[0], torch.stack(rows)


def one(model, edit, means) -> dict[tuple, list[float]]:
    """The target's places by every try."""
    objective, effects, ps, deltas = NLL(edit.target_new), [], [], torch.empty(0)
    target, far = -1, {}
    for prefix in ("", *PREFIXES):
        grads, every = captured(
            model, prefix + edit.text, objective, "W_out", list(LAYERS), replay=True
        )
        task = EffectOf(model, grads, objective, every)
        pos = int(grads.batch.last[0])
        cells = [(Site("W_out", layer), pos) for layer in LAYERS]
        rows = [grads[site].delta[pos] for site, _ in cells]
        effects.append(task.along(cells, rows)[0])
        ps.append(task.probabilities)
        if not prefix:
            target = grads.batch.targets[0][0]
            deltas = torch.stack(rows)
            far = {nats: task.along(cells, rows, nats)[0] for nats in FAR}
    own, p, spelled = effects[0], ps[0], variants(model, target)
    several, p_mean = torch.stack(effects).mean(0), torch.stack(ps).mean(0)
    scores = {("effect", t): tempered(own, p, t) for t in TEMPERS}
    scores |= {("contexts", t): tempered(several, p_mean, t) for t in TEMPERS}
    scores |= {
        ("contexts, weighed each", t): torch.stack(
            [tempered(e, q, t) for e, q in zip(effects, ps, strict=True)]
        ).mean(0)
        for t in TEMPERS
    }
    for nats, effect in far.items():
        scores |= {(f"one step of {nats} nats", t): tempered(effect, p, t) for t in (0.0, 0.1)}
        changed = (
            p * (effect * nats).clamp(max=20).exp() - p
        )  # what the step adds to the probability
        scores[f"one step of {nats} nats, change of p^.1", 0.1] = (changed + p).pow(0.1) - p.pow(
            0.1
        )
    for ridge in RIDGES:
        dual = -all_scores(dual_head(head_of(model), ridge), deltas)
        scores |= {(f"dual, ridge {ridge}", t): tempered(dual, p, t) for t in (0.0, 0.05)}
    effect_mean, delta_mean = means
    scores |= {("effect less its mean", t): tempered(own - effect_mean, p, t) for t in TEMPERS}
    dual = -all_scores(dual_head(head_of(model)), deltas - delta_mean)
    scores |= {("dual of delta less its mean", t): tempered(dual, p, t) for t in (0.0, 0.05)}
    places = {(*name, "target"): place(each, [target]) for name, each in scores.items()}
    for name in (("effect", 0.0), ("effect", 0.1), ("contexts, weighed each", 0.1)):
        places[(*name, "any spelling")] = place(scores[name], spelled)
    return places


def write(file: str) -> None:
    """The share of prompts with the target among the ten, by try, with its standard error."""
    rows = pd.read_csv(file)
    rows["in_ten"] = (rows["place"] <= 10).astype(float)
    by = rows.groupby(["prompts", "try", "temper", "counted", "layer"], sort=False)
    table = by.agg(
        n=("place", "size"), in_ten=("in_ten", "mean"), error=("in_ten", "sem"),
        median_place=("place", "median"),
    )  # fmt: skip
    table.round(3).to_csv(Path(__file__).parents[1] / "results" / "reading_tries.csv")


def main(data: str, file: str, seconds: float = 1e9) -> None:
    """Run them, or carry on."""
    start = time.monotonic()
    records = bwlens.read_records(data).records
    order = random.Random(0).sample(range(len(records)), len(records))
    model = bwlens.load_model("smollm2")
    path = Path(file)
    state = path.with_suffix(".pt")
    done, kept = 0, []
    if state.exists():
        done, kept = torch.load(state)
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    for at in range(done, MEANS + 200):
        if time.monotonic() - start > seconds:
            break
        # The first ones give means alone; then tuning and reported by turns.
        n = max(0, at - MEANS)
        which = "tuning" if at < MEANS or n % 2 == 0 else "reported"
        index = at if at < MEANS else n // 2 + (MEANS if n % 2 == 0 else 60)
        if which == "tuning" and index >= 60:
            continue
        edit = records[order[index]].edit
        if at < MEANS:
            kept.append(own_of(model, edit))
        else:
            means = [torch.stack(part).mean(0) for part in zip(*kept, strict=True)]
            rows += [
                {"prompts": which, "item": index, "try": name, "temper": temper,
                 "counted": counted, "layer": layer, "place": where}
                for (name, temper, counted), each in one(model, edit, means).items()
                for layer, where in zip(LAYERS, each, strict=True)
            ]  # fmt: skip
            pd.DataFrame(rows).to_csv(path, index=False)
        torch.save((at + 1, kept), state)
        print(at + 1, which, f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write(sys.argv[2])
    else:
        main(sys.argv[1], sys.argv[2], float(([*sys.argv[3:], "1e9"])[0]))
