"""Does a tokenizer say what a text says? Asked when a model is loaded, and of every prompt."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bwlens.model.protocol import LensModel

PROBES = 32
"""Tokens of the tokenizer's own that it is tried on."""


def check_tokenizer(model: LensModel, name: str) -> None:
    """Refuse a tokenizer that has no words, cannot read its own, or belongs to another model.

    Its ordinary tokens must lie within the embedding; added ones may not (Gemma 3's image token).

    Raises:
        ValueError: What does not fit, and how to mend it.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        return
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    ordinary = sorted({*tokenizer.get_vocab().values()} - added)
    mend = "put the tokenizer's own files beside its weights, or pass tokenizer="
    if not ordinary:
        raise ValueError(
            f"the tokenizer of {name!r} knows no words, so that it has no tokenizer files; {mend}"
        )
    d_vocab = model.cfg.d_vocab
    if d_vocab > 0 and ordinary[-1] >= d_vocab:
        beyond = sum(index >= d_vocab for index in ordinary)
        raise ValueError(
            f"the tokenizer of {name!r} does not belong to it: {beyond} of its {len(ordinary)}"
            f" tokens lie beyond the {d_vocab} that the model embeds; {mend}"
        )
    probes = ordinary[:: max(1, len(ordinary) // PROBES)]
    texts = [tokenizer.decode([index]).strip() for index in probes]
    if not any(text and _survives(tokenizer, text) for text in texts):
        raise ValueError(
            f"the tokenizer of {name!r} does not read its own words: {texts[:3]} are lost in"
            f" encoding and decoding; {mend}"
        )


def _survives(tokenizer: Any, text: str) -> bool:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.decode(ids).strip() == text


def lost_words(tokenizer: Any, text: str, ids: Sequence[int]) -> list[str]:
    """The words of a text that its tokens do not hold: unknown ones, and such as are dropped.

    What a tokenizer changes by its own rules (case, accents) is held. `ids` are the text's tokens,
    with or without BOS; of a tokenizer without offsets, words are lost that do not come back.
    """
    unknown, bos = tokenizer.unk_token_id, tokenizer.bos_token_id
    body = list(ids[1:] if bos is not None and ids[:1] == [bos] else ids)
    back = "".join(tokenizer.decode(body).split())
    if unknown not in body and back.endswith("".join(text.split())):
        return []  # nearly all texts
    words = _words(text)
    if not getattr(tokenizer, "is_fast", False):
        return [word for _, _, word in words if word.casefold() not in back.casefold()]
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    kept = [
        (low, high)
        for index, (low, high) in zip(
            encoding["input_ids"], encoding["offset_mapping"], strict=True
        )
        # A text may name the unknown token; GPT-2's ends texts.
        if index != unknown or text[low:high].strip() == tokenizer.unk_token
    ]
    return [word for low, high, word in words if not _covered(low, high, kept, text)]


def _words(text: str) -> list[tuple[int, int, str]]:
    """Where each word begins and ends, and the word."""
    words, at = [], 0
    for word in text.split():
        at = text.index(word, at)
        words.append((at, at + len(word), word))
        at += len(word)
    return words


def _covered(low: int, high: int, kept: Sequence[tuple[int, int]], text: str) -> bool:
    """Whether tokens hold every letter and digit of [low, high), or, where it has none, some."""
    inside = {
        at for first, last in kept if first < high and last > low for at in range(first, last)
    }
    meant = [at for at in range(low, high) if text[at].isalnum()]
    return all(at in inside for at in meant) if meant else bool(inside)
