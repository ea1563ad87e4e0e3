"""What is read of each architecture: exactly, in part with the reason, or nothing."""

from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import bwlens
from bwlens.model.sites import available_matrices, default_matrices
from tests import cases, oracle, tiny
from tests.architectures import ARCHITECTURES, REFUSED, table

TOKENS = torch.tensor([[5, 9, 30, 41], [7, 8, 3, 2]])


NO_LENS = {
    "modernbert_decoder": "no scaled and capped unembedding of its last stream",
    "opt_350m": "a projection stands between them",
    "deepseek_v4": "several residual streams",
    "gemma4_moe": "the experts of a token are given other x",
    "gpt_oss": "finds none that it can read",
    "llama4": "transposed or interleaved",
    "zamba2": "finds none that it can read",
}
"""Why some models cannot be read in the vocabulary, or not with the matrices of the default."""


@pytest.mark.filterwarnings("ignore:Hook alias .* did not resolve:UserWarning")
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name, dtype, boot):
    """A lens or the reason; and all gradients that are there, as an unbridged copy has them."""
    architecture = ARCHITECTURES[name]
    for line, why in architecture.not_on.items():
        if version("transformer_lens").startswith(line):
            pytest.skip(f"not on TransformerLens {line}: {why}")
    if dtype is torch.float64 and architecture.float32_only:
        pytest.skip(architecture.float32_only)
    tolerance = 2 * cases.TOLERANCE[dtype]
    with oracle.TrueFloat64() if dtype is torch.float64 else nullcontext():
        model, hf = boot(name, dtype), tiny.hf_model(name, dtype)
        if dtype is torch.float32:
            check_lens(model, NO_LENS.get(name))
        cases.check_every_matrix(model, hf, tolerance, sides=("right",), unread=architecture.unread)
    assert {matrix for matrix, *_ in oracle.matrices(hf)} >= set(architecture.unread)
    for matrix, why in architecture.unread.items():
        with pytest.raises((NotImplementedError, ValueError), match=f"{matrix}.* {why}"):
            bwlens.capture(model, TOKENS, 17, matrix)


def check_lens(model, why):
    """There is one, or the reason why not."""
    refusal = nullcontext() if why is None else pytest.raises(NotImplementedError, match=why)
    with refusal:
        lens = bwlens.backward_lens(model, TOKENS[0], 17)
        assert any(row[-1] for row in lens.words("promoted", lens.matrices[-1]))
        assert repr(lens)
        assert lens._repr_html_()


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_known_matrix(name, boot):
    model = boot(name)
    assert available_matrices(model) == ()
    with pytest.raises(NotImplementedError, match=r"finds none .* its blocks are made of \w+ \("):
        default_matrices(model)
    with pytest.raises((NotImplementedError, ValueError), match=r"W_in"):
        bwlens.capture(model, TOKENS, 17)


def test_the_page_says_what_the_tests_show():
    page = Path(__file__).parents[2] / "docs/results/architectures.md"
    assert page.read_text() == table(), (
        "python -m tests.architectures > docs/results/architectures.md"
    )
    assert len(ARCHITECTURES) + len(tiny.CONFIGS) >= 35
