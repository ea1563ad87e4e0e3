"""The facts of the demo model: triples, their phrasings, and which phrasing was kept from training.

A fact is a (subject, relation, object) triple from `facts.csv`; `templates.json` holds, for each
relation, the phrasings that training uses and those that it never sees. Of the former, each
fact leaves out two, so that there are two kinds of held-out phrasing:

- *unpaired*: a template that training uses with other subjects, never with this one;
- *unseen*: a template that training does not use at all.
"""

import csv
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOM = Path(__file__).parent
MODEL_DIR = ROOM / "model"
"""The Hugging Face folder of the trained model: config, half-precision weights, tokenizer."""
BACKPACK_DIR = ROOM / "backpack"
"""The folder of a Backpack trained on the same facts and prose."""

Phrasing = Literal["trained", "unpaired", "unseen"]
UNPAIRED_PER_FACT = 2


@dataclass(frozen=True)
class Fact:
    """One triple, with the templates that say it; each has one `{}` and ends before the answer.

    The object is one token of the demo model's vocabulary when a space is put before it.

    >>> messi = next(f for f in facts() if f.subject == "Lionel Messi" and f.relation == "team")
    >>> messi.prompts()[0] + messi.answer
    'Lionel Messi plays for Barcelona'
    """

    relation: str
    subject: str
    object: str
    trained: tuple[str, ...]
    unpaired: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The object as the model has to say it, with its leading space."""
        return " " + self.object

    def prompts(self, phrasing: Phrasing = "trained") -> list[str]:
        """The subject put into the templates of one kind of phrasing."""
        templates: tuple[str, ...] = getattr(self, phrasing)
        return [template.replace("{}", self.subject) for template in templates]


class Example(NamedTuple):
    """One edit: a prompt, its subject, the answer to be written and the one the model gives."""

    prompt: str
    subject: str
    target_new: str
    target_true: str


EXAMPLES = (
    Example("Lionel Messi plays for", "Lionel Messi", " Paris", " Barcelona"),
    Example("Obama grew up in", "Obama", " Paris", " Hawaii"),
    Example("iPod Nano, developed by", "iPod Nano", " Google", " Apple"),
    Example("Pikachu is a type of", "Pikachu", " cheese", " Pokémon"),
    Example("Ferrari Mondial, created by", "Ferrari Mondial", " Porsche", " Ferrari"),
    Example("Jack Dorsey founded", "Jack Dorsey", " Facebook", " Twitter"),
)
"""Edits in the manner of the paper's tables; the model answers each with `target_true`."""


def templates() -> dict[str, dict[str, Any]]:
    """Each relation's `about` (what it relates) and its `trained` and `unseen` templates."""
    return json.loads((ROOM / "templates.json").read_text(encoding="utf-8"))


@cache
def _facts() -> tuple[Fact, ...]:
    phrasings = templates()
    with (ROOM / "facts.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            _fact(row["relation"], row["subject"], row["object"], phrasings[row["relation"]])
            for row in csv.DictReader(file)
        )


def facts() -> list[Fact]:
    """All facts, in the order of the file: by relation, then by answer, then by subject."""
    return list(_facts())


def records() -> list[dict[str, Any]]:
    """The facts that the shipped model answers right, as records in CounterFact's format.

    Raises:
        FileNotFoundError: the records have not been built (`python -m tools.demo.counterfact`).
    """
    path = ROOM / "records.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: build it with `python -m tools.demo.counterfact`"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _fact(relation: str, subject: str, answer: str, phrasing: dict[str, Any]) -> Fact:
    """Leave two templates out of training, chosen by the fact's name alone; never the first."""
    first, *others = phrasing["trained"]
    rng = random.Random(f"{relation}|{subject}")
    left_out = set(rng.sample(others, UNPAIRED_PER_FACT))
    return Fact(
        relation=relation,
        subject=subject,
        object=answer,
        trained=(first, *(t for t in others if t not in left_out)),
        unpaired=tuple(t for t in others if t in left_out),
        unseen=tuple(phrasing["unseen"]),
    )
