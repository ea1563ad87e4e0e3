"""The algebra of gradients, by properties."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bwlens.gradient.low_rank import LowRankGradient, LowRankMatrix
from tests.gradient.matrices import dense, plain, same_bits, size

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
