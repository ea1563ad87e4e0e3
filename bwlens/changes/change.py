"""A change of a model's weights that one can hold, apply, undo, add and ship.

An editing method computes it without touching the model; nothing happens until it is applied.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bwlens.gradient.low_rank import LowRankGradient
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.locking import alone_with, for_this_thread
from bwlens.model.places import SHARED
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site, as_site
from bwlens.model.weights import Weight, copy_of, weights_of
from bwlens.runs.tensors import read_tensors, write_tensors


@dataclass(frozen=True, eq=False, repr=False)
class WeightChange(Mapping[Site, LowRankMatrix]):
    """What is added to each weight of a model: W <- W + x^T delta, W as [d_in, d_out].

    `change["W_out", 5]` is the part of one matrix, a `LowRankMatrix`: rows x [r, d_in] and delta
    [r, d_out] whose outer products sum to the change, with the sign they are added with. Iterating
    gives `Site`s. No site at all is a change of nothing.

    Changes add up, `a + b`, `a - b`, `2 * c`, `-c`; they belong to no model and fit any that has
    matrices of these shapes, on any device and in any dtype.

    Args:
        parts: The change of each matrix, by `Site` or `("W_out", 5)`.
        note: What there is to say about it: an edit left out as the model knew it already.
        details: How it was made (method, layer, step, passes), as far as JSON can hold it.

    Raises:
        ValueError: A part is not finite, or a layer is counted from the end.

    Example:
        >>> rows = LowRankMatrix(torch.ones(1, 768), torch.ones(1, 192))
        >>> change = WeightChange({("W_out", 5): rows})
        >>> change + change
        WeightChange(W_out of layer 5; 2 rows, norm 768)
        >>> with change.applied(model):  # doctest: +SKIP
        ...     print(model.generate("Lionel Messi plays for"))
    """

    parts: Mapping[Any, LowRankMatrix] = field(default_factory=dict)
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = {as_site(key): part for key, part in self.parts.items()}
        for site, part in parts.items():
            if site.layer < 0:
                raise ValueError(
                    f"{site}: a change belongs to no model, so layers are counted from 0, not from"
                    f" the end"
                )
            if not (torch.isfinite(part.x).all() and torch.isfinite(part.delta).all()):
                raise ValueError(
                    f"the change of {site} holds nan or inf; nothing was applied. The step was too"
                    f" large, or a tensor overflowed: take a smaller step, or a wider dtype"
                )
        object.__setattr__(self, "parts", {site: parts[site] for site in sorted(parts, key=_order)})
        object.__setattr__(self, "details", dict(self.details))

    # A mapping.

    def __getitem__(self, key: Any) -> LowRankMatrix:
        site = as_site(key)
        if site not in self.parts:
            has = ", ".join(map(str, self.parts)) or "nothing"
            raise KeyError(f"{site} is not changed here; this changes {has}")
        return self.parts[site]

    def __contains__(self, key: object) -> bool:
        try:
            return as_site(key) in self.parts
        except KeyError:
            return False

    def __iter__(self) -> Iterator[Site]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __repr__(self) -> str:
        said = f"; {self.note}" if self.note else ""
        if not self.parts:
            return f"WeightChange(nothing{said})"
        rows = sum(part.n for part in self.parts.values())
        return (
            f"WeightChange({_places(self.parts)}; {rows} row{'s' * (rows != 1)},"
            f" norm {self.norm():.4g}{said})"
        )

    # On a model.

    def apply(self, model: LensModel) -> None:
        """Add the change to the model's weights, in place, until `undo`.

        Sums are taken in float32 at least and rounded once. Copies of the matrices are kept aside,
        so that `undo` puts back every bit.

        Raises:
            ValueError: The model lacks a matrix, has it in another shape, overflows with the
                change, or has this very change applied (to add it twice, apply `2 * change`).
                Nothing is changed then.
            NotImplementedError: A weight that cannot be changed alone, see `weight_of`.
        """
        history = _history(model)
        with alone_with(model):
            if any(record.change is self for record in history):
                raise ValueError(
                    "this change is applied to this model already; undo it first, or apply"
                    " 2 * change to add it twice"
                )
            weights = self._weights_in(model)
            record = _Record(self, {site: weight.live.clone() for site, weight in weights.items()})
            try:
                for site, weight in weights.items():
                    weight.write(_sum(weight, self.parts[site]))
            except BaseException:
                record.restore(weights)
                raise
            history.append(record)

    def undo(self, model: LensModel) -> None:
        """Put back the matrices as they were at `apply`, bit for bit, whatever changed them since.

        Changes that meet in a matrix are undone in reverse order only.

        Raises:
            ValueError: This change is not applied to this model, or a later one changed the same
                matrix and has to be undone first.
        """
        history = _history(model)
        with alone_with(model):
            places = [i for i, record in enumerate(history) if record.change is self]
            if not places:
                raise ValueError("this change is not applied to this model: there is none to undo")
            for later in history[places[0] + 1 :]:
                if common := [site for site in self.parts if site in later.saved]:
                    raise ValueError(
                        f"another change of {common[0]} was applied after this one; undo that"
                        f" first: {later.change!r}"
                    )
            history[places[0]].restore(weights_of(model, self.parts))
            del history[places[0]]

    @contextmanager
    def applied(self, model: LensModel) -> Iterator[None]:
        """The model with the change within, as it was after, also after an exception.

        Raises:
            ValueError: As `apply` and `undo` do.

        Example:
            >>> with change.applied(model):  # doctest: +SKIP
            ...     logits = model("Lionel Messi plays for")
        """
        _history(model)
        with for_this_thread(model):
            self.apply(model)
            try:
                yield
            finally:
                self.undo(model)

    def edited(self, model: LensModel) -> Any:
        """A copy of the model with the change, which may be undone in it; no storage is shared.

        Raises:
            ValueError: As `apply` does.
        """
        if any(record.change is self for record in _history(model)):
            raise ValueError("this change is applied to this model already; undo it first")
        self._weights_in(model)
        twin = copy_of(model)
        self.apply(twin)
        return twin

    def _weights_in(self, model: LensModel) -> dict[Site, Weight]:
        """The weights of the model that this changes, all of them fit to be."""
        weights = weights_of(model, self.parts)
        for site, weight in weights.items():
            if weight.shape != self.parts[site].shape:
                raise ValueError(
                    f"{site} is {list(weight.shape)} in this model, but the change of it"
                    f" {list(self.parts[site].shape)}; it was made for another model"
                )
        return weights

    # Size.

    def norm(self, site: Any = None) -> float:
        """The Frobenius norm of one matrix's change, or of all together (root of the squares' sum).

        Raises:
            KeyError: That matrix is not changed.
        """
        if site is not None:
            return float(self[site].norm())
        return math.sqrt(sum(float(part.norm()) ** 2 for part in self.parts.values()))

    def compress(self, rtol: float | None = None) -> WeightChange:
        """The same change in as few rows as its rank, see `LowRankMatrix.compress`."""
        parts = {site: part.compress(rtol) for site, part in self.parts.items()}
        return WeightChange(parts, self.note, self.details)

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> WeightChange:
        """The same change with its factors elsewhere, or in another dtype."""
        parts = {site: part.to(device, dtype) for site, part in self.parts.items()}
        return WeightChange(parts, self.note, self.details)

    # Sums and multiples.

    def __add__(self, other: WeightChange) -> WeightChange:
        if not isinstance(other, WeightChange):
            return NotImplemented
        parts = dict(self.parts)
        for site, part in other.parts.items():
            if (mine := parts.get(site)) is None:
                parts[site] = part
            elif mine.shape != part.shape:
                raise ValueError(
                    f"{site}: a change of a {list(mine.shape)} matrix and one of a"
                    f" {list(part.shape)} matrix do not add up; they are for different models"
                )
            else:
                parts[site] = mine + part.to(mine.device)
        notes = dict.fromkeys(note for note in (self.note, other.note) if note)
        return WeightChange(parts, "; ".join(notes))

    def __radd__(self, other: int) -> WeightChange:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # for sum()

    def __sub__(self, other: WeightChange) -> WeightChange:
        return self + -other if isinstance(other, WeightChange) else NotImplemented

    def __neg__(self) -> WeightChange:
        return self * -1

    def __mul__(self, scalar: float | int) -> WeightChange:
        if isinstance(scalar, WeightChange | str):
            return NotImplemented
        return WeightChange({site: part * scalar for site, part in self.parts.items()}, self.note)

    __rmul__ = __mul__

    # On disk.

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the change to a safetensors file; replaced whole or not at all.

        Raises:
            ValueError: There is no such folder.
        """
        tensors = {
            f"{_key(site)}.{name}": rows
            for site, part in self.parts.items()
            for name, rows in vars(part).items()
            if rows is not None
        }
        about = {"note": self.note, "details": json.dumps(self.details, default=str)}
        return write_tensors(path, tensors, "WeightChange", about)

    def save_pretrained(self, model: LensModel, folder: str | os.PathLike[str]) -> Path:
        """Write the model with this change as a folder that Hugging Face's `from_pretrained` reads.

        Weights (with those changes applied already), configuration and tokenizer. The model is left
        as it was; takes as much memory as a model of that class.

        Args:
            model: A raw TransformerBridge.
            folder: A new or empty folder, in one that exists.

        Raises:
            ValueError: As `apply` does, or the folder holds something already.
            NotImplementedError: A HookedTransformer or a bridge with processed weights, or one
                whose weights do not make the same model without it: said with nothing written.

        Example:
            >>> folder = change.save_pretrained(model, "edited")  # doctest: +SKIP
            >>> AutoModelForCausalLM.from_pretrained(folder)  # doctest: +SKIP
        """
        from bwlens.changes import export

        folder = export.check_exportable(model, folder)
        made = export.Export(model, self._weights_in(model))
        with self.applied(model):
            made.write(folder)
        return folder

    @staticmethod
    def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> WeightChange:
        """Read what `save` wrote.

        Raises:
            ValueError: Another kind of file, or of another version.
            FileNotFoundError: There is none.
        """
        tensors, about = read_tensors(path, "WeightChange", "WeightChange.save", device)
        rows: dict[Site, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            stem, _, name = key.rpartition(".")
            rows.setdefault(_site(stem), {})[name] = tensor
        parts = {  # steps along a gradient say where their rows came from
            site: (LowRankMatrix if of.keys() == {"x", "delta"} else LowRankGradient)(**of)
            for site, of in rows.items()
        }
        return WeightChange(parts, about.get("note", ""), json.loads(about.get("details", "{}")))


@dataclass(frozen=True, eq=False)
class _Record:
    """A change that is applied to a model, and the matrices as they were before."""

    change: WeightChange
    saved: dict[Site, Tensor]

    @torch.no_grad()
    def restore(self, weights: Mapping[Site, Weight]) -> None:
        for site, weight in weights.items():
            weight.live.copy_(self.saved[site])


_HISTORIES: WeakKeyDictionary[nn.Module, list[_Record]] = WeakKeyDictionary()
"""What is applied to each living model, in order; models are compared by identity."""


def _history(model: LensModel) -> list[_Record]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a TransformerLens model, found {type(model).__name__}")
    return _HISTORIES.setdefault(model, [])


def _sum(weight: Weight, part: LowRankMatrix) -> Tensor:
    """The weight with its change, in its dtype; finite."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, part.dtype), torch.float32)
    total = weight.plus(part.to(weight.device, wide).dense())
    # A finite sum has finite terms, and is quick; finite terms may have another.
    if not torch.isfinite(total.sum()) and not torch.isfinite(total).all():
        raise ValueError(
            f"{weight.site} would hold nan or inf in {weight.dtype} with this change, so nothing"
            f" was applied; take a smaller step, or load the model in a wider dtype"
        )
    return total


def _order(site: Site) -> tuple[int, str, int]:
    return site.layer, site.matrix, site.expert_number


def _places(parts: Mapping[Site, LowRankMatrix]) -> str:
    """Which matrices of which layers, in a few words."""
    if len(parts) == 1:
        return str(next(iter(parts)))
    layers = sorted({site.layer for site in parts})
    where = (
        f"layer {layers[0]}"
        if len(layers) == 1
        else f"layers {layers[0]}-{layers[-1]}"
        if layers == list(range(layers[0], layers[-1] + 1))
        else f"layers {', '.join(map(str, layers))}"
    )
    return f"{', '.join(dict.fromkeys(site.matrix for site in parts))} of {where}"


def _key(site: Site) -> str:
    expert = "" if site.expert is None else f".{site.expert}"
    return f"{site.matrix}.{site.layer}{expert}"


def _site(key: str) -> Site:
    matrix, *numbers = key.split(".")
    return Site(matrix, *(n if n == SHARED else int(n) for n in numbers))  # pyright: ignore
