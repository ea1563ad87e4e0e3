"""`LowRankGradient` against the dense gradient, which it never forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bwlens.gradient.low_rank import LowRankGradient
from tests.gradient.matrices import (
    BATCH,
    CASES,
    RANKS,
    assert_close,
    dense,
    each_case,
    plain,
    random,
    scaled,
    size,
)

# Against the oracle.


@each_case
def test_dense(gradient: LowRankGradient) -> None:
    assert gradient.dense().dtype == gradient.dtype
    assert_close(gradient.dense(), dense(gradient), size(gradient))


def test_it_is_the_gradient_and_a_descent_step_subtracts_it() -> None:
    W = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    x, goal = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    z = x @ W
    z.retain_grad()
    loss = (z - goal).square().mean()
    loss.backward()
    assert z.grad is not None
    assert W.grad is not None
    gradient = LowRankGradient(x.flatten(0, 1), z.grad.flatten(0, 1))
    torch.testing.assert_close(gradient.dense(), W.grad)
    assert (x @ (W - 0.1 * gradient.dense()) - goal).square().mean() < loss


@each_case
def test_norm(gradient: LowRankGradient) -> None:
    norm = gradient.norm()
    assert norm.dtype == torch.float64
    # Sums of squares keep half of the digits below 1e-6 of the parts, and no path goes there.
    assert abs(norm - dense(gradient).norm()) <= 1e-12 * size(gradient)


def test_norm_of_what_cancels_keeps_its_digits() -> None:
    a, rest = random(4, 8, 5, dtype=torch.float64), random(1, 8, 5, 1, dtype=torch.float64)
    small = a - a + 1e-9 * rest
    assert abs(small.norm() / (1e-9 * rest.norm()) - 1) < 1e-6
    assert (a - a).norm() < 1e-14 * size(a)
    for seed in range(10):  # u w + v w - (u + v) w, whose Gram sum is rounding of either sign
        part = random(2, 8, 5, seed, dtype=torch.float64)
        (u, v), w = part.x, part.delta[0]
        nothing = LowRankGradient(torch.stack([u, v, u + v]), torch.stack([w, w, -w]))
        assert nothing.norm() < 1e-14 * size(nothing)


@each_case
def test_svd(gradient: LowRankGradient) -> None:
    U, S, Vh = gradient.svd()
    r = min(gradient.n, gradient.d_in, gradient.d_out)
    assert (U.shape, S.shape, Vh.shape) == ((gradient.d_in, r), (r,), (r, gradient.d_out))
    assert_close(U @ S.diag() @ Vh, dense(gradient), size(gradient))
    one = torch.eye(r, dtype=torch.float64)
    assert_close(U.T @ U, one)
    assert_close(Vh @ Vh.T, one)
    assert_close(S, gradient.singular_values(), size(gradient))


@each_case
def test_singular_values(gradient: LowRankGradient) -> None:
    S = gradient.singular_values()
    r = min(gradient.n, gradient.d_in, gradient.d_out)
    assert_close(S, torch.linalg.svdvals(dense(gradient))[:r], size(gradient))
    assert (S[1:] <= S[:-1]).all()


@pytest.mark.parametrize("n", [4, 12], ids=["few rows", "more rows than d_in"])
def test_small_singular_values_are_right(n: int) -> None:
    """Down to 1e-12 of the largest, where an eigenvalue of a Gram matrix would be noise."""
    U, _, Vh = random(4, 9, 7).svd()
    S = torch.tensor([1, 1e-3, 1e-8, 1e-12], dtype=torch.float64)
    gradient = LowRankGradient((U * S).T, Vh)
    if n > 4:  # Each row in three parts.
        gradient = LowRankGradient.sum([gradient / 3] * 3)
    found = gradient.singular_values()[:4]
    assert ((found - S).abs() / S).max() < 1e-3


def test_long_x_beside_a_tiny_delta_does_not_drown_the_rest() -> None:
    gradient, alone = scaled(3, 8, 7), random(3, 8, 7)
    S = torch.linalg.svdvals(dense(alone))[:3]
    assert ((gradient.singular_values() - S) / S).abs().max() < 1e-5  # 1e12 apart in float32
    assert gradient.rank() == 3


@pytest.mark.parametrize(("name", "gradient"), CASES.items(), ids=CASES.keys())
def test_rank(name: str, gradient: LowRankGradient) -> None:
    expected = RANKS.get(name, min(gradient.n, *gradient.shape))
    assert gradient.rank() == expected
    assert gradient.compress().n == expected
    assert torch.linalg.matrix_rank(dense(gradient), rtol=1e-6) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [3, 300], ids=["few rows", "many rows"])
def test_rows_that_depend_on_each_other_up_to_rounding_do_not_count(
    dtype: torch.dtype, n: int
) -> None:
    exact = random(2, 40, 30, dtype=torch.float64)
    mix = torch.randn(n, 2, generator=torch.Generator().manual_seed(1)).double()
    stored = LowRankGradient((mix @ exact.x).to(dtype), random(n, 40, 30, 2).delta.to(dtype))
    assert stored.rank() == 2
    if dtype != torch.float64:  # The rounding is there, and a zero threshold counts it.
        assert stored.rank(rtol=0.0) == min(n, 30)


def test_the_threshold_does_not_grow_with_the_width_of_w() -> None:
    x, delta = torch.eye(2, 3000), torch.eye(2, 3000) * torch.tensor([[1], [1e-5]])
    gradient = LowRankGradient(x, delta)
    assert gradient.rank() == 2
    assert gradient.rank(rtol=3000 * torch.finfo(torch.float32).eps) == 1
    assert random(20, 700, 900, dtype=torch.bfloat16).rank() == 20
    assert random(5000, 30, 20, dtype=torch.bfloat16).rank() == 20


def test_rank_with_a_threshold_of_ones_own() -> None:
    gradient = LowRankGradient(torch.diag(torch.tensor([4.0, 2.0, 1.0])), torch.eye(3))
    assert [gradient.rank(rtol=r) for r in (0.0, 0.3, 0.7, 1.5)] == [3, 2, 1, 0]
    assert gradient.compress(rtol=0.3).n == 2
    with pytest.raises(ValueError, match="rtol is -1"):
        gradient.rank(rtol=-1.0)
    with pytest.raises(ValueError, match="rtol is nan"):
        gradient.rank(rtol=math.nan)


@each_case
def test_effective_rank(gradient: LowRankGradient) -> None:
    S = torch.linalg.svdvals(dense(gradient))
    p = [s / S.sum().item() for s in S.tolist() if s > 1e-14 * S.max().item()]
    expected = math.exp(-sum(q * math.log(q) for q in p)) if p else 0.0
    assert gradient.effective_rank().item() == pytest.approx(expected, rel=1e-9)


@each_case
def test_compress(gradient: LowRankGradient) -> None:
    small = gradient.compress()
    assert (small.dtype, small.shape) == (gradient.dtype, gradient.shape)
    assert (small.prompt, small.pos) == (None, None)
    rounding = torch.finfo(gradient.dtype).eps * size(gradient)
    assert (dense(small) - dense(gradient)).abs().max() <= 4 * rounding


@each_case
def test_inner_and_cosine(gradient: LowRankGradient) -> None:
    other = random(6, *gradient.shape, seed=3, dtype=torch.float64)
    a, b = dense(gradient), dense(other)
    for found in (gradient.inner(other), other.inner(gradient)):
        assert_close(found, (a * b).sum(), size(gradient) * size(other))
    if a.any():
        expected = (a * b).sum() / (a.norm() * b.norm())
        torch.testing.assert_close(gradient.cosine(other), expected, rtol=1e-9, atol=1e-12)
        assert gradient.cosine(gradient) == pytest.approx(1)
        assert -1 <= gradient.cosine(-gradient) < -1 + 1e-9
    else:
        assert gradient.cosine(other).isnan()


@each_case
def test_products(gradient: LowRankGradient) -> None:
    matrix, chance = dense(gradient), torch.Generator().manual_seed(4)
    for shape in ((gradient.d_out,), (gradient.d_out, 2)):
        v = torch.randn(shape, generator=chance, dtype=torch.float64)
        assert_close(gradient @ v, matrix @ v, 10 * size(gradient))
        assert (gradient @ v.to(gradient.dtype)).dtype == gradient.dtype
    for shape in ((gradient.d_in,), (2, gradient.d_in), (2, 3, gradient.d_in)):
        v = torch.randn(shape, generator=chance, dtype=torch.float64)
        assert_close(v @ gradient, v @ matrix, 10 * size(gradient))
        assert (v.to(gradient.dtype) @ gradient).dtype == gradient.dtype


KEYS: list[Any] = [
    0,
    -1,
    torch.tensor(2),
    slice(None),
    slice(1, 4),
    slice(None, None, 2),
    [3, 0],
    torch.tensor([1, 1]),
    torch.tensor([True, False, True, False, True]),
]


@pytest.mark.parametrize("cols", KEYS, ids=str)
@pytest.mark.parametrize("rows", KEYS, ids=str)
def test_parts(rows: Any, cols: Any) -> None:
    gradient = random(3, 5, 5)
    part = gradient[rows, cols]
    expected = dense(gradient)[rows][..., cols]
    if expected.ndim == 2:
        assert isinstance(part, LowRankGradient)
        part = part.dense()
    assert isinstance(part, Tensor)
    assert_close(part, expected, size(gradient))


@each_case
def test_rows_and_columns(gradient: LowRankGradient) -> None:
    matrix = dense(gradient)
    for part, expected in (
        (gradient[2], matrix[2]),
        (gradient[2, :], matrix[2]),
        (gradient[:, 3], matrix[:, 3]),
        (gradient[2, 3], matrix[2, 3]),
        (gradient[1:3].dense(), matrix[1:3]),
    ):
        assert part.dtype == gradient.dtype
        assert_close(part, expected, size(gradient))


@each_case
def test_factored(gradient: LowRankGradient) -> None:
    assert_close(gradient.factored.AB, dense(gradient), size(gradient))


# The batch, taken apart.


def test_prompts_and_positions() -> None:
    assert BATCH.prompts == [2, 7]
    part = BATCH.for_prompt(7)
    torch.testing.assert_close(part.x, BATCH.x[[0, 2, 4]])
    torch.testing.assert_close(part.delta, BATCH.delta[[0, 2, 4]])
    assert part.prompt is not None
    assert part.pos is not None
    assert part.prompt.tolist() == [7, 7, 7]
    assert part.pos.tolist() == [0, 1, 2]
    torch.testing.assert_close(BATCH.at(1).x, BATCH.x[[2, 3]])
    torch.testing.assert_close(BATCH.for_prompt(2).at(1).x, BATCH.x[[3]])
    assert [part.n for part in BATCH.split()] == [2, 3]
    assert BATCH.for_prompt(2).prompts == [2]


def test_indices_stay_with_their_rows() -> None:
    for same in (BATCH.T, BATCH[1:3], 2 * BATCH, -BATCH, BATCH.to(dtype=torch.float64)):
        assert same.prompt is not None
        assert same.pos is not None
        assert same.prompt.tolist() == [7, 2, 7, 2, 7]
        assert same.pos.tolist() == [0, 0, 1, 1, 2]
    both = BATCH + BATCH
    assert both.prompts == [2, 7]
    assert both.for_prompt(2).n == 4
    assert both.at(2).n == 2
    assert (BATCH + random(2, 4, 3)).prompt is None


def test_sums() -> None:
    parts = [random(n, 4, 3, seed=n) for n in (2, 0, 5)]
    expected = sum(dense(part) for part in parts)
    assert isinstance(expected, Tensor)
    total = sum(parts)
    assert isinstance(total, LowRankGradient)
    for found in (total, LowRankGradient.sum(parts), LowRankGradient.sum(iter(parts))):
        assert found.n == 7
        assert_close(found.dense(), expected, 20)
    torch.testing.assert_close((parts[0] - parts[2]).dense(), (parts[0] + -1 * parts[2]).dense())


@pytest.mark.parametrize(
    "scalar", [2, -0.5, 0, torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64)], ids=str
)
def test_multiples(scalar: Any) -> None:
    for gradient in (plain, CASES["bfloat16"]):
        for found in (gradient * scalar, scalar * gradient):
            assert isinstance(found, LowRankGradient)
            assert found.dtype == gradient.dtype
            assert_close(found.dense(), dense(gradient) * float(scalar), 8 * size(gradient))


@pytest.mark.usefixtures("unchecked")
def test_other_operands_are_refused() -> None:
    gradient: Any = plain
    for wrong in (
        lambda: gradient + torch.ones(8, 5),
        lambda: 1 + gradient,
        lambda: gradient - 1,
        lambda: gradient * torch.ones(5),
        lambda: gradient * 1j,
        lambda: gradient @ gradient,
        lambda: iter(gradient),
    ):
        with pytest.raises(TypeError, match=r"unsupported operand|not iterable"):
            wrong()


# None but dense() forms the matrix.


class NoMatrix(TorchDispatchMode):
    """Fails as soon as an operation returns more than its rows, or the size of the matrix."""

    def __init__(self, gradient: LowRankGradient) -> None:
        super().__init__()
        self.matrix = gradient.d_in * gradient.d_out
        self.limit = gradient.n * max(gradient.shape)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                shape = list(leaf.shape)
                assert leaf.numel() != self.matrix, f"{func} formed the matrix: {shape}"
                assert leaf.numel() <= self.limit, f"{func} formed {shape}"
        return out


FACTORED: dict[str, Callable[[LowRankGradient], Any]] = {
    "norm": lambda g: g.norm(),
    "norm where rows cancel": lambda g: (g - g).norm(),
    "inner": lambda g: g.inner(g[:, :]),
    "cosine": lambda g: g.cosine(-g),
    "svd": lambda g: g.svd(),
    "singular_values": lambda g: g.singular_values(),
    "rank": lambda g: g.rank(),
    "effective_rank": lambda g: g.effective_rank(),
    "compress": lambda g: g.compress(),
    "@": lambda g: g @ torch.ones(g.d_out, 2),
    "@ from the left": lambda g: torch.ones(2, g.d_in) @ g,
    "row": lambda g: g[1],
    "column": lambda g: g[:, 1],
    "entry": lambda g: g[1, 1],
    "slice": lambda g: g[2:30, 1:],
    "T": lambda g: g.T,
    "sum": lambda g: g + 2 * g,
    "factored": lambda g: g.factored,
    "repr": repr,
    "to": lambda g: g.to(dtype=torch.float64),
}
WHOLE = {"svd", "singular_values", "rank", "effective_rank", "compress", "norm where rows cancel"}


@pytest.mark.parametrize("name", FACTORED)
def test_the_matrix_is_never_formed(name: str) -> None:
    gradient = random(2, 40, 50)
    limited = NoMatrix(
        gradient + gradient if name in ("sum", "norm where rows cancel") else gradient
    )
    with limited:
        FACTORED[name](gradient)


@pytest.mark.parametrize("name", sorted(FACTORED.keys() - WHOLE - {"sum"}))
def test_nor_with_more_rows_than_it_has(name: str) -> None:
    """With n above both widths the core of the SVD is of the matrix' own size; all else is not."""
    gradient = random(100, 40, 50)
    with NoMatrix(gradient):
        FACTORED[name](gradient)


def test_that_guard_can_fail() -> None:
    for n in (2, 100):
        gradient = random(n, 40, 50)
        for form in (
            gradient.dense,
            lambda g=gradient: g.x.T @ g.delta,
            lambda g=gradient: g.T.dense(),
        ):
            with pytest.raises(AssertionError, match="formed"), NoMatrix(gradient):
                form()
