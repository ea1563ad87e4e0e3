"""Tokens as people can read them: white space and controls made visible, nothing else changed."""

from __future__ import annotations

import codecs
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣", "\u00a0": "⍽"}

_PLAIN = re.compile(" ?[!-~]+").fullmatch  # shows as it is; most words do

# A byte of a token that holds part of a character, as `bwlens.model.tokens.token_texts` writes it.
_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")


def _part(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return f"⟨x{error.object[error.start : error.end].hex().upper()}⟩", error.end


codecs.register_error("bwlens.part", _part)

# Letters and marks that draw nothing: fillers, the blank braille cell, the grapheme joiner.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


def visible(text: str, trim: bool = True) -> str:
    r"""A token with its white space, controls and zero-width characters made visible.

    One leading space is left out with `trim`, as most words begin with one; spaces at the edges
    or in a row, and a token that is nothing but spaces, always show. The empty string shows as "∅".

    >>> visible(" Paris"), visible("\n"), visible("  "), visible("a\u200bb"), visible("")
    ('Paris', '⏎', '␣␣', 'a⟨200B⟩b', '∅')
    """
    if not text:
        return "∅"
    text = readable(text)
    body = text[1:] if trim and text[0] == " " and text.strip(" ") else text
    if " " not in body and body.isascii() and body.isprintable():
        return body
    return "".join(_shown(character, *_beside(body, at)) for at, character in enumerate(body))


def spaced(text: str) -> str:
    """As `visible`, but one leading space stays a space, so that " Paris" and "Paris" differ.

    >>> spaced(" Paris"), spaced("Paris"), spaced("  x"), spaced(" ")
    (' Paris', 'Paris', ' ␣x', '␣')
    """
    if _PLAIN(text) and "\\x" not in text:
        return text
    return " " * (text[:1] == " " and bool(text.strip(" "))) + visible(text)


def exact(text: str) -> str:
    """As `spaced`, with the leading space as a sign, where it would not be seen.

    >>> exact(" Paris"), exact("Paris")
    ('␣Paris', 'Paris')
    """
    shown = spaced(text)
    return f"␣{shown[1:]}" if shown[0] == " " else shown


def readable(text: str) -> str:
    r"""A token's bytes as text where they are whole characters; parts of one in brackets.

    >>> readable(r"\xd0\xbe\xd0"), readable("Paris")
    ('о⟨xD0⟩', 'Paris')
    """
    if not _BYTE.search(text):
        return text
    return _bytes(text).decode(errors="bwlens.part").replace("⟩⟨x", "")


def _bytes(text: str) -> bytes:
    pieces = _BYTE.split(text)  # every other one is a byte
    return b"".join(
        bytes.fromhex(piece) if at % 2 else piece.encode("utf-8", "surrogatepass")
        for at, piece in enumerate(pieces)
    )


def joined(tokens: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    r"""Tokens as the text they make, and which of its characters each token holds, or a part of.

    >>> joined([" a", r"\xe6\x97", r"\xa5"])
    (' a日', [(0, 2), (2, 3), (2, 3)])
    """
    data = b"".join(map(_bytes, tokens))
    text, starts, places = "", [0], [0]  # of each character: its first byte, its place in the text
    while starts[-1] < len(data):
        at = starts[-1]
        size = 1 + sum(data[at] >= first for first in (0xC2, 0xE0, 0xF0))
        try:
            text += data[at : at + size].decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # the text begins or ends amid a character
            size = 1
            text += data[at : at + 1].decode(errors="bwlens.part")
        starts.append(at + size)
        places.append(len(text))
    ends = list(accumulate((len(_bytes(token)) for token in tokens), initial=0))
    return text, [
        (places[bisect_right(starts, low) - 1], places[bisect_left(starts, high)])
        for low, high in pairwise(ends)
    ]


def headings(lens: BackwardLens) -> list[str]:
    """What stands above each column: a token, or which part of which character it holds."""
    # The target's last token is read by no loss, but may end a character.
    whole = lens.tokens[lens.n_prompt :] == lens.target_tokens[:-1]
    return parts_of([*lens.tokens, *lens.target_tokens[-1:] * whole])[: len(lens.tokens)]


def parts_of(tokens: Sequence[str]) -> list[str]:
    r"""Tokens that follow each other, those that hold part of a character by which it is.

    >>> parts_of([" a", r"\xe6\x97", r"\xa5"])
    [' a', '日 1/2', '日 2/2']
    """
    text, spans = joined(tokens)
    names = []
    for pos, (token, (low, high)) in enumerate(zip(tokens, spans, strict=True)):
        # A character has four bytes at most, so its tokens are near.
        near = range(max(0, pos - 3), min(pos + 4, len(tokens)))
        cut = [at for at in near if _BYTE.search(token) and spans[at][0] < high <= spans[at][1]]
        part = f" {1 + cut.index(pos)}/{len(cut)}" if len(cut) > 1 else ""
        names.append(f"{spaced(text[low:high])}{part}" if part else spaced(token))
    return names


def prompt_pieces(lens: BackwardLens) -> list[tuple[str, bool]]:
    """The prompt as it was written, in pieces: visible text, and whether it is the subject's."""
    text, spans = joined(lens.tokens[: lens.n_prompt])
    inside = set().union(*(range(*spans[pos]) for pos in lens.subject if pos < lens.n_prompt))
    start = text.find(lens.prompt) if lens.prompt.strip() else -1
    stop = start + len(lens.prompt) if start >= 0 else len(text)
    start = max(start, 0)
    pieces = []
    for own, places in groupby(range(start, stop), inside.__contains__):
        shown = "".join(_shown(text[at], *_beside(text[start:stop], at - start)) for at in places)
        blank = " " * (own and shown[:1] == " ")
        pieces += [(blank, False), (shown[len(blank) :], own)] if blank else [(shown, own)]
    return pieces


def model_name(lens: BackwardLens) -> str:
    """What the model is called; of a local one the folder's name alone."""
    model = str(lens.settings.get("model", ""))
    if model.startswith(("/", "~", ".")) or "\\" in model or model[1:2] == ":":
        return PurePosixPath(model.replace("\\", "/")).name
    return model


def about(lens: BackwardLens) -> list[str]:
    """The model, the reading and what else is not as usual; of a local model the folder's name."""
    settings = lens.settings
    objective = str(settings.get("objective", ""))
    usual_loss = objective.startswith("NLL(") and objective.endswith("reduction='mean')")
    said = [model_name(lens), f"{lens.reading} reading", "" if usual_loss else objective]
    usual = ("model", "model_class", "objective", "top_k", "prepend_bos", "reading")
    said += [f"{name} {value}" for name, value in settings.items() if name not in usual]
    return [visible(text, trim=False) for text in said if text]


def quoted(text: str) -> str:
    """A token in quotation marks, so that the blank it begins with can be seen.

    >>> quoted(" Paris"), quoted("Paris")
    ('" Paris"', '"Paris"')
    """
    return f'"{spaced(text)}"'


def target_words(lens: BackwardLens) -> str:
    """The target's tokens in quotation marks: `" Paris"`, or `" Stutt" "gart"`."""
    text, spans = joined(lens.target_tokens)
    leftward = any(
        unicodedata.bidirectional(c) in ("R", "AL") for c in text
    )  # whose letters join up
    if leftward or any(a[1] > b[0] for a, b in pairwise(spans)):
        return quoted(text)  # tokens that share a character cannot be shown apart
    return " ".join(map(quoted, lens.target_tokens))


def probability_of(lens: BackwardLens) -> str:
    """Whose the target's probability, ranks and marks are: those of its first token."""
    if len(lens.target_ids) < 2:
        return "the target"
    return f'the target\'s first token "{parts_of(lens.target_tokens)[0]}"'


def _beside(text: str, at: int) -> tuple[str, str]:
    return text[at - 1] if at else "", text[at + 1 : at + 2]


def _shown(character: str, before: str, after: str) -> str:
    if character == " " and (before or " ") != " " != (after or " "):
        return character  # between two words
    if character in _SIGNS:
        return _SIGNS[character]
    kind = unicodedata.category(character)
    # Controls, formats (zero-width, direction marks), surrogates, unassigned and private
    # characters, other spaces and separators: named by code.
    if kind[0] in "CZ" or character in _BLANK:
        return f"⟨{ord(character):X}⟩"
    if kind[0] == "M" and not before:  # an accent with nothing to stand on
        return "◌" + character
    return character
