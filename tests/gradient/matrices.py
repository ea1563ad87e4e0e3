"""Gradients to try, and the dense matrix that each stands for: slow, obvious, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bwlens.gradient.low_rank import LowRankGradient

EPS64 = torch.finfo(torch.float64).eps


def dense(gradient: LowRankGradient) -> Tensor:
    """The oracle: sum_i outer(x_i, delta_i), one row at a time, in float64."""
    total = torch.zeros(gradient.x.shape[1], gradient.delta.shape[1], dtype=torch.float64)
    for x, delta in zip(gradient.x.double(), gradient.delta.double(), strict=True):
        total += torch.outer(x, delta)
    return total


def random(n: int, d_in: int, d_out: int, seed: int = 0, **kind: Any) -> LowRankGradient:
    chance = torch.Generator().manual_seed(seed)
    x, delta = (torch.randn(n, d, generator=chance).to(**kind) for d in (d_in, d_out))
    return LowRankGradient(x, delta)


def scaled(n: int, d_in: int, d_out: int) -> LowRankGradient:
    """Long x beside tiny delta and the other way round, as first tokens have them."""
    rows = random(n, d_in, d_out)
    size = 10.0 ** torch.linspace(-6, 6, n)[:, None]
    return LowRankGradient(rows.x * size, rows.delta / size)


plain = random(3, 8, 5)
CASES = {
    "plain": plain,
    "one row": random(1, 8, 5),
    "no rows": random(0, 8, 5),
    "wide": random(4, 5, 31),
    "a row for every input": random(5, 5, 9),
    "more rows than inputs": random(7, 5, 9),
    "more rows than outputs": random(7, 9, 5),
    "more rows than either": random(40, 5, 9),
    "zero delta": LowRankGradient(plain.x, torch.zeros(3, 5)),
    "one live row": LowRankGradient(1e6 * plain.x, plain.delta * torch.tensor([[0], [0], [1]])),
    "same row thrice": LowRankGradient(plain.x[[0, 0, 0]], plain.delta[[1, 1, 1]]),
    "same x, other delta": LowRankGradient(plain.x[[0, 0, 1]], plain.delta),
    "cancelling": LowRankGradient(
        plain.x[[0, 1, 0]], plain.delta[[0, 1, 0]] * torch.tensor([[1], [1], [-1]])
    ),
    "float64": random(6, 8, 7, dtype=torch.float64),
    "bfloat16": random(4, 8, 7, dtype=torch.bfloat16),
    "float16": random(4, 8, 7, dtype=torch.float16),
    "unbalanced": scaled(4, 9, 8),
}
RANKS = {"no rows": 0, "zero delta": 0, "one live row": 1, "same row thrice": 1}
RANKS |= {"same x, other delta": 2, "cancelling": 1}

each_case = pytest.mark.parametrize("gradient", CASES.values(), ids=CASES.keys())


def assert_close(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Equal up to the rounding of `found`'s dtype, relative to `scale`."""
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max().item() if found.numel() else 0.0
    assert error <= 16 * torch.finfo(found.dtype).eps * max(scale, EPS64), (found, expected)


def size(gradient: LowRankGradient) -> float:
    """sum_i ||x_i|| ||delta_i||: what rounding is relative to."""
    return (gradient.x.double().norm(dim=1) * gradient.delta.double().norm(dim=1)).sum().item()


def same_bits(a: LowRankGradient, b: LowRankGradient) -> bool:
    def bits(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        return (
            tensor.dtype,
            tensor.shape,
            bytes(tensor.clone(memory_format=torch.contiguous_format).untyped_storage()),
        )

    return all(
        bits(getattr(a, name)) == bits(getattr(b, name)) for name in ("x", "delta", "prompt", "pos")
    )


BATCH = LowRankGradient(
    random(5, 4, 3).x,
    random(5, 4, 3).delta,
    prompt=torch.tensor([7, 2, 7, 2, 7]),
    pos=torch.tensor([0, 0, 1, 1, 2]),
)
