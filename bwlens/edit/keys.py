"""One forward pass without gradients: what enters and leaves chosen weights at chosen tokens.

What enters W_out (or W_O) at a token is the *key* under which editing methods write a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from bwlens.model.flows import Flow, as_rows
from bwlens.model.passes import Addition, Passed, run, wide
from bwlens.model.prompts import Batch, Edit, make_batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Point, Site, Tap, plain_taps
from bwlens.model.tokens import subject_positions

Position = Literal["last", "subject"]
"""Which token of a prompt holds the key: the prompt's last one, or the subject's last one."""

PREFIXES = ("People say that", "Once upon a time, there was.")
"""Contexts that say nothing of any subject, tuned on the demo model's even records."""


def keys_of(
    model: LensModel, batch: Batch, matrices: Sequence[str] | str, layers: Layers = None
) -> dict[Site, Float[Tensor, "batch pos d_in"]]:
    """What enters each weight, in one forward pass without gradients; no word is predicted.

    Raises:
        ValueError: Unknown matrices or layers.
        NotImplementedError: A mixture of experts, whose tokens go to different weights.
    """
    taps = key_taps(model, matrices, layers)
    top = model.blocks[max(tap.site.layer for tap in taps)]
    passed = run(model, batch.tokens, taps=taps, until=top)
    shape = batch.tokens.shape
    return {flow.parts[0][0]: wide(as_rows(flow.x)).unflatten(0, shape) for flow in passed.flows}


def norm_entries(model: LensModel, layers: Iterable[int]) -> dict[int, list[Point]]:
    """Where each layer's norms take their input."""
    entries: dict[int, list[Point]] = {}
    for layer in layers:
        block = model.blocks[layer]
        here = [getattr(block, name, None) for name in ("ln1", "ln1_post", "ln2", "ln2_post")]
        norms = dict.fromkeys(norm for norm in here if isinstance(norm, nn.Module))
        entries[layer] = [Point(norm, "input", "hidden_states") for norm in norms]
    return entries


def norm_after(entries: Sequence[Point], passed: Passed, flows: Sequence[Flow]) -> nn.Module | None:
    """The norm that takes what left a weight; a norm of the stream takes something else."""
    for point in reversed(entries):
        for entered in passed.seen.get(point, [])[:1]:
            if any(torch.equal(entered.flatten(), flow.z.flatten()) for flow in flows):
                return point.module
    return None


def key_taps(model: LensModel, matrices: Sequence[str] | str, layers: Layers = None) -> list[Tap]:
    """The taps of weights whose input is a key: those that every token passes.

    Raises:
        NotImplementedError: A mixture of experts.
    """
    why = (
        "keys and their statistics are those of a weight that every token passes."
        " forward_pass_shift edits mixtures, and W_O is no part of one"
    )
    return plain_taps(model, matrices, layers, why)


def shift_of(
    tap: Tap, batch: Batch, rows: Int[Tensor, " n"], delta: Float[Tensor, "n d_out"]
) -> Addition:
    """What adds `delta` to what leaves a weight, at these rows of the flattened batch."""
    added = delta.new_zeros(batch.tokens.numel(), delta.shape[1])
    return Addition(tap.z, added.index_add(0, rows.to(delta.device), delta), name=str(tap.site))


@dataclass(frozen=True, eq=False)
class Contexts:
    """An edit's prompt behind several prefixes, in one batch, edit by edit.

    Attributes:
        batch: The prompts, with the edits' targets.
        positions: Where each prompt's key stands.
        n: Number of contexts of each edit.
    """

    batch: Batch
    positions: tuple[int, ...]
    n: int

    @property
    def rows(self) -> Int[Tensor, " batch"]:
        """The keys' rows of the flattened batch."""
        n_pos = self.batch.tokens.shape[1]
        return torch.tensor([i * n_pos + p for i, p in enumerate(self.positions)])

    def by_edit(self, rows: Tensor) -> Tensor:
        """Rows of the batch, by edit and context."""
        return rearrange(rows, "(edits n) ... -> edits n ...", n=self.n)

    def at(self, values: Float[Tensor, "batch pos d"]) -> Float[Tensor, "edits n d"]:
        """The values at the keys' positions, by edit and context."""
        rows = self.by_edit(self.rows)
        return rearrange(values, "batch pos d -> (batch pos) d")[rows.to(values.device)]


def contexts_of(
    model: LensModel,
    edits: Sequence[Edit],
    prefixes: Sequence[str],
    position: Position,
    prepend_bos: bool | None,
    targets: bool = True,
) -> Contexts:
    """Each edit's prompt by itself and behind each of the prefixes, which end it with a space."""
    check_position(position)
    texts = [joined(prefix, edit.text) for edit in edits for prefix in ("", *prefixes)]
    owners = [edit for edit in edits for _ in ("", *prefixes)]
    wanted = [edit.target_new for edit in owners] if targets else None
    batch = make_batch(model, texts, wanted, prepend_bos=prepend_bos)
    if position == "last":
        positions = batch.last.tolist()
    else:
        positions = [
            positions_in(model, text, edit, prepend_bos)[-1]
            for text, edit in zip(texts, owners, strict=True)
        ]
    return Contexts(batch, tuple(positions), 1 + len(prefixes))


def check_position(position: str) -> None:
    """Refuse what is no `Position`.

    Raises:
        ValueError: Neither "last" nor "subject".
    """
    if position not in ("last", "subject"):
        raise ValueError(f"position must be 'last' or 'subject', found {position!r}")


def positions_in(
    model: LensModel, text: str, edit: Edit, prepend_bos: bool | None = None
) -> tuple[int, ...]:
    """Where the subject's tokens stand in a text that ends with the edit's prompt."""
    start = len(text) - len(edit.text) + edit.start
    return subject_positions(model, text, edit.subject, prepend_bos, start)


def joined(prefix: str, text: str) -> str:
    """A text behind a prefix, with one space between."""
    return f"{prefix.rstrip()} {text}" if prefix.strip() else text
