"""Names of weight matrices, and the places where their x and z pass: plain data, no search.

A weight matrix W computes ``z = x W``; a `Tap` names the modules that hand over `x` (what enters W)
and `z` (what leaves it).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from dataclasses import dataclass
from functools import total_ordering
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

MATRICES = ("W_in", "W_gate", "W_out", "W_Q", "W_K", "W_V", "W_O")
"""Names of the weight matrices of a transformer block, TransformerLens' own."""

MLP, ATTENTION = MATRICES[:3], MATRICES[3:]

SHARED = "shared"
"""In a mixture, the expert that every token passes beside those it is sent to."""


@total_ordering
@dataclass(frozen=True)
class Site:
    """One weight matrix: its name, its layer (from 0) and, in a mixture, its expert.

    Experts are numbered from 0; the one that every token passes, where there is one, is "shared".
    """

    matrix: str
    layer: int
    expert: int | Literal["shared"] | None = None

    @property
    def expert_number(self) -> int:
        """The expert as a number, for tables: -1 where there is none, -2 for the shared one."""
        if self.expert is None:
            return -1
        return -2 if isinstance(self.expert, str) else self.expert

    def __lt__(self, other: Site) -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[str, int, int]:
        return self.matrix, self.layer, self.expert_number

    def __str__(self) -> str:
        expert = "" if self.expert is None else f", expert {self.expert}"
        if self.expert == SHARED:
            expert = ", shared expert"
        return f"{self.matrix} of layer {self.layer}{expert}"


def as_site(key: Any) -> Site:
    """A site from what stands in the brackets of `grads["W_in", 3]`, an expert last.

    Raises:
        KeyError: Neither a `Site` nor a matrix and a layer.
    """
    if isinstance(key, Site):
        return key
    if isinstance(key, tuple) and len(key) in (2, 3):
        return Site(*key)
    raise KeyError(f"{key!r} is no matrix and layer; write grads['W_in', 3], or a Site")


@dataclass(frozen=True)
class Point:
    """A tensor on its way: what goes into a module, or what comes out of it.

    An input is the positional argument at `index`, or the keyword argument `keyword` if given.
    A `branch` parts from its tensor here: its gradient is that of what follows this module, without
    the other ways that the same tensor goes (an MLP's input without the residual stream).
    """

    module: nn.Module
    side: Literal["input", "output"]
    keyword: str | None = None
    index: int = 0
    branch: bool = False

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The tensor itself, out of a forward call's arguments and result."""
        if self.side == "output":
            return output[0] if isinstance(output, tuple | list) else output
        key = self._key(args, kwargs)
        return args[key] if isinstance(key, int) else kwargs[key]

    def put(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward call's arguments with another tensor in the place of an input."""
        key = self._key(args, kwargs)
        if isinstance(key, int):
            return (*args[:key], tensor, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: tensor}

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
        """Which argument an input is."""
        if self.keyword is not None and self.keyword in kwargs:
            return self.keyword
        return self.index if args else next(iter(kwargs))


@dataclass(frozen=True, eq=False)
class Tap:
    """A site with the places its x and z may pass, the most exact first.

    Not every hook point fires in every mode, so there can be several candidates; the first that
    fires is used. In a mixture of experts, `routing` gives the experts chosen for each token
    [token, choice], and the rows of x are the tokens sent to this expert, by choice, then token.
    `holder` is the module that keeps the weight itself.

    Where a projection gives each head its query and then a gate of the same width, `gated_heads` is
    the number of heads, and the matrix has the columns of z that are queries; else it is 0.
    """

    site: Site
    x: tuple[Point, ...]
    z: tuple[Point, ...]
    holder: nn.Module
    routing: Point | None = None
    gated_heads: int = 0

    def columns(self, width: int) -> slice | Tensor:
        """Which of the columns that leave the projection are the matrix's own."""
        if not self.gated_heads:
            return slice(None)
        by_head = "(head half d_head) -> half (head d_head)"
        return rearrange(torch.arange(width), by_head, head=self.gated_heads, half=2)[0]

    @property
    def matrices(self) -> tuple[str, ...]:
        """The one matrix that passes here."""
        return (self.site.matrix,)


@dataclass(frozen=True, eq=False)
class ExpertTap:
    """The experts of one layer that keep their weights in batched 3-D parameters.

    No hook point sees them: `experts` multiplies slices of `weights` in a loop. `weights` maps the
    name of a parameter to the matrices its slices hold, in the order of their output columns.
    """

    layer: int
    experts: Any
    weights: dict[str, tuple[str, ...]]

    @property
    def routing(self) -> Point:
        """Where the experts chosen for each token pass: [token, choice]."""
        return Point(self.experts, "input", "top_k_index", 1)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices that pass here."""
        return tuple(matrix for matrices in self.weights.values() for matrix in matrices)
