"""x^T delta is the gradient of an unbridged Hugging Face model, for every architecture and matrix."""

from contextlib import nullcontext

import pytest
import torch

from tests import cases, oracle, tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_matrix_against_hugging_face(name, dtype, boot):
    model, hf = boot(name, dtype), tiny.hf_model(name, dtype)
    with oracle.TrueFloat64() if dtype is torch.float64 else nullcontext():
        cases.check_every_matrix(model, hf, cases.TOLERANCE[dtype])
