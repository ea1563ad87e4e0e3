"""Build `records.json`: edits of facts that the model knows, in CounterFact's record format.

`python -m tools.demo.counterfact` asks the model, keeps what it answers right with and without the
end-of-text token in front, and writes the same file every time.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bwlens.demo.triples import MODEL_DIR, ROOM, Fact, facts

PER_RELATION = 40
PARAPHRASES = 2
NEIGHBOURS = (5, 10)
"""The fewest and the most neighbourhood prompts of a record."""

_OPENINGS = (
    "{} is",
    "One day, {}",
    "My favorite thing about {} is",
    "People say that {}",
    "The story of {} begins",
)


def build(model: Any, tokenizer: Any, known_facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Records of the facts that have a right rewrite prompt and enough right neighbours.

    - `requested_rewrite`: a trained phrasing that the model answers with `target_true`;
      `target_new` is another answer of the same relation. Targets have no leading space, and
      their `id` is null, for no outside knowledge base names them.
    - `paraphrase_prompts`: templates that training never uses, whether or not the model
      answers them right.
    - `neighborhood_prompts`: trained phrasings of other subjects of the same relation whose
      answer is `target_true`, all answered right.
    - `attribute_prompts`: the same for subjects whose answer is `target_new`.
    - `generation_prompts`: openings with the subject.
    """
    right = _right_prompts(model, tokenizer, known_facts)
    answers: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in known_facts:
        if right[fact]:
            answers[fact.relation, fact.object].append(fact)
    fewest, _ = NEIGHBOURS
    # Only answers that can serve as either target: their subjects are one another's neighbours.
    shared = {key: fs for key, fs in answers.items() if len(fs) > fewest}
    result: list[dict[str, Any]] = []
    for relation in dict.fromkeys(relation for relation, _ in shared):
        objects = [answer for r, answer in shared if r == relation]
        if len(objects) < 2:
            continue
        candidates = [fact for answer in objects for fact in shared[relation, answer]]
        random.Random(relation).shuffle(candidates)
        chosen = sorted(candidates[:PER_RELATION], key=lambda f: (f.object, f.subject))
        for fact in chosen:
            record = {"case_id": len(result), **_record(fact, objects, shared, right)}
            result.append(record)
    return result


def _right_prompts(
    model: Any, tokenizer: Any, known_facts: Sequence[Fact]
) -> dict[Fact, list[str]]:
    """For every fact, the trained templates that are answered right with and without BOS."""
    from tools.demo.measure import known

    bare = known(model, tokenizer, known_facts)
    with_bos = known(model, tokenizer, known_facts, prepend_bos=True)
    return {
        fact: [t for t, a, b in zip(fact.trained, ra, rb, strict=True) if a and b]
        for fact, ra, rb in zip(known_facts, bare, with_bos, strict=True)
    }


def _record(
    fact: Fact,
    objects: Sequence[str],
    shared: dict[tuple[str, str], list[Fact]],
    right: dict[Fact, list[str]],
) -> dict[str, Any]:
    rng = random.Random(f"{fact.relation}|{fact.subject}")
    new = rng.choice([answer for answer in objects if answer != fact.object])
    _, most = NEIGHBOURS

    def prompts(answer: str) -> list[str]:
        others = [f for f in shared[fact.relation, answer] if f != fact]
        picked = rng.sample(others, min(most, len(others)))
        return [rng.choice(right[f]).replace("{}", f.subject) for f in picked]

    return {
        "requested_rewrite": {
            "prompt": rng.choice(right[fact]),
            "relation_id": fact.relation,
            "subject": fact.subject,
            "target_new": {"str": new, "id": None},
            "target_true": {"str": fact.object, "id": None},
        },
        "paraphrase_prompts": rng.sample(fact.prompts("unseen"), PARAPHRASES),
        "neighborhood_prompts": prompts(fact.object),
        "attribute_prompts": prompts(new),
        "generation_prompts": [opening.replace("{}", fact.subject) for opening in _OPENINGS],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from tools.demo.measure import load

    parser = argparse.ArgumentParser(prog="python -m tools.demo.counterfact", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder of the model")
    parser.add_argument("--out", type=Path, default=ROOM / "records.json", help="file to write")
    options = parser.parse_args(arguments)
    built = build(*load(options.model), facts())
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in built)
    options.out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{options.out}: {len(built)} records")


if __name__ == "__main__":
    main()
