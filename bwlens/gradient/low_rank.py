"""A matrix as the rows that span it: a weight's gradient, a change of a weight.

A weight W [d_in, d_out] computes z = x W, one row per token position. Its gradient is a sum of one
outer product per row, dL/dW = sum_i outer(x_i, delta_i) = x^T delta, with x_i the row that entered
W and delta_i = dL/dz_i its vector-Jacobian product. `LowRankMatrix` is any such sum, and answers
from its rows; only `.dense()` forms the matrix. `LowRankGradient` knows where each row came from.

Sign: a gradient is dL/dW, the direction of ascent. A descent step is W - lr * gradient.

Source: Katz, Belinkov, Geva and Wolf, "Backward Lens", EMNLP 2024, section 4 and Lemma 4.1.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

import math
import numbers
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, TypeVar, overload

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bwlens.runs.parts import whole
from bwlens.runs.paths import writable

Many: TypeAlias = slice | Sequence[int] | Tensor
"""Several rows or columns of W: a slice, a list, or a 1-D tensor of numbers or a mask."""

M = TypeVar("M", bound="LowRankMatrix")

_STRIPS = 16  # With many rows, inner products walk over W in this many strips.
_CANCELLED = 1e-6  # Below this share of its diagonal, a Gram sum is mostly rounding.


class SVD(NamedTuple):
    """The singular value decomposition U diag(S) Vh, S descending, all in float64."""

    U: Float64[Tensor, "d_in r"]
    S: Float64[Tensor, " r"]
    Vh: Float64[Tensor, "r d_out"]


@dataclass(frozen=True, eq=False, repr=False)
class LowRankMatrix:
    """A matrix x^T delta [d_in, d_out], kept as the n rows that span it.

    - `x` [n, d_in] and `delta` [n, d_out]: one dtype, one device; the matrix is the sum of the
      outer products of their rows.

    Tensors are detached, not copied. Norms and decompositions are computed and returned in
    float64; `dense`, `@`, rows and columns are computed in at least float32 and returned in the
    stored dtype. Raises ValueError where the tensors do not fit together.

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
                    f"{name} is {_shown(rows)}; expected floating-point rows [n, d], one per "
                    f"(prompt, position). Flatten batch and position: {name}.flatten(0, -2)."
                )
        if len(x) != len(delta):
            raise ValueError(
                f"x has {len(x)} rows and delta {len(delta)}; row i of both must come from the "
                "same (prompt, position). Select the same positions in both."
            )
        if (x.dtype, x.device) != (delta.dtype, delta.device):
            raise ValueError(
                f"x is {_shown(x)} on {x.device} and delta {_shown(delta)} on {delta.device}; "
                "expected one dtype and one device. Convert one: delta.to(x)."
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
            return torch.linalg.matrix_norm(self._core())
        return squared.clamp(min=0).sqrt()

    def inner(self, other: "LowRankMatrix") -> Float64[Tensor, ""]:
        """The Frobenius inner product <A, B> = sum((x_A x_B^T) * (delta_A delta_B^T)).

        Each may have its own n; many rows are summed over strips of the two matrices, which is
        cheaper. Raises ValueError where shapes or devices differ.
        """
        self._check_fits(other)
        x, delta, x_, delta_ = map(_double, (self.x, self.delta, other.x, other.delta))
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

        Thin QR of x^T and delta^T, then the SVD of the small R_x R_d^T. U and V are orthonormal
        also where S is zero. Raises ValueError where a row is not finite.

        >>> delta = torch.tensor([[0.0, 5.0], [1.0, 0.0]])
        >>> LowRankMatrix(torch.eye(2, 3), delta).svd().S.round(decimals=9)
        tensor([5., 1.], dtype=torch.float64)
        """
        x, delta = self._finite()
        (q_x, r_x), (q_delta, r_delta) = torch.linalg.qr(x.T), torch.linalg.qr(delta.T)
        U, S, Vh = torch.linalg.svd(r_x @ r_delta.T, full_matrices=False)
        return SVD(q_x @ U, S, Vh @ q_delta.T)

    def singular_values(self) -> Float64[Tensor, " r"]:
        """The first r = min(n, d_in, d_out) singular values, descending; all others are zero.

        From the R factors of `svd` alone, never from squares: the error of each is about that of
        float64 on sum_i ||x_i|| ||delta_i||. Raises ValueError where a row is not finite.
        """
        return torch.linalg.svdvals(self._core())

    def rank(self, rtol: float | None = None) -> int:
        """The number of singular values above a threshold; at most n (Backward Lens, Lemma 4.1).

        With `rtol` the threshold is rtol * the largest singular value. By default it is the
        rounding of the rows, eps * sqrt(sum_i ||x_i||^2 ||delta_i||^2) with eps that of the stored
        dtype (rounding moves each outer product by up to eps of its norm, and independent errors
        add in squares), plus that of the arithmetic, 4 eps_float64 * sum_i ||x_i|| ||delta_i||.
        `torch.linalg.matrix_rank` takes max(d_in, d_out) * eps, for a matrix whose entries were
        rounded: above 1 for a wide W in bfloat16. Raises ValueError where a row is not finite or
        rtol is negative.

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
        S = self.singular_values()
        total = S.sum()
        return torch.where(total > 0, torch.special.entr(S / total).sum().exp(), 0.0)

    def compress(self: M, rtol: float | None = None) -> M:
        """The same gradient in `rank(rtol)` rows: x_k = sqrt(S_k) U_k, delta_k = sqrt(S_k) V_k.

        Equal but for the singular values dropped and the rounding of the stored dtype. The rows
        are mixtures: a gradient's `prompt` and `pos` are dropped. Raises ValueError as `rank` does.

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
        return _contract(self.x, self.delta)

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
        v = _tensor(v, self.device)
        if not isinstance(v, Tensor):
            return NotImplemented
        if v.ndim not in (1, 2) or len(v) != self.d_out:
            raise ValueError(
                f"gradient {list(self.shape)} @ v {list(v.shape)}: expected v [{self.d_out}] or "
                f"[{self.d_out}, k]. The other side is v @ gradient."
            )
        x, delta, v, dtype = self._widened(v)
        return (x.T @ (delta @ v)).to(dtype)

    def __rmatmul__(
        self, v: Float[Tensor, "*k d_in"] | Float[np.ndarray, "*k d_in"]
    ) -> Float[Tensor, " *k {self.d_out}"]:
        """(v x^T) delta for v [..., d_in], also of numpy; ValueError for other shapes."""
        v = _tensor(v, self.device)
        if not isinstance(v, Tensor):
            return NotImplemented
        if v.ndim == 0 or v.shape[-1] != self.d_in:
            raise ValueError(
                f"v {list(v.shape)} @ gradient {list(self.shape)}: expected v [..., {self.d_in}]. "
                "The other side is gradient @ v."
            )
        x, delta, v, dtype = self._widened(v)
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
        return _contract(x, delta)

    __iter__ = None  # Else Python would walk over the d_in dense rows; see split().

    # Sums and multiples.

    @classmethod
    def sum(cls: type[M], matrices: "Iterable[LowRankMatrix]") -> M:
        """The sum of matrices of one shape: all their rows, copied once.

        What is known of the rows (a gradient's prompts and positions) is kept where every part
        has it, numbers unchanged: parts that share a number share a prompt. Raises ValueError for
        no parts, or where they do not fit.

        >>> a = LowRankMatrix(torch.ones(5, 8), torch.ones(5, 7))
        >>> LowRankMatrix.sum([a, a, -a])
        LowRankMatrix(W [8, 7], n=15, float32, cpu)
        """
        parts = list(matrices)
        if not parts:
            raise ValueError("no gradients to add; expected at least one, which gives the shape.")
        for part in parts:
            parts[0]._check_fits(part)
        rows = {f.name: [getattr(part, f.name, None) for part in parts] for f in fields(cls)}
        return cls(
            **{
                name: torch.cat(known)
                for name, several in rows.items()
                if len(known := [each for each in several if each is not None]) == len(parts)
            }
        )

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
        number = (
            scalar.ndim == 0 if isinstance(scalar, Tensor) else isinstance(scalar, numbers.Real)
        )
        if not number:
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
        path = writable(path)
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        # Copies, because the file wants every tensor contiguous and in memory of its own.
        copies = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
            if tensor is not None
        }
        with whole(path) as part:
            save_file(copies, part, metadata=self._format())
        return path

    @classmethod
    def load(cls: type[M], path: str | os.PathLike[str], device: str | torch.device = "cpu") -> M:
        """Read what `save` wrote; ValueError for any other file, FileNotFoundError for none."""
        expected, writer = cls._format(), f"{cls.__name__}.save"
        try:
            file: Any  # safetensors has no types of its own
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata: dict[str, str] = file.metadata() or {}
                if {name: metadata.get(name) for name in expected} != expected:
                    raise ValueError(
                        f"{path} is a safetensors file with metadata {metadata}; expected"
                        f" {expected}, as {writer} of this version of bwlens writes."
                    )
                return cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a safetensors file ({error}); expected one written by {writer}."
            ) from error

    # Private.

    @classmethod
    def _format(cls) -> dict[str, str]:
        return {"format": f"bwlens.{cls.__name__}", "version": "1"}

    def _check_fits(self, other: "LowRankMatrix") -> None:
        if (self.shape, self.device) != (other.shape, other.device):
            raise ValueError(
                f"gradients of a weight {list(self.shape)} on {self.device} and of a weight "
                f"{list(other.shape)} on {other.device}; expected the same shape and device. "
                "See .T and .to(device)."
            )

    def _row_norms(self) -> Float64[Tensor, " n"]:
        return _double(self.x).norm(dim=1) * _double(self.delta).norm(dim=1)

    def _threshold(self, S: Float64[Tensor, " r"], rtol: float | None) -> Float64[Tensor, ""]:
        if rtol is None:
            norms = self._row_norms()
            arithmetic = 4 * torch.finfo(torch.float64).eps * norms.sum()
            return torch.finfo(self.dtype).eps * norms.norm() + arithmetic
        if not rtol >= 0:
            raise ValueError(f"rtol is {rtol}; expected a share of the largest singular value.")
        return rtol * S[:1].sum()

    def _finite(self) -> tuple[Float64[Tensor, "n d_in"], Float64[Tensor, "n d_out"]]:
        x, delta = _double(self.x), _double(self.delta)
        norms = x.norm(dim=1) + delta.norm(dim=1)
        if not math.isfinite(float(norms.sum())):
            bad = torch.nonzero(~norms.isfinite()).flatten().tolist()
            raise ValueError(
                f"{len(bad)} of {self.n} rows hold nan or inf, the first is row {bad[0]}; singular "
                "values need finite rows. Look for an overflow, or capture in a wider dtype."
            )
        return x, delta

    def _core(self) -> Float64[Tensor, "k l"]:
        # R_x R_d^T, which has the gradient's singular values. Householder QR rounds row i of x to
        # within eps ||x_i||, so a long x_i with a tiny delta_i, as at a first token, does not drown
        # the rest. Rows that fill the space need no QR.
        x, delta = (
            rows.T if self.n >= rows.shape[1] else torch.linalg.qr(rows.T, mode="r").R
            for rows in self._finite()
        )
        return x @ delta.T

    def _widened(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
        dtype = torch.promote_types(self.dtype, v.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return self.x.to(wide), self.delta.to(wide), v.to(wide), dtype


@dataclass(frozen=True, eq=False, repr=False)
class LowRankGradient(LowRankMatrix):
    """The gradient dL/dW = x^T delta of a weight W [d_in, d_out], and where its rows came from.

    - `x` [n, d_in]: the rows that entered W, in the units of the activations.
    - `delta` [n, d_out]: dL/dz, loss per unit of W's output.
    - `prompt`, `pos` [n], optional: the prompt and the token position each row came from.

    >>> LowRankGradient(torch.ones(1, 3), torch.ones(1, 2), prompt=torch.tensor([7])).prompts
    [7]
    """

    prompt: Int[Tensor, " n"] | None = None
    pos: Int[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, index in (("prompt", self.prompt), ("pos", self.pos)):
            if index is None:
                continue
            integers = not (index.is_floating_point() or index.is_complex())
            if index.shape != (self.n,) or not integers or index.dtype == torch.bool:
                raise ValueError(
                    f"{name} is {_shown(index)}; expected {self.n} integers, one per row of x."
                )
            object.__setattr__(self, name, index.to(self.device))

    @property
    def prompts(self) -> list[int]:
        """The numbers of the prompts with rows here, ascending; ValueError if none were kept."""
        return self._index("prompt").unique().tolist()

    def for_prompt(self, prompt: int) -> "LowRankGradient":
        """One prompt's part of the gradient; ValueError if it has no rows."""
        return self._rows_where("prompt", prompt)

    def at(self, pos: int) -> "LowRankGradient":
        """One token position's part, over all prompts; ValueError if it has no rows."""
        return self._rows_where("pos", pos)

    def split(self) -> "list[LowRankGradient]":
        """One gradient per prompt, in the order of `prompts`; their sum is this gradient.

        Raises ValueError if no prompt numbers were kept.

        >>> g = LowRankGradient(torch.ones(3, 8), torch.ones(3, 7), prompt=torch.tensor([0, 0, 1]))
        >>> [part.n for part in g.split()]
        [2, 1]
        """
        return [self.for_prompt(prompt) for prompt in self.prompts]

    def _index(self, name: str) -> Int[Tensor, " n"]:
        index = getattr(self, name)
        if index is None:
            raise ValueError(
                f"this gradient does not say which {name} its rows came from; expected "
                f"LowRankGradient(x, delta, {name}=...), one integer per row."
            )
        return index

    def _rows_where(self, name: str, value: int) -> "LowRankGradient":
        index = self._index(name)
        rows = (index == value).nonzero().flatten()
        if not len(rows):
            known = index.unique().tolist()
            shown = known if len(known) <= 8 else [*known[:4], "...", *known[-2:]]
            raise ValueError(f"no row has {name} {value}; expected one of {shown}.")
        parts = (None if part is None else part[rows] for part in (self.prompt, self.pos))
        return LowRankGradient(self.x[rows], self.delta[rows], *parts)


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _tensor(v: Any, device: torch.device) -> Any:
    """An array of numpy as a tensor; anything else as it is."""
    return torch.as_tensor(v, device=device) if isinstance(v, np.ndarray) else v


def _double(tensor: Tensor) -> Float64[Tensor, "..."]:
    # On Apple's GPUs there is no float64.
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def _contract(x: Float[Tensor, "n ..."], delta: Float[Tensor, "n ..."]) -> Float[Tensor, "..."]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.tensordot(x.to(wide).movedim(0, -1), delta.to(wide), dims=1).to(x.dtype)


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
