"""`LowRankGradient` against the dense gradient: slow, obvious, in float64."""

import doctest
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bwlens.gradient.low_rank
import bwlens.gradient.matrix
import bwlens.runs.tensors
from bwlens.gradient.low_rank import LowRankGradient, LowRankMatrix

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

BATCH = LowRankGradient(
    random(5, 4, 3).x,
    random(5, 4, 3).delta,
    prompt=torch.tensor([7, 2, 7, 2, 7]),
    pos=torch.tensor([0, 0, 1, 1, 2]),
)


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


# What cannot be.


@pytest.mark.usefixtures("unchecked")
def test_unfit_tensors_are_refused() -> None:
    x, delta = torch.ones(3, 4), torch.ones(3, 5)
    refused: list[tuple[str, Callable[[], Any]]] = [
        (r"x is float32 \[1, 3, 4\].*x.flatten\(0, -2\)", lambda: LowRankGradient(x[None], delta)),
        (r"delta is int64 \[3, 5\]; expected floating", lambda: LowRankGradient(x, delta.long())),
        ("x has 3 rows and delta 2", lambda: LowRankGradient(x, delta[:2])),
        (
            r"float32 .* and delta float64 .*delta.to\(x\)",
            lambda: LowRankGradient(x, delta.double()),
        ),
        ("on cpu and delta .* on meta", lambda: LowRankGradient(x, delta.to("meta"))),
        ("prompt is float32", lambda: LowRankGradient(x, delta, prompt=x[:, 0])),
        (r"pos is int64 \[2\]; expected 3", lambda: LowRankGradient(x, delta, pos=torch.arange(2))),
    ]
    for message, make in refused:
        with pytest.raises(ValueError, match=message):
            make()


def test_gradients_of_two_weights_are_refused() -> None:
    for operate in (plain.inner, plain.cosine, plain.__add__, plain.__sub__):
        with pytest.raises(ValueError, match=r"\[8, 5\] on cpu .* \[5, 8\] on cpu; expected"):
            operate(plain.T)
        with pytest.raises(ValueError, match=r"on cpu .* on meta"):
            operate(plain.to("meta"))
    with pytest.raises(ValueError, match="no gradients to add"):
        LowRankGradient.sum([])
    with pytest.raises(ValueError, match=r"gradient \[8, 5\] @ v \[8\]: expected v \[5\]"):
        _ = plain @ torch.ones(8)
    with pytest.raises(ValueError, match=r"v \[5\] @ gradient \[8, 5\]: expected v \[..., 8\]"):
        _ = torch.ones(5) @ plain


def test_places_outside_w_are_refused() -> None:
    for key, message in (
        (8, "row 8 is outside W, which has 8 rows"),
        (-9, "row -9 is outside W"),
        ((0, 5), "column 5 is outside W, which has 5 columns"),
        ((0, 0, 0), "3 indices"),
        ("W", "row index 'W'; expected a number"),
        ((0, None), "column index None"),
    ):
        with pytest.raises(IndexError, match=message):
            plain[key]  # type: ignore[index]


def test_rows_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no row has prompt 3; expected one of \[2, 7\]"):
        BATCH.for_prompt(3)
    with pytest.raises(ValueError, match=r"no row has pos -1; expected one of \[0, 1, 2\]"):
        BATCH.at(-1)
    long = LowRankGradient(torch.ones(20, 1), torch.ones(20, 1), pos=torch.arange(20))
    with pytest.raises(ValueError, match=r"\[0, 1, 2, 3, '...', 18, 19\]"):
        long.at(20)
    for ask in (lambda: plain.prompts, plain.split, lambda: plain.for_prompt(0)):
        with pytest.raises(ValueError, match="does not say which prompt"):
            ask()
    with pytest.raises(ValueError, match="does not say which pos"):
        plain.at(0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite(bad: float) -> None:
    delta = plain.delta.clone()
    delta[1, 2] = bad
    gradient = LowRankGradient(plain.x, delta)
    assert not gradient.norm().isfinite()
    methods = gradient.singular_values, gradient.svd, gradient.rank, gradient.effective_rank
    for method in (*methods, gradient.compress):
        with pytest.raises(ValueError, match="1 of 3 rows hold nan or inf, the first is row 1"):
            method()


# The object.


def test_tensors_are_detached_and_not_copied() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    gradient = LowRankGradient(x, 2 * x)
    assert not gradient.x.requires_grad
    assert not gradient.delta.requires_grad
    assert gradient.x.data_ptr() == x.data_ptr()
    with pytest.raises(AttributeError):
        gradient.x = x  # type: ignore[misc]


def test_repr_says_the_shape_and_computes_nothing() -> None:
    gradient = LowRankGradient(
        torch.ones(32, 768, device="meta"), torch.ones(32, 3072, device="meta")
    )
    assert repr(gradient) == "LowRankGradient(W [768, 3072], n=32, float32, meta)"


def test_to() -> None:
    moved = BATCH.to("meta", torch.bfloat16)
    assert (moved.dtype, moved.device.type) == (torch.bfloat16, "meta")
    assert moved.prompt is not None
    assert moved.prompt.device.type == "meta"
    assert (BATCH.to().dtype, BATCH.to().device) == (BATCH.dtype, BATCH.device)


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


@pytest.mark.parametrize(
    "gradient", [*CASES.values(), BATCH, BATCH.T[1:, ::2]], ids=[*CASES, "batch", "views"]
)
def test_saved_and_loaded(gradient: LowRankGradient, tmp_path: Path) -> None:
    path = tmp_path / "gradient.safetensors"
    plain.save(path)
    gradient.save(path)
    assert same_bits(LowRankGradient.load(path), gradient)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gradient.safetensors"
    BATCH.save(path)

    def torn(tensors: Any, part: Path, metadata: Any) -> None:
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(bwlens.runs.tensors, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        plain.save(path)
    assert same_bits(LowRankGradient.load(path), BATCH)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match=r"foreign is not a safetensors file \("):
        LowRankGradient.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"with metadata \{\}; expected"):
        LowRankGradient.load(path)
    save_file({"x": torch.ones(1, 1)}, path, {"format": "bwlens.LowRankGradient", "version": "2"})
    with pytest.raises(ValueError, match="'version': '2'"):
        LowRankGradient.load(path)
    with pytest.raises(FileNotFoundError):
        LowRankGradient.load(tmp_path / "none")


def test_examples_in_the_docstrings() -> None:
    modules = (bwlens.gradient.matrix, bwlens.gradient.low_rank)
    results = [doctest.testmod(module) for module in modules]
    assert sum(result.attempted for result in results) > 15
    assert not any(result.failed for result in results)


# The algebra. Entries are small integers, so that sums are exact and equality is equality.


@st.composite
def gradients(draw: st.DrawFn, shape: tuple[int, int] | None = None) -> LowRankGradient:
    n = draw(st.integers(0, 5))
    d_in, d_out = shape or (draw(st.integers(1, 5)), draw(st.integers(1, 5)))

    def integers(rows: int, columns: int, low: int, high: int) -> Tensor:
        count = rows * columns
        numbers = draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
        return torch.tensor(numbers, dtype=torch.int64).reshape(rows, columns)

    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return LowRankGradient(
        integers(n, d_in, -4, 4).to(dtype),
        integers(n, d_out, -4, 4).to(dtype),
        prompt=integers(n, 1, 0, 2)[:, 0],
        pos=integers(n, 1, 0, 3)[:, 0],
    )


pairs = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(gradients(shape), gradients(shape))
)
quick = settings(max_examples=50, deadline=None)


@quick
@given(pairs, st.integers(-3, 3))
def test_linear(pair: tuple[LowRankGradient, LowRankGradient], c: int) -> None:
    a, b = pair
    A, B = dense(a), dense(b)
    for found, expected in (
        (a + b, A + B),
        (a - b, A - B),
        (c * a, c * A),
        (a * c, c * A),
        (a / 2, A / 2),
        (-a, -A),
        (a.T, A.T),
        (a.T.T, A),
        ((a + b).T, A.T + B.T),
    ):
        assert torch.equal(found.dense().double(), expected)


@quick
@given(pairs, st.integers(-3, 3))
def test_inner_is_bilinear_and_symmetric(
    pair: tuple[LowRankGradient, LowRankGradient], c: int
) -> None:
    a, b = pair
    assert a.inner(b) == b.inner(a) == a.T.inner(b.T) == (dense(a) * dense(b)).sum()
    assert (c * a + b).inner(a) == c * a.inner(a) + b.inner(a)


@quick
@given(pairs)
def test_norms(pair: tuple[LowRankGradient, LowRankGradient]) -> None:
    a, b = pair
    rounding = 1e-12 * (1 + size(a) + size(b))
    assert (a + b).norm() <= a.norm() + b.norm() + rounding
    assert abs(a.inner(b)) <= a.norm() * b.norm() + rounding
    assert abs(a.norm() - a.T.norm()) <= rounding
    assert abs(a.norm() - a.singular_values().norm()) <= rounding
    assert a.norm() <= size(a) + rounding


@quick
@given(gradients())
def test_ranks(a: LowRankGradient) -> None:
    rank = a.rank()
    assert rank <= min(a.n, a.d_in, a.d_out)
    assert rank == a.T.rank() == (a + a).rank() == (3 * a).rank() == a.compress().rank()
    assert rank == torch.linalg.matrix_rank(dense(a))
    assert a.effective_rank() <= rank * (1 + 1e-9)
    assert (a - a).rank() == 0


@quick
@given(gradients(), st.data())
def test_products_and_parts(a: LowRankGradient, data: st.DataObject) -> None:
    A = dense(a)
    u, v = torch.arange(1.0, a.d_in + 1), torch.arange(1.0, a.d_out + 1)
    assert torch.equal((u @ a).double(), u.double() @ A)
    assert torch.equal((a @ v).double(), A @ v.double())
    assert u.double() @ (a @ v).double() == (u @ a).double() @ v.double()
    i, j = (
        data.draw(st.integers(-a.d_in, a.d_in - 1)),
        data.draw(st.integers(-a.d_out, a.d_out - 1)),
    )
    rows, cols = data.draw(st.slices(a.d_in)), data.draw(st.slices(a.d_out))
    if (rows.step or 1) > 0 and (cols.step or 1) > 0:  # torch has no negative steps
        assert torch.equal(a[rows, cols].dense().double(), A[rows, cols])
        assert torch.equal(a[i, cols].double(), A[i, cols])
        assert torch.equal(a[rows, j].double(), A[rows, j])
    assert a[i, j] == A[i, j]
    assert torch.equal(a[i], a.T[:, i])


@quick
@given(gradients())
def test_split_and_sum(a: LowRankGradient) -> None:
    parts = a.split()
    assert sum(part.n for part in parts) == a.n
    assert [part.prompts for part in parts] == [[prompt] for prompt in a.prompts]
    if parts:
        total = LowRankGradient.sum(parts)
        assert torch.equal(total.dense(), a.dense())
        assert total.prompts == a.prompts
    assert a.pos is not None
    if a.n:
        total = LowRankGradient.sum(a.at(pos) for pos in a.pos.unique().tolist())
        assert torch.equal(total.dense(), a.dense())


@settings(max_examples=25, deadline=None)
@given(gradients(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_files_keep_every_bit(
    tmp_path_factory: pytest.TempPathFactory, a: LowRankGradient, dtype: torch.dtype
) -> None:
    path = tmp_path_factory.mktemp("bits") / "gradient.safetensors"
    stored = (a / 3).to(dtype=dtype)
    stored.save(path)
    assert same_bits(LowRankGradient.load(path), stored)


@pytest.mark.usefixtures("unchecked")
def test_vectors_of_numpy() -> None:
    gradient = LowRankGradient(torch.randn(3, 8), torch.randn(3, 7))
    right, left = torch.randn(7), torch.randn(2, 8)
    torch.testing.assert_close(gradient @ right.numpy(), gradient @ right)
    torch.testing.assert_close(left.numpy() @ gradient, left @ gradient)
    with pytest.raises(ValueError, match=r"expected v \[7\]"):
        _ = gradient @ right.numpy()[:3]
    with pytest.raises(ValueError, match=r"x is a ndarray; expected a tensor"):
        LowRankGradient(left.numpy(), left.numpy())  # type: ignore[arg-type]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    gradient = LowRankGradient(torch.randn(3, 8), torch.randn(3, 7))
    with pytest.raises(ValueError, match="there is no folder"):
        gradient.save(tmp_path / "no" / "gradient.safetensors")
    assert gradient.save(tmp_path / "g.safetensors") == tmp_path / "g.safetensors"


def test_a_matrix_is_a_gradient_without_prompts(tmp_path) -> None:
    index = torch.tensor([4, 4, 6])
    gradient = LowRankGradient(plain.x, plain.delta, prompt=index, pos=index)
    matrix = LowRankMatrix(plain.x, plain.delta)
    assert repr(matrix) == "LowRankMatrix(W [8, 5], n=3, float32, cpu)"
    assert float(matrix.cosine(gradient)) == pytest.approx(1)
    for act in (
        lambda a: a.T,
        lambda a: -2 * a / 3,
        lambda a: a[2:5],
        lambda a: a.to(dtype=torch.float64),
    ):
        one, other = act(matrix), act(gradient)
        assert (type(one), type(other)) == (LowRankMatrix, LowRankGradient)
        assert torch.equal(one.dense(), other.dense())
        assert other.prompts == [4, 6]
    for total in (gradient + matrix, matrix + gradient, matrix - gradient, sum([matrix, gradient])):
        assert type(total) is LowRankMatrix
        assert total.n == 6
    assert (gradient + gradient).prompts == [4, 6]
    path = matrix.save(tmp_path / "matrix")
    assert torch.equal(LowRankMatrix.load(path).x, matrix.x)
    with pytest.raises(ValueError, match=r"bwlens\.LowRankMatrix.*as LowRankGradient\.save"):
        LowRankGradient.load(path)
