"""What is kept of many gradients in little memory: a sketch of each, and of their sum.

The sum G of all gradients of a matrix is kept as Y = G A and Z = B G with random A and B, out of
which its best rows come (Tropp et al., SIAM J. Matrix Anal. 2017, algorithm 4). An example's own
gradient x^T delta is kept as (x P)^T (delta Q), P and Q random with k = `SKETCH` columns. The inner
product of two such sketches is right on average; its standard deviation is at most
||g|| ||h|| sqrt((1 + 2/k)^2 - 1) for each matrix, mostly about ||g|| ||h|| / sqrt(k), and averages
out over matrices. `explain` needs no sketch: its inner products are exact.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves functions untyped.)

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bwlens.gradient.capturing import Gradients
from bwlens.model.sites import Site
from bwlens.runs.tensors import read_tensors, write_tensors

SKETCH = 24
"""Columns of the projections that keep an example's gradient."""

RANK = 16
"""Rows of the sum that come out of its sketch."""

SUM = "sum.safetensors"


def _seed(site: Site, what: str) -> torch.Generator:
    digest = hashlib.sha256(json.dumps([str(site), what]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))


def sketching(site: Site, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """P [d_in, k] and Q [d_out, k] of a site's gradients, the same in every run."""
    P = torch.randn(d_in, SKETCH, generator=_seed(site, "P")) / SKETCH**0.5
    return P, torch.randn(d_out, SKETCH, generator=_seed(site, "Q")) / SKETCH**0.5


def projections(site: Site, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """A [d_out, r + 8] and B [2 (r + 8), d_in] of the sum's sketch."""
    k = min(RANK + 8, d_in, d_out)
    A = torch.randn(d_out, k, generator=_seed(site, "A"))
    return A, torch.randn(min(2 * k, d_in), d_in, generator=_seed(site, "B"))


def widths(state: dict[str, Tensor], i: int) -> tuple[int, int]:
    """(d_in, d_out) of the matrix at a place of the sum's sketch."""
    return state[f"Y{i}"].shape[0], state[f"Z{i}"].shape[1]


class Summing:
    """The sum's sketch on the disk, with the parts that are in it."""

    def __init__(self, path: Path, sites: Sequence[Site]) -> None:
        self._path, self._sites = path, sites
        self._state: dict[str, Tensor] = {}
        self._parts: list[int] = []
        if path.exists():
            self._state, about = read_tensors(path, "DatasetSum", "read_dataset")
            self._parts = json.loads(about["parts"])

    def add(self, part: int, grads: Gradients) -> None:
        """Add a batch of a part, unless the sum has that part already."""
        if part in self._parts:
            return
        for i, site in enumerate(self._sites):
            x, delta = grads[site].x.cpu().float(), grads[site].delta.cpu().float()
            A, B = projections(site, x.shape[1], delta.shape[1])
            for name, new in ((f"Y{i}", x.T @ (delta @ A)), (f"Z{i}", (B @ x.T) @ delta)):
                self._state[name] = self._state[name] + new if name in self._state else new

    def save(self, part: int) -> None:
        """Write the sum, now with this part; replaced whole or not at all."""
        if part not in self._parts:
            self._parts.append(part)
            about = {"parts": json.dumps(self._parts)}
            write_tensors(self._path, self._state, "DatasetSum", about)
