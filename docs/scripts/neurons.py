"""How results/neurons-smollm2*.csv are made: which rows carry facts, over many facts.

    python docs/scripts/neurons.py [smollm2]

Capitals and languages, each asked in three ways; those that the model answers are read. Rows that
carry: the 100 of all stores with the largest shares of the answer's logit. Beside them those that a
step moves most, towards another subject's answer and towards the own; those that carry a
paraphrase, another subject of the same relation, the other relation; as frequent ones, random ones.
Nothing was tuned on these facts.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import bwlens
from bwlens import knowledge
from bwlens.knowledge._controls import alike
from bwlens.runs.intervals import summarize
from bwlens.runs.parts import progress_bar

RESULTS = Path(__file__).parents[1] / "results"
N, SIZES = 100, (1, 10, 100, 1000)

CAPITALS = (
    "France Paris, Japan Tokyo, Italy Rome, Spain Madrid, Germany Berlin, Russia Moscow,"
    " Egypt Cairo, Greece Athens, Portugal Lisbon, Austria Vienna, Poland Warsaw, Sweden Stockholm,"
    " Norway Oslo, Ireland Dublin, Cuba Havana, Hungary Budapest, Thailand Bangkok, China Beijing,"
    " Denmark Copenhagen, Belgium Brussels, Turkey Ankara, Iran Tehran, Iraq Baghdad, Peru Lima,"
    " Kenya Nairobi, Finland Helsinki"
)
LANGUAGES = (
    "France French, Japan Japanese, Italy Italian, Germany German, Russia Russian, Brazil"
    " Portuguese, Egypt Arabic, Greece Greek, Poland Polish, Sweden Swedish, Mexico Spanish,"
    " Hungary Hungarian, Thailand Thai, Denmark Danish, Australia English, Turkey Turkish"
)
RELATIONS = {
    "capital": (
        CAPITALS,
        ("The capital of {} is", "The capital city of {} is", "{}'s capital city is called"),
    ),
    "language": (
        LANGUAGES,
        ("The official language of {} is", "In {}, people speak", "The people of {} speak"),
    ),
}


def facts(model: Any) -> list[dict[str, Any]]:
    """Those that the model answers when they are asked the first way."""
    known = []
    for relation, (pairs, (ask, *others)) in RELATIONS.items():
        for pair in pairs.split(", "):
            subject, answer = pair.split()
            fact = {"relation": relation, "subject": subject, "answer": f" {answer}"}
            fact |= {"prompt": ask.format(subject)}
            fact |= {"paraphrases": [other.format(subject) for other in others]}
            logits = model(model.to_tokens(fact["prompt"]), return_type="logits")[0, -1]
            if int(logits.argmax()) == int(
                model.to_tokens(fact["answer"], prepend_bos=False)[0, 0]
            ):
                known.append(fact)
    return known


def main(name: str = "smollm2") -> None:
    """Read every fact, then compare and ablate."""
    model = bwlens.load_model(name)
    known = facts(model)
    rates = knowledge.firing_rates(model, range(len(model.blocks)))
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    for fact in known:
        same = [f for f in known if f["relation"] == fact["relation"] and f is not fact]
        fact["others"] = [f["prompt"] for f in draw.sample(same, 3)]
        fact["aim"] = draw.choice([f["answer"] for f in same if f["answer"] != fact["answer"]])
    with progress_bar("reading", len(known)) as advance:
        for fact in known:
            asked, answer = fact["prompt"], fact["answer"]
            fact["found"] = knowledge.neurons(model, asked, answer, step=fact["aim"], top_k=1)
            fact["own"] = knowledge.neurons(model, asked, answer, top_k=1)
            again = fact["paraphrases"][0]
            fact["again"] = knowledge.neurons(model, again, answer, top_k=1)
            advance(1)
    by_prompt = {fact["prompt"]: fact for fact in known}
    shares, overlaps, links, ablated = [], [], [], []
    with progress_bar("ablating", len(known)) as advance:
        for item, fact in enumerate(known):
            found = fact["found"]
            at = {"item": item, "relation": fact["relation"], "subject": fact["subject"]}
            cumulative = found.cumulative()
            shares.append(
                at
                | {"logit": found.logit, "all": float(found.mlps.sum()) / found.logit}
                | {str(n): float(cumulative[n - 1]) / found.logit for n in SIZES}
            )
            carry = found.top(N)
            other = by_prompt[fact["others"][0]]["found"]
            away = draw.choice([f for f in known if f["relation"] != fact["relation"]])["found"]
            sets = {
                "itself": carry,
                "paraphrase": fact["again"].top(N),
                "another subject": other.top(N),
                "the other relation": away.top(N),
                "moved, another answer": found.top(N, by="moved"),
                "moved, its answer": fact["own"].top(N, by="moved"),
                "moved, another subject": other.top(N, by="moved"),
                "as frequent": alike(carry, rates, generator),
                "random": alike(carry, rates, generator, closest=None),
            }
            for kind, some in sets.items():
                part = sum(map(found.share_of, some)) / found.logit
                same = len({*carry} & {*some}) / N
                overlaps.append(at | {"rows": kind, "overlap": same, "share": part})
            for towards, one in (("another answer", found), ("its answer", fact["own"])):
                table = one.agreement().query("of == 'values'")
                links += [
                    at | {"towards": towards} | row
                    for row in table[["layer", "r", "control", "overlap", "chance"]].to_dict(
                        "records"
                    )
                ]
            table = knowledge.controls(
                model, found, n=(10, N), paraphrases=fact["paraphrases"], others=fact["others"],
                another=other, rates=rates, draws=2, seed=item,
            ).rows  # fmt: skip
            ablated.append(table.assign(**at))
            advance(1)
    print(f"{len(known)} facts known")
    of_both = pd.DataFrame(shares).assign(relation="both")
    # Several draws and prompts of a fact are one fact.
    by = ["item", "neurons", "size", "prompt"]
    each: Any = pd.concat(ablated).groupby(by, as_index=False)[["change", "kept"]].mean()
    sizes = tuple(map(str, SIZES))
    tables = {
        "shares": summarize(
            pd.concat([of_both, pd.DataFrame(shares)]), ("relation",), ("logit", "all", *sizes)
        ),
        "overlaps": summarize(pd.DataFrame(overlaps), ("rows",), ("overlap", "share")),
        "links": summarize(
            pd.DataFrame(links), ("towards", "layer"), ("r", "control", "overlap", "chance")
        ),
        "ablated": summarize(each, ("neurons", "size", "prompt"), ("change", "kept")),
    }
    for what, table in tables.items():
        print(what, table.to_string(), sep="\n", flush=True)
        table.round(4).to_csv(RESULTS / f"neurons-{name}-{what}.csv", index=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
