"""The check of the tokenizer."""

from __future__ import annotations

from typing import Any

from bwlens.checking.report import Finding
from bwlens.model.tokens import text_to_ids

_TEXT = "The Eiffel Tower stands in Paris; it was built in 1889."


def tokenizer(model: Any, text: str | None) -> Finding:
    """Whether a text is the same after its tokens, and whether these fit the model's vocabulary."""
    if getattr(model, "tokenizer", None) is None:
        why = "the model has no tokenizer; pass token ids instead of text"
        return Finding.skipped("tokenizer", why)
    text = _TEXT if text is None else text
    words, rows = model.tokenizer, int(model.unembed.W_U.shape[1])
    ids = text_to_ids(model, text, False)
    again = words.decode(ids, skip_special_tokens=True)
    # Tokens added for images and the like may lie beyond what text needs.
    vocabulary, added = words.get_vocab(), words.get_added_vocab()
    highest = max((at for word, at in vocabulary.items() if word not in added), default=0)
    figures = f"{len(ids)} tokens; ids up to {highest}, the vocabulary has {rows}"
    if highest >= rows:
        why = "the tokenizer is not this model's: it gives ids that the model has no vector for"
        return Finding("tokenizer", "fails", figures, why)
    if "".join(again.split()) != "".join(text.split()):
        why = (
            f"{text!r} came back as {again!r}: the tokenizer does not know these words, so prompts"
            f" are not read as they are written (a folder without tokenizer files?)"
        )
        return Finding("tokenizer", "fails", figures, why)
    return Finding("tokenizer", "ok", figures, "a text survives its tokens, which fit the model")
