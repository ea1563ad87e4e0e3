"""Perplexity on a text that no edit is about: what an edit has broken beside its fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bwlens.evaluation.metrics import perplexity
from bwlens.evaluation.questions import BATCH_TOKENS, Row, next_logits
from bwlens.model.tokens import text_to_ids

MOST_TOKENS = 256
"""Where a sentence is cut, as in the paper's protocol (Table 1)."""


def prose_rows(
    model: Any, sentences: Sequence[str], prepend_bos: bool | None = None
) -> tuple[Row, ...]:
    """Each sentence's tokens, cut at 256 or the context; those of a single token are left out."""
    most = min(MOST_TOKENS, getattr(model.cfg, "n_ctx", None) or MOST_TOKENS)
    rows = [tuple(text_to_ids(model, sentence, prepend_bos)[:most]) for sentence in sentences]
    return tuple(row for row in rows if len(row) > 1)


def prose_perplexity(model: Any, rows: Sequence[Row], batch_tokens: int = BATCH_TOKENS) -> float:
    """Perplexity per token: `exp` of the mean NLL of every token but each row's first.

    nan where the model's logits are nan.
    """
    nll, count = 0.0, 0
    for chosen, logits in next_logits(model, rows, batch_tokens):
        for i, row in zip(chosen, logits, strict=True):
            ids = torch.tensor(rows[i][1:], device=row.device)
            read = row[: len(ids)]
            read = read if read.dtype == torch.float64 else read.float()
            each = read.logsumexp(-1) - read.gather(1, ids[:, None])[:, 0]
            nll += float(each.double().sum())
            count += len(ids)
    return perplexity(nll, count)
