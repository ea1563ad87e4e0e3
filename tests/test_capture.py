"""x^T delta is the gradient of an unbridged Hugging Face model, for every architecture and matrix."""

from contextlib import nullcontext

import pytest
import torch

import bwlens
from bwlens.sites import available_matrices
from tests import oracle, tiny

PROMPTS = [[5, 9, 30, 41], [7, 8], [12, 33, 6, 21, 50, 11]]
TARGETS = [[17], [23, 44, 10], [9, 9]]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def padded(rows, side):
    width = max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, where], mask[i, where] = torch.tensor(row), 1
    return tokens, mask.long()


def teacher_forced_nll(side):
    """Prompt and target in one row, each target token scored by the position before it."""
    rows = [p + t[:-1] for p, t in zip(PROMPTS, TARGETS, strict=True)]
    tokens, mask = padded(rows, side)

    def loss(logits):
        losses = []
        for i, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
            shift = 0 if side == "right" else tokens.shape[1] - len(rows[i])
            terms = [
                -torch.log_softmax(logits[i, shift + len(prompt) - 1 + k], -1)[token]
                for k, token in enumerate(target)
            ]
            losses.append(sum(terms) / len(terms))
        return torch.stack(losses)

    return tokens, mask, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_matrix_against_hugging_face(name, dtype, boot):
    model, hf = boot(name, dtype), tiny.hf_model(name, dtype)
    with oracle.TrueFloat64() if dtype is torch.float64 else nullcontext():
        check_every_matrix(model, hf, TOLERANCE[dtype])


def check_every_matrix(model, hf, tolerance):
    for side in ("right", "left"):
        tokens, mask, loss = teacher_forced_nll(side)
        expected_losses = oracle.backward(hf, tokens, mask, loss)
        prompts, prompt_mask = padded(PROMPTS, side)
        matrices = available_matrices(model)
        assert len(matrices) >= 6
        grads = bwlens.capture(
            model, prompts, bwlens.NLL(TARGETS), matrices, attention_mask=prompt_mask
        )
        torch.testing.assert_close(grads.losses, expected_losses, rtol=tolerance, atol=tolerance)
        assert {(s.matrix, s.layer) for s in grads} == {
            (m, layer) for m in matrices for layer in range(tiny.LAYERS)
        }
        for site, gradient in grads.items():
            expected = oracle.dense(hf, site.matrix, site.layer, site.expert)
            error = oracle.relative_error(gradient.dense(), expected)
            assert error <= tolerance, f"{site}, padded {side}: {error:.1e}"
