"""A matrix as the rows that span it: x^T delta = sum_i outer(x_i, delta_i).

Norms, singular values, products and rows are computed from x and delta; only `.dense()` forms the
matrix. A weight's gradient is one (`LowRankGradient`), and so is a change of a weight.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

import numbers
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias, TypeVar, overload

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from bwlens.gradient.arithmetic import SVD, contract, core, double, effective_ranks, svd
from bwlens.runs.tensors import read_tensors, write_tensors

Many: TypeAlias = slice | Sequence[int] | Tensor
"""Several rows or columns of W: a slice, a list, or a 1-D tensor of numbers or a mask."""

M = TypeVar("M", bound="LowRankMatrix")

_STRIPS = 16  # With many rows, inner products walk over W in this many strips.
_CANCELLED = 1e-6  # Below this share of its diagonal, a Gram sum is mostly rounding.


@dataclass(frozen=True, eq=False, repr=False)
class LowRankMatrix:
    """A matrix x^T delta [d_in, d_out], kept as the n rows that span it.

    - `x` [n, d_in] and `delta` [n, d_out]: one dtype, one device; the matrix is the sum of the
      outer products of their rows.

    Tensors are detached, not copied. Norms and decompositions are in float64; `dense`, `@`, rows
    and columns are computed in at least float32 and returned in the stored dtype. Raises ValueError
    where the tensors do not fit together.

    >>> x, delta = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    >>> matrix = LowRankMatrix(x, delta)
    >>> matrix
    LowRankMatrix(W [3, 2], n=1, float32, cpu)
    >>> matrix[2], matrix @ torch.tensor([1.0, 0.0])
    (tensor([6., 8.]), tensor([3., 0., 6.]))
    """

    x: Float[Tensor, "n d_in"]
    delta: Float[Tensor, "n d_out"]

    def __post_init__(self) -> None:
        x: Any = self.x
        delta: Any = self.delta
        for name, rows in (("x", x), ("delta", delta)):
            if not isinstance(rows, Tensor):
                raise ValueError(
                    f"{name} is a {type(rows).__name__}; expected a tensor [n, d]. Convert it:"
                    f" torch.as_tensor({name})."
                )
            if rows.ndim != 2 or not rows.is_floating_point():
                raise ValueError(
                    f"{name} is {described(rows)}; expected floating-point rows [n, d], one per "
                    f"(prompt, position). Flatten batch and position: {name}.flatten(0, -2)."
                )
        if len(x) != len(delta):
            raise ValueError(
                f"x has {len(x)} rows and delta {len(delta)}; row i of both must come from the "
                "same (prompt, position). Select the same positions in both."
            )
        if (x.dtype, x.device) != (delta.dtype, delta.device):
            raise ValueError(
                f"x is {described(x)} on {x.device} and delta {described(delta)} on {delta.device};"
                " expected one dtype and one device. Convert one: delta.to(x)."
            )
        object.__setattr__(self, "x", x.detach())
        object.__setattr__(self, "delta", delta.detach())

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kind = type(self).__name__
        return f"{kind}(W {list(self.shape)}, n={self.n}, {dtype}, {self.device})"

    @property
    def n(self) -> int:
        """The number of spanning rows, one per (prompt, position)."""
        return self.x.shape[0]

    @property
    def d_in(self) -> int:
        """The width of what enters W."""
        return self.x.shape[1]

    @property
    def d_out(self) -> int:
        """The width of what leaves W."""
        return self.delta.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out), the shape of W and of `.dense()`."""
        return self.d_in, self.d_out

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored rows."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """The device of the stored rows."""
        return self.x.device

    # Size and direction.

    def norm(self) -> Float64[Tensor, ""]:
        """The Frobenius norm, sqrt(sum((x x^T) * (delta delta^T))); nan or inf if a row is.

        Where rows nearly cancel and that sum would be mostly rounding, by thin QR instead.

        >>> LowRankMatrix(torch.ones(1, 4), torch.ones(1, 9)).norm()
        tensor(6., dtype=torch.float64)
        """
        squared = self.inner(self)
        if squared < _CANCELLED * self._row_norms().square().sum():
            return torch.linalg.matrix_norm(core(self.x, self.delta))
        return squared.clamp(min=0).sqrt()

    def inner(self, other: "LowRankMatrix") -> Float64[Tensor, ""]:
        """The Frobenius inner product <A, B> = sum((x_A x_B^T) * (delta_A delta_B^T)).

        Each may have its own n; many rows are summed over strips of the two matrices, which is
        cheaper. Raises ValueError where shapes or devices differ.
        """
        self._check_fits(other)
        x, delta, x_, delta_ = map(double, (self.x, self.delta, other.x, other.delta))
        rows = self.n if other is self else self.n + other.n
        if self.n * other.n * (self.d_in + self.d_out) <= rows * self.d_in * self.d_out:
            return ((x @ x_.T) * (delta @ delta_.T)).sum()
        total = x.new_zeros(())
        for columns, columns_ in zip(x.chunk(_STRIPS, 1), x_.chunk(_STRIPS, 1), strict=True):
            strip = columns.T @ delta
            total += (strip * (strip if other is self else columns_.T @ delta_)).sum()
        return total

    def cosine(self, other: "LowRankMatrix") -> Float64[Tensor, ""]:
        """The cosine <A, B> / (||A|| ||B||); nan where either is zero, which has no direction.

        >>> a = LowRankMatrix(torch.ones(1, 4), torch.ones(1, 9))
        >>> a.cosine(-3 * a)
        tensor(-1., dtype=torch.float64)
        """
        return (self.inner(other) / (self.norm() * other.norm())).clamp(-1, 1)

    # Singular values.

    def svd(self) -> SVD:
        """The reduced SVD: U [d_in, r], S [r], Vh [r, d_out], with r = min(n, d_in, d_out).

        U and V are orthonormal also where S is zero. Raises ValueError where a row is not finite.

        >>> delta = torch.tensor([[0.0, 5.0], [1.0, 0.0]])
        >>> LowRankMatrix(torch.eye(2, 3), delta).svd().S.round(decimals=9)
        tensor([5., 1.], dtype=torch.float64)
        """
        return svd(self.x, self.delta)

    def singular_values(self) -> Float64[Tensor, " r"]:
        """The first r = min(n, d_in, d_out) singular values, descending; all others are zero.

        The error of each is about that of float64 on sum_i ||x_i|| ||delta_i||. Raises ValueError
        where a row is not finite.
        """
        return torch.linalg.svdvals(core(self.x, self.delta))

    def rank(self, rtol: float | None = None) -> int:
        """The number of singular values above a threshold; at most n (Backward Lens, Lemma 4.1).

        With `rtol` that is rtol * the largest singular value. By default it is the rounding of the
        rows, eps * sqrt(sum_i ||x_i||^2 ||delta_i||^2) with eps that of the stored dtype (each
        outer product moves by up to eps of its norm, independent errors add in squares), plus that
        of the arithmetic, 4 eps_float64 * sum_i ||x_i|| ||delta_i||. Raises ValueError where a row
        is not finite or rtol is negative.

        >>> LowRankMatrix(torch.ones(5, 8), torch.randn(5, 8)).rank()  # one x, five times
        1
        """
        S = self.singular_values()
        return int((self._threshold(S, rtol) < S).sum())

    def effective_rank(self) -> Float64[Tensor, ""]:
        """exp(-sum_k p_k log p_k) with p = S / sum(S): from 1 to the rank; 0 for a zero gradient.

        Raises ValueError where a row is not finite. Source: Roy and Vetterli, "The effective
        rank", EUSIPCO 2007.

        >>> LowRankMatrix(torch.eye(4, 6), torch.eye(4, 5)).effective_rank().round(decimals=9)
        tensor(4., dtype=torch.float64)
        """
        return effective_ranks(self.singular_values())

    def compress(self: M, rtol: float | None = None) -> M:
        """The same in `rank(rtol)` rows: x_k = sqrt(S_k) U_k, delta_k = sqrt(S_k) V_k.

        The rows are mixtures: a gradient's `prompt` and `pos` are dropped. Raises as `rank` does.

        >>> LowRankMatrix(torch.ones(5, 8), torch.randn(5, 8)).compress()
        LowRankMatrix(W [8, 8], n=1, float32, cpu)
        """
        U, S, Vh = self.svd()
        kept = self._threshold(S, rtol) < S
        root = S[kept, None].sqrt()
        return type(self)((root * U.T[kept]).to(self.x), (root * Vh[kept]).to(self.delta))

    # The matrix, or parts of it.

    def dense(self) -> Float[Tensor, "{self.d_in} {self.d_out}"]:
        """The matrix x^T delta itself, [d_in, d_out], as `W.grad` would hold it."""
        return contract(self.x, self.delta)

    @property
    def factored(self) -> Any:
        """TransformerLens' `FactoredMatrix`, A = x^T [d_in, n], B = delta [n, d_out]; no copy."""
        from transformer_lens import FactoredMatrix  # its import takes seconds

        return FactoredMatrix(self.x.T, self.delta)

    @property
    def T(self: M) -> M:
        """The transpose delta^T x, for a weight that is stored [d_out, d_in] as in `nn.Linear`."""
        return replace(self, x=self.delta, delta=self.x)

    __array_ufunc__ = None  # numpy leaves `array @ gradient` to __rmatmul__

    def __matmul__(
        self, v: Float[Tensor, " d_out *k"] | Float[np.ndarray, " d_out *k"]
    ) -> Float[Tensor, " {self.d_in} *k"]:
        """x^T (delta v) for v [d_out] or [d_out, k], also of numpy; ValueError for other shapes."""
        if (widened := self._widened(v)) is None:
            return NotImplemented
        x, delta, v, dtype = widened
        if v.ndim not in (1, 2) or len(v) != self.d_out:
            raise ValueError(
                f"gradient {list(self.shape)} @ v {list(v.shape)}: expected v [{self.d_out}] or "
                f"[{self.d_out}, k]. The other side is v @ gradient."
            )
        return (x.T @ (delta @ v)).to(dtype)

    def __rmatmul__(
        self, v: Float[Tensor, "*k d_in"] | Float[np.ndarray, "*k d_in"]
    ) -> Float[Tensor, " *k {self.d_out}"]:
        """(v x^T) delta for v [..., d_in], also of numpy; ValueError for other shapes."""
        if (widened := self._widened(v)) is None:
            return NotImplemented
        x, delta, v, dtype = widened
        if v.ndim == 0 or v.shape[-1] != self.d_in:
            raise ValueError(
                f"v {list(v.shape)} @ gradient {list(self.shape)}: expected v [..., {self.d_in}]. "
                "The other side is gradient @ v."
            )
        return ((v @ x.T) @ delta).to(dtype)

    @overload
    def __getitem__(
        self,
        key: SupportsIndex
        | tuple[SupportsIndex, SupportsIndex]
        | tuple[SupportsIndex, Many]
        | tuple[Many, SupportsIndex],
    ) -> Tensor: ...
    @overload
    def __getitem__(self, key: Many | tuple[Many, Many]) -> "LowRankMatrix": ...
    def __getitem__(self, key: Any) -> "Tensor | LowRankMatrix":
        """g[i] is row i [d_out], g[:, j] column j [d_in], g[i, j] an entry []: all dense.

        An MLP's neuron j is W_in's column j and W_out's row j. Slices, lists, 1-D tensors of
        numbers or masks give a smaller LowRankMatrix; two of them take rows times columns.
        Raises IndexError outside W.
        """
        parts = key if isinstance(key, tuple) else (key, slice(None))
        if len(parts) != 2:
            raise IndexError(f"{len(parts)} indices for a [d_in, d_out] gradient; expected 1 or 2.")
        x, delta = _columns(self.x, parts[0], "row"), _columns(self.delta, parts[1], "column")
        if x.ndim == delta.ndim == 2:
            return replace(self, x=x, delta=delta)
        return contract(x, delta)

    __iter__ = None  # Else Python would walk over the d_in dense rows; see split().

    # Sums and multiples.

    @classmethod
    def sum(cls: type[M], matrices: "Iterable[LowRankMatrix]") -> M:
        """The sum of matrices of one shape: all their rows, copied once.

        A gradient's prompts and positions are kept where every part has them, numbers unchanged.
        Raises ValueError for no parts, or where they do not fit.

        >>> a = LowRankMatrix(torch.ones(5, 8), torch.ones(5, 7))
        >>> LowRankMatrix.sum([a, a, -a])
        LowRankMatrix(W [8, 7], n=15, float32, cpu)
        """
        parts = list(matrices)
        if not parts:
            raise ValueError("no gradients to add; expected at least one, which gives the shape.")
        for part in parts:
            parts[0]._check_fits(part)
        columns: dict[str, Tensor] = {}
        for name in (f.name for f in fields(cls)):
            known = [rows for part in parts if (rows := getattr(part, name, None)) is not None]
            if len(known) == len(parts):
                columns[name] = torch.cat(known)
        return cls(**columns)

    def __add__(self, other: Any) -> "LowRankMatrix":
        if not isinstance(other, LowRankMatrix):
            return NotImplemented
        kind = type(self) if isinstance(other, type(self)) else LowRankMatrix
        return kind.sum([self, other])

    def __radd__(self: M, other: Any) -> M:
        if isinstance(other, int) and other == 0:  # for sum()
            return self
        return NotImplemented

    def __sub__(self, other: Any) -> "LowRankMatrix":
        return self + -other if isinstance(other, LowRankMatrix) else NotImplemented

    def __neg__(self: M) -> M:
        return replace(self, delta=-self.delta)

    def __mul__(self: M, scalar: Any) -> M:
        single = isinstance(scalar, Tensor) and scalar.ndim == 0
        if not single and not isinstance(scalar, numbers.Real):
            return NotImplemented
        return replace(self, delta=self.delta * scalar)

    __rmul__ = __mul__

    def __truediv__(self: M, scalar: Any) -> M:
        return self * (1 / scalar)

    # Elsewhere.

    def to(
        self: M, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> M:
        """The same matrix on another device or in another floating-point dtype."""
        place, kind = device or self.device, dtype or self.dtype
        return replace(self, x=self.x.to(place, kind), delta=self.delta.to(place, kind))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the rows, bit for bit, to a safetensors file; replaced whole or not at all.

        Raises ValueError where there is no such folder.
        """
        rows = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: tensor for name, tensor in rows.items() if tensor is not None}
        return write_tensors(path, tensors, type(self).__name__)

    @classmethod
    def load(cls: type[M], path: str | os.PathLike[str], device: str | torch.device = "cpu") -> M:
        """Read what `save` wrote; ValueError for any other file, FileNotFoundError for none."""
        tensors, _ = read_tensors(path, cls.__name__, f"{cls.__name__}.save", device)
        return cls(**tensors)

    # Private.

    def _check_fits(self, other: "LowRankMatrix") -> None:
        if (self.shape, self.device) != (other.shape, other.device):
            raise ValueError(
                f"gradients of a weight {list(self.shape)} on {self.device} and of a weight "
                f"{list(other.shape)} on {other.device}; expected the same shape and device. "
                "See .T and .to(device)."
            )

    def _row_norms(self) -> Float64[Tensor, " n"]:
        return double(self.x).norm(dim=1) * double(self.delta).norm(dim=1)

    def _threshold(self, S: Float64[Tensor, " r"], rtol: float | None) -> Float64[Tensor, ""]:
        if rtol is None:
            norms = self._row_norms()
            arithmetic = 4 * torch.finfo(torch.float64).eps * norms.sum()
            return torch.finfo(self.dtype).eps * norms.norm() + arithmetic
        if not rtol >= 0:
            raise ValueError(f"rtol is {rtol}; expected a share of the largest singular value.")
        return rtol * S[:1].sum()

    def _widened(self, v: Any) -> tuple[Tensor, Tensor, Tensor, torch.dtype] | None:
        """x, delta and v in float32 at least, and the result's dtype; None where v is no tensor."""
        v = torch.as_tensor(v, device=self.device) if isinstance(v, np.ndarray) else v
        if not isinstance(v, Tensor):
            return None
        dtype = torch.promote_types(self.dtype, v.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return self.x.to(wide), self.delta.to(wide), v.to(wide), dtype


def described(tensor: Tensor) -> str:
    """Dtype and shape, for people."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _columns(rows: Float[Tensor, "n d"], key: Any, name: str) -> Float[Tensor, "n ..."]:
    if isinstance(key, slice | list | range) or (isinstance(key, Tensor) and key.ndim == 1):
        return rows[:, key]
    width = rows.shape[1]
    try:
        number = operator.index(key)
    except (TypeError, ValueError):
        raise IndexError(
            f"{name} index {key!r}; expected a number, a slice, a list, or a 1-D tensor."
        ) from None
    if not -width <= number < width:
        raise IndexError(f"{name} {number} is outside W, which has {width} {name}s.")
    return rows[:, number]
