"""What a model says before and after a change: a fact, its paraphrases, its neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bwlens.data.given import OneEdit, as_edits
from bwlens.edit import WeightChange
from bwlens.model.losses import last_logits
from bwlens.model.passes import run
from bwlens.model.prompts import Edit, make_batch
from bwlens.model.tokens import token_texts

Words = tuple[tuple[str, float], ...]
"""The most probable next words with their probabilities, the first of them first."""

NEIGHBOURS = 4
"""Neighbours that the demo's facts give, at most."""


@dataclass(frozen=True, repr=False)
class BeforeAfter:
    """The most probable next words of some prompts, before and after a change.

    Attributes:
        kinds: What each prompt is: "fact", "paraphrase" or "neighbour".
        prompts: The prompts.
        before: The words before the change.
        after: The words after it.
        target: The answer that was to be written.
        note: What the method had to say.
    """

    kinds: tuple[str, ...]
    prompts: tuple[str, ...]
    before: tuple[Words, ...]
    after: tuple[Words, ...]
    target: str
    note: str = ""

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 1), pad_edge=False)
        for name in ("", "prompt", "before", "after"):
            table.add_column(name, overflow="fold")
        for kind, prompt, before, after in zip(
            self.kinds, self.prompts, self.before, self.after, strict=True
        ):
            said = [self._said(words) for words in (before, after)]
            table.add_row(Text(kind, "dim"), Text(prompt), *said)
        yield table
        # Only its first token is among the words: their probabilities are of one token.
        yield Text(f'The target is "{self.target}"; green is its first token.', "dim")
        if self.note:
            yield Text(f"Note: {self.note}")

    def _said(self, words: Words) -> Any:
        from rich.text import Text

        text = Text()
        for place, (word, probability) in enumerate(words):
            style = "bold" if place == 0 else "dim"
            target = bool(word.strip()) and self.target.startswith(word)
            text.append("\n" if place else "")
            text.append(f"{probability:6.1%} ", style)
            text.append(repr(word)[1:-1], f"{style} green" if target else style)
        return text

    def __repr__(self) -> str:
        import io

        from rich.console import Console

        held = io.StringIO()
        Console(file=held, width=110).print(self)
        return held.getvalue().rstrip()


def before_after(
    model: Any,
    edit: OneEdit,
    change: WeightChange,
    paraphrases: Sequence[str] = (),
    neighbours: Sequence[str] = (),
    *,
    top_k: int = 5,
    prepend_bos: bool | None = None,
) -> BeforeAfter:
    """The most probable next words of a fact and its company, before and after a change.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        edit: The fact.
        change: The change, not applied.
        paraphrases: The fact in other words: they should change with it.
        neighbours: Other facts: they should stay.
        top_k: Words of each prompt.
        prepend_bos: Whether prompts get a BOS token; None is the model's own default.

    Raises:
        ValueError: A prompt is empty or too long, or the change does not fit the model.

    Example:
        >>> before_after(model, edit, forward_pass_shift(model, edit))   # doctest: +SKIP
    """
    (edit,) = as_edits(edit)
    company: Mapping[str, Sequence[str]] = {
        "fact": [edit.text], "paraphrase": paraphrases, "neighbour": neighbours,
    }  # fmt: skip
    listed = [(kind, prompt) for kind, prompts in company.items() for prompt in prompts]
    kinds, prompts = zip(*listed, strict=True)
    before = next_words(model, prompts, top_k, prepend_bos)
    with change.applied(model):
        after = next_words(model, prompts, top_k, prepend_bos)
    return BeforeAfter(kinds, prompts, before, after, edit.target_new, change.note)


def next_words(
    model: Any, prompts: Sequence[str], top_k: int = 5, prepend_bos: bool | None = None
) -> tuple[Words, ...]:
    """The most probable next tokens of each prompt, with their probabilities."""
    batch = make_batch(model, list(prompts), prepend_bos=prepend_bos)
    logits = last_logits(run(model, batch.tokens).logits, batch)
    best = logits.float().softmax(-1).topk(top_k)
    words = [token_texts(model.tokenizer, ids) for ids in best.indices.tolist()]
    return tuple(
        tuple(zip(said, shares, strict=True))
        for said, shares in zip(words, best.values.tolist(), strict=True)
    )


def demo_company(edit: Edit) -> tuple[list[str], list[str]]:
    """Paraphrases and neighbours of a fact that the demo model knows; none for other facts.

    Neighbours have the same answer to the same question.
    """
    from bwlens.demo import facts

    for fact in facts():
        templates = (*fact.trained, *fact.unpaired, *fact.unseen)
        if fact.subject != edit.subject or edit.prompt not in templates:
            continue
        paraphrases = [t.replace("{}", fact.subject) for t in fact.unseen if t != edit.prompt]
        others = [
            edit.prompt.replace("{}", other.subject)
            for other in facts()
            if (other.relation, other.object) == (fact.relation, fact.object)
            and other.subject != fact.subject
        ]
        return paraphrases[:2], others[:NEIGHBOURS]
    return [], []
