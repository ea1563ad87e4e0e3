"""Examples to train on: texts, prompts with answers, conversations; from lists and files."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (entries are anything that a file may hold.)

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwlens.data.sources import Unread, lines_of
from bwlens.data.texts import read_texts
from bwlens.model.chat import chat
from bwlens.model.prompts import Edit
from bwlens.model.protocol import LensModel
from bwlens.model.tokens import text_to_ids

_PROMPTS = ("prompt", "instruction", "question", "input")
_ANSWERS = ("answer", "completion", "response", "output", "target", "target_new", "chosen")


@dataclass(frozen=True)
class Example:
    """One example: a text whose every token is learned, or an answer after a prompt.

    `messages` is a conversation, whose last turn is the answer.
    """

    answer: str
    prompt: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """What is read, as text."""
        if self.messages:
            return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)
        return self.prompt + self.answer

    def tokens(self, model: LensModel, prepend_bos: bool | None = None) -> tuple[list[int], int]:
        """Token ids, and the first of them that is learned.

        Raises:
            ValueError: Nothing is left to learn.
        """
        if self.messages:
            before = chat(model, self.messages[:-1]).tolist() if len(self.messages) > 1 else []
            ids = chat(model, self.messages, add_generation_prompt=False).tolist()
            start = next(
                (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b),
                min(len(before), len(ids)),
            )
        elif self.prompt:
            before = text_to_ids(model, self.prompt, prepend_bos)
            start, ids = len(before), before + text_to_ids(model, self.answer, False)
        else:
            ids, start = text_to_ids(model, self.answer, prepend_bos), 1
        if len(ids) <= max(start, 1):
            raise ValueError("it has no token to be learned: an answer, or a second token")
        return ids, max(start, 1)


def examples_of(source: Any) -> Iterator[Example | Unread]:
    """Examples in order, or why one cannot be used.

    Args:
        source: Texts; (prompt, answer) pairs; mappings with a text, with a prompt and an answer (by
            any of their usual names) or with messages; `Edit`s and records; or a .jsonl, .json,
            .csv or .txt file, or the name of a data set.

    Raises:
        ValueError: There is no such file.
    """
    entries: Iterable[Any]
    if isinstance(source, str | Path):
        path = Path(source)
        entries = read_texts(str(path)) if path.suffix == ".txt" else lines_of(str(path))
    else:
        entries = source
    for entry in entries:
        yield _example(entry)


def _example(entry: Any) -> Example | Unread:
    entry = getattr(entry, "edit", entry)
    if isinstance(entry, Example | Unread):
        return entry
    if isinstance(entry, Edit):
        return Example(entry.target_new, entry.text)
    if isinstance(entry, str):
        return Example(entry) if entry.strip() else Unread("text", "is empty")
    if isinstance(entry, Mapping):
        return _of_fields(entry)
    if isinstance(entry, Sequence) and len(entry) == 2 and all(isinstance(e, str) for e in entry):
        if not entry[0].strip() or not entry[1].strip():
            return Unread("answer" if entry[0].strip() else "prompt", "is empty")
        return Example(entry[1], entry[0])
    kind = type(entry).__name__
    return Unread("row", f"is a {kind}; expected a text, a (prompt, answer) pair, or a mapping")


def _of_fields(entry: Mapping[str, Any]) -> Example | Unread:
    messages = entry.get("messages", entry.get("conversations"))
    if messages is not None:
        turns = messages if isinstance(messages, list | tuple) else []
        good = all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in turns)
        if not turns or not good:
            return Unread("messages", "is no list of turns with role and content")
        if turns[-1]["role"] != "assistant" or not str(turns[-1]["content"]).strip():
            return Unread("messages", "has no assistant's turn at its end to be learned")
        return Example(str(turns[-1]["content"]), "", tuple(turns))
    answer = next((entry[name] for name in _ANSWERS if name in entry), None)
    prompt = next((entry[name] for name in _PROMPTS if name in entry), None)
    if answer is None:
        answer, prompt = entry.get("text"), None
    if not isinstance(answer, str) or not isinstance(prompt, str | None):
        return Unread(
            "row", f"has {sorted(map(str, entry))[:6]}; expected text, or prompt and answer"
        )
    if not answer.strip():
        return Unread("answer" if prompt else "text", "is empty")
    if prompt and entry.get("subject") and "{}" in prompt:
        prompt = prompt.replace("{}", str(entry["subject"]))
    return Example(answer, prompt or "")
