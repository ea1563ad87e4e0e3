"""Every prompt's spectrum at once, against each prompt's own by QR and full SVD."""

import pytest
import torch

import bwlens
from bwlens import LowRankGradient
from bwlens.gradient.spectra import spectra
from tests import cases


def random_gradient(lengths, d_in, d_out, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.randperm(len(prompt), generator=generator)  # rows need not stand together
    return LowRankGradient(
        torch.randn(len(prompt), d_in, generator=generator).to(dtype),
        torch.randn(len(prompt), d_out, generator=generator).to(dtype),
        prompt=prompt[order],
    )


def check(gradient):
    found = spectra(gradient)
    parts = gradient.split()
    assert found.prompts == gradient.prompts
    effective = found.effective_ranks
    for at, part in enumerate(parts):
        full = torch.linalg.svdvals(part.x.double().T @ part.delta.double())
        n = min(len(full), found.singular_values.shape[1])
        scale = full[0].clamp(min=1e-300)
        assert (found.singular_values[at, :n] - full[:n]).abs().max() <= 1e-12 * scale
        assert (found.singular_values[at, n:] <= 1e-12 * scale).all()
        assert int(found.ranks[at]) == part.rank()
        assert int(found.n[at]) == part.n
        assert float(effective[at]) == pytest.approx(float(part.effective_rank()), rel=1e-9)
    return found


@pytest.mark.parametrize(
    ("lengths", "d_in", "d_out"),
    [([3, 1, 5], 16, 24), ([3, 1, 5], 24, 4), ([9, 2], 4, 6), ([20, 7], 8, 12), ([1], 1, 1)],
)
def test_random_rows(lengths, d_in, d_out):
    found = check(random_gradient(lengths, d_in, d_out))
    assert found.ranks.tolist() == [min(n, d_in, d_out) for n in lengths]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    check(random_gradient([3, 1, 5], 16, 24, dtype=dtype))


def test_captured(bridge):
    tokens, mask = cases.padded(cases.PROMPTS)
    grads = bwlens.capture(
        bridge("gpt2"), tokens, bwlens.NLL(cases.TARGETS), ("W_in", "W_out"), attention_mask=mask
    )
    for site, gradient in grads.items():
        found = check(gradient)
        if site.layer == 2:  # the positions that the loss reads, and no others
            assert found.active.tolist() == [len(target) for target in cases.TARGETS]


def test_repeated_and_zero_rows():
    """One x three times has rank 1; a zero delta is a row, but no active one."""
    x = torch.tensor([[1.0, 2.0, 0.0]] * 3 + [[0.0, 1.0, 1.0], [5.0, 0.0, 0.0], [2.0, 0.0, 1.0]])
    delta = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 5.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    prompt = torch.tensor([0, 0, 0, 1, 1, 2])
    found = check(LowRankGradient(x, delta, prompt=prompt))
    assert found.ranks.tolist() == [1, 1, 0]
    assert found.n.tolist() == [3, 2, 1]
    assert found.active.tolist() == [3, 1, 0]
    assert found.effective_ranks.tolist() == [pytest.approx(1.0), pytest.approx(1.0), 0.0]


def test_prompts_without_rows_are_left_out():
    gradient = LowRankGradient(torch.ones(2, 3), torch.ones(2, 4), prompt=torch.tensor([5, 2]))
    assert spectra(gradient).prompts == [2, 5]


def test_rows_must_be_finite_and_know_their_prompt():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="nan or inf"):
        spectra(LowRankGradient(x, torch.full((2, 4), torch.inf), prompt=torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="which prompt"):
        spectra(LowRankGradient(x, torch.ones(2, 4)))
