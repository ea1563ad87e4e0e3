"""The batch that most tests share, its loss written by hand, and the check against it."""

from __future__ import annotations

import torch

import bwlens
from bwlens.model.sites import available_matrices
from tests import oracle

PROMPTS = [[5, 9, 30, 41], [7, 8], [12, 33, 6, 21, 50, 11]]
TARGETS = [[17], [23, 44, 10], [9, 9]]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def padded(rows, side="right"):
    """Token ids and their attention mask."""
    width = max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, where], mask[i, where] = torch.tensor(row), 1
    return tokens, mask.long()


def teacher_forced_nll(side="right", prompts=PROMPTS, targets=TARGETS, reduction="mean"):
    """Prompt and target in one row, each target token scored by the position before it."""
    rows = [p + t[:-1] for p, t in zip(prompts, targets, strict=True)]
    tokens, mask = padded(rows, side)

    def loss(logits):
        losses = []
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            shift = 0 if side == "right" else tokens.shape[1] - len(rows[i])
            terms = [
                -torch.log_softmax(logits[i, shift + len(prompt) - 1 + k], -1)[token]
                for k, token in enumerate(target)
            ]
            losses.append(sum(terms) / (len(terms) if reduction == "mean" else 1))
        return torch.stack(losses)

    return tokens, mask, loss


def check_every_matrix(model, hf, tolerance, sides=("right", "left"), as_raw=None, unread=()):
    """Every matrix of the unbridged copy is read, with its gradient there, for the shared batch.

    Args:
        model: The model to capture from.
        hf: An unbridged Hugging Face model with the same (raw) weights.
        tolerance: Largest relative error of a matrix.
        sides: Where the prompts are padded.
        as_raw: (gradient, site) to the gradient of the raw weight, for processed models.
        unread: Matrices that the copy has and the model does not show.
    """
    for side in sides:
        tokens, mask, loss = teacher_forced_nll(side)
        expected_losses = oracle.backward(hf, tokens, mask, loss)
        prompts, prompt_mask = padded(PROMPTS, side)
        matrices = [m for m in available_matrices(model) if m not in unread]
        grads = bwlens.capture(
            model, prompts, bwlens.NLL(TARGETS), matrices, attention_mask=prompt_mask
        )
        torch.testing.assert_close(grads.losses, expected_losses, rtol=tolerance, atol=tolerance)
        there = {site for site in oracle.matrices(hf) if site[0] not in unread}
        assert there <= {(s.matrix, s.layer, s.expert) for s in grads}
        for site, gradient in grads.items():
            raw = gradient if as_raw is None else as_raw(gradient, site)
            expected = oracle.dense(hf, site.matrix, site.layer, site.expert)
            assert expected is not None, f"{site} is no matrix of the Hugging Face model"
            error = oracle.relative_error(raw.dense(), expected)
            assert error <= tolerance, f"{site}, padded {side}: {error:.1e}"
