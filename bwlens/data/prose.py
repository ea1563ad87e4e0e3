"""The sentences that perplexity is measured on: text that no edit is about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bwlens.data.texts import read_texts
from bwlens.demo import ROOM

N_SENTENCES = 100
LEAST_CHARACTERS = 30
"""The paper's protocol (Table 1)."""


def read_prose(source: str | Path | Sequence[str]) -> list[str]:
    """The first 100 sentences of 30 characters or more.

    A sentence is a line, as WikiText is cut.

    Args:
        source: "demo" for the stories that come with bwlens (in the manner of the demo model's
            training prose), a .json (a list of texts) or .txt file, the name of a Hugging Face
            data set with a `text` column, or texts.

    Raises:
        ValueError: The source cannot be read, or has no such sentence.
    """
    if isinstance(source, str | Path):
        path = ROOM / "stories.txt" if source == "demo" else Path(source)
        if path.suffix in (".txt", ".json") and not path.is_file():
            raise ValueError(f"{str(path)!r}: no such file to measure perplexity on")
        texts = read_texts(str(path))
    else:
        texts = list(source)
    lines = [line.strip() for text in texts for line in text.splitlines()]
    sentences = [line for line in lines if len(line) >= LEAST_CHARACTERS][:N_SENTENCES]
    if not sentences:
        raise ValueError(
            f"the text to measure perplexity on has no line of {LEAST_CHARACTERS} characters or"
            f" more (found {len(lines)} lines)"
        )
    return sentences
