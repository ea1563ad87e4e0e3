"""Tokens as people can read them: white space and controls made visible, nothing else changed."""

from __future__ import annotations

import unicodedata

_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣", "\u00a0": "⍽"}


def visible(text: str, trim: bool = True) -> str:
    """A token with its white space, controls and zero-width characters made visible.

    One leading space is left out with `trim`, as most words begin with one; a token that is
    nothing but spaces always shows them. The empty string shows as "∅".

    >>> visible(" Paris"), visible("\\n"), visible("  "), visible("a\\u200bb"), visible("")
    ('Paris', '⏎', '␣␣', 'a⟨200B⟩b', '∅')
    """
    if not text:
        return "∅"
    blank = not text.strip(" ")
    body = text[1:] if trim and not blank and text.startswith(" ") else text
    inner = body.strip(" ")
    return "".join(
        _SIGNS[" "]
        if character == " " and (blank or not body.startswith(inner))
        else _shown(character)
        for character in body
    )


def _shown(character: str) -> str:
    if character == " ":
        return character
    if character in _SIGNS:
        return _SIGNS[character]
    # Controls, formats (zero-width, direction marks), surrogates, separators: named by code.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨{ord(character):X}⟩"
    return character
