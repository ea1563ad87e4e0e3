"""Text and tokens: ids of a text, what each token says by itself, and where a subject stands."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from bwlens.model.protocol import LensModel


def subject_positions(
    model: LensModel,
    prompt: str,
    subject: str,
    prepend_bos: bool | None = None,
    start: int | None = None,
) -> tuple[int, ...]:
    """Positions of the tokens that hold the subject, found by character offsets.

    It stands at the character `start`; where that is not known, its last occurrence counts, as the
    one that the answer follows.

    Raises:
        ValueError: The subject does not occur in the prompt, or is empty.
        NotImplementedError: The tokenizer gives no offsets (it is not a fast one).
    """
    if start is None:
        start = prompt.rfind(subject)
    if start < 0 or not subject.strip() or not prompt.startswith(subject, start):
        raise ValueError(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
    return span_positions(token_offsets(model, prompt, prepend_bos), start, start + len(subject))


def span_positions(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, ...]:
    """Positions of the tokens that hold some of the characters [start, stop)."""
    return tuple(index for index, (low, high) in enumerate(offsets) if low < stop and high > start)


def token_offsets(
    model: LensModel, prompt: str, prepend_bos: bool | None = None
) -> list[tuple[int, int]]:
    """The stretch of characters [start, stop) of each token; (0, 0) for BOS.

    A token's leading white space is not counted as part of its stretch.
    """
    lead, offsets = prompt_offsets(model, prompt, prepend_bos)
    return [(0, 0)] * lead + offsets


def prompt_offsets(
    model: LensModel, prompt: str, prepend_bos: bool | None = None
) -> tuple[int, list[tuple[int, int]]]:
    """How many tokens stand before the prompt's own (BOS), and the stretch of each of its own.

    Raises:
        NotImplementedError: The tokenizer gives no offsets (it is not a fast one).
    """
    if not getattr(model.tokenizer, "is_fast", False):
        raise NotImplementedError(
            f"{type(model.tokenizer).__name__} gives no character offsets; load the model with a"
            f" fast tokenizer"
        )
    encoding = model.tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=False)
    ids = text_to_ids(model, prompt, prepend_bos)
    lead = len(ids) - len(encoding["input_ids"])
    if lead < 0 or ids[lead:] != list(encoding["input_ids"]):
        raise NotImplementedError(
            "the tokenizer's offsets do not match the model's own tokens; pass prepend_bos=False"
        )
    offsets: list[tuple[int, int]] = []
    for name, (low, high) in zip(encoding.tokens(), encoding["offset_mapping"], strict=True):
        piece = prompt[low:high]
        # SentencePiece puts a space before the first word, and says it stands where that begins.
        if not piece.strip() or name == "\u2581":
            offsets.append((low, low))
        else:
            offsets.append((low + len(piece) - len(piece.lstrip()), high))
    return lead, offsets


def text_to_ids(model: LensModel, text: str, prepend_bos: bool | None) -> list[int]:
    """Token ids of a text, with or without BOS, never cut at the context's length.

    A text that begins with a BOS gets no second one.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer; pass tokens instead of text, or boot with one"
        )
    ids = model.to_tokens(text, prepend_bos=prepend_bos, truncate=False)[0].tolist()
    bos = getattr(tokenizer, "bos_token", None)
    if not bos or not text.startswith(bos):
        return ids
    written = _leading(tokenizer.bos_token_id, tokenizer.encode(text, add_special_tokens=False))
    if _leading(tokenizer.bos_token_id, ids) > written:
        warnings.warn(
            f"a text begins with {bos!r} already, so none is put before it; leave it out, or pass"
            f" prepend_bos=False",
            stacklevel=1,  # its own place, where Python shows the same text once
        )
        return ids[1:]
    return ids


def first_token(model: LensModel, word: str) -> int:
    """The id of a word's first token, as it is written: " Paris" is not "Paris"."""
    return text_to_ids(model, word, False)[0]


def _leading(token: int, ids: Sequence[int]) -> int:
    """How often a token stands at the beginning."""
    return next((place for place, index in enumerate(ids) if index != token), len(ids))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    r"""What each token says by itself, leading space included.

    Tokens that hold part of a character show its bytes (`\xe2\x80`) rather than a replacement
    sign; an id past the tokenizer's own vocabulary, as padded embeddings have, shows as `<id>`, as
    do all where a model has no tokenizer.
    """
    if tokenizer is None:
        return [f"<{int(i)}>" for i in ids]
    pieces = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    byte_level = type(decoder).__name__ == "ByteLevel"
    return [
        _piece_text(tokenizer, index, piece, byte_level)
        for index, piece in zip(ids, pieces, strict=True)
    ]


def _piece_text(tokenizer: Any, index: int, piece: str | None, byte_level: bool) -> str:
    if piece is None:
        return f"<{int(index)}>"
    if byte_level:
        held = [_BYTE_OF.get(character) for character in piece]
        return piece if None in held else _decoded(bytes(b for b in held if b is not None))
    if match := _BYTE_PIECE.fullmatch(piece):
        return _decoded(bytes([int(match[1], 16)]))
    if "\u2581" in piece:  # SentencePiece marks a space so; decoding one token would drop it
        return piece.replace("\u2581", " ")
    return tokenizer.decode([int(index)], clean_up_tokenization_spaces=False)


def _decoded(held: bytes) -> str:
    try:
        return held.decode()
    except UnicodeDecodeError:
        return "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in held)


def _byte_alphabet() -> dict[str, int]:
    """Which byte each character of byte-level BPE stands for.

    Bytes that are printable stand for themselves, the rest, in order, from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in printable}
    rest = [b for b in range(256) if b not in set(printable)]
    alphabet.update({chr(0x100 + i): b for i, b in enumerate(rest)})
    return alphabet


_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
"""How SentencePiece names a token of one byte."""

_BYTE_OF = _byte_alphabet()
