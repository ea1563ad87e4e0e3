"""Tokens as people can read them: white space and controls made visible, nothing else changed."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bwlens.lens.backward import BackwardLens

_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣", "\u00a0": "⍽"}

_PLAIN = re.compile(" ?[!-~]+").fullmatch  # shows as it is; most words do

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
    body = text[1:] if trim and text[0] == " " and text.strip(" ") else text
    if " " not in body and body.isascii() and body.isprintable():
        return body
    return "".join(_shown(character, *_beside(body, at)) for at, character in enumerate(body))


def spaced(text: str) -> str:
    """As `visible`, but one leading space stays a space, so that " Paris" and "Paris" differ.

    >>> spaced(" Paris"), spaced("Paris"), spaced("  x"), spaced(" ")
    (' Paris', 'Paris', ' ␣x', '␣')
    """
    if _PLAIN(text):
        return text
    return " " * (text[:1] == " " and bool(text.strip(" "))) + visible(text)


def quoted(text: str) -> str:
    """A token in quotation marks, so that the blank it begins with can be seen.

    >>> quoted(" Paris"), quoted("Paris")
    ('" Paris"', '"Paris"')
    """
    return f'"{spaced(text)}"'


def target_words(lens: BackwardLens) -> str:
    """The target's tokens in quotation marks: `" Paris"`, or `" Stutt" "gart"`."""
    return " ".join(map(quoted, lens.target_tokens))


def probability_of(lens: BackwardLens) -> str:
    """Whose the target's probability, ranks and marks are: those of its first token."""
    if len(lens.target_ids) < 2:
        return "the target"
    return f"the target's first token {quoted(lens.target_tokens[0])}"


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
