"""One forward pass without gradients: what enters and leaves chosen weights at chosen tokens.

What enters W_out (or W_O) at a token is the *key* under which editing methods write a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bwlens.model.passes import as_rows, flows_of, recording
from bwlens.model.prompts import Batch, Edit, make_batch
from bwlens.model.sites import Point, Site, Tap, plain_taps
from bwlens.model.tokens import subject_positions

Token = Literal["subject_last", "last"]
"""Which token of a prompt holds the key: the subject's last one, or the prompt's last one."""


@dataclass(frozen=True, eq=False)
class Passed:
    """What one forward pass showed.

    Attributes:
        logits: [batch, pos, d_vocab].
        final: What enters the final norm [batch, pos, d_model].
        x: What enters each weight [batch, pos, d_in].
        z: What leaves it [batch, pos, d_out].
        norms: The norm that takes what leaves it, where one stands before the stream (Gemma 2).
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    final: Float[Tensor, "batch pos d_model"] | None
    x: dict[Site, Tensor]
    z: dict[Site, Tensor]
    norms: dict[Site, nn.Module]


def run(
    model: Any, batch: Batch, matrices: Sequence[str], layers: Iterable[int] | int | None = None
) -> Passed:
    """One forward pass of a batch, in eval mode and without gradients.

    Raises:
        ValueError: Unknown matrices or layers.
        NotImplementedError: A mixture of experts, whose tokens go to different weights.
    """
    taps = key_taps(model, matrices, layers)
    points = {point for tap in taps for point in (*tap.x, *tap.z)}
    norm = getattr(model, "ln_final", None)
    end = None if norm is None else Point(norm, "input", "hidden_states")
    entries = _norm_entries(model, sorted({tap.site.layer for tap in taps}))
    points |= {point for entry in entries.values() for point in entry}
    with recording(model, points | ({end} if end else set())) as seen, torch.no_grad():
        logits = model(batch.tokens, return_type="logits", padding_side="right")
        flows = [flow for tap in taps for flow in flows_of(tap, seen, None, batch)]
    shape = batch.tokens.shape
    x = {flow.parts[0][0]: _wide(as_rows(flow.x)).unflatten(0, shape) for flow in flows}
    z = {flow.parts[0][0]: _wide(as_rows(flow.z)).unflatten(0, shape) for flow in flows}
    final = _wide(seen[end][0]) if end and end in seen else None
    norms = {}
    for flow in flows:
        site = flow.parts[0][0]
        for entry in entries[site.layer]:
            entered = seen[entry][0] if entry in seen else None
            # A norm of the stream takes something else.
            if entered is not None and _same(entered, flow.z):
                norms[site] = entry.module
    return Passed(_wide(logits), final, x, z, norms)


def key_taps(
    model: Any, matrices: Sequence[str], layers: Iterable[int] | int | None = None
) -> list[Tap]:
    """The taps of weights whose input is a key: those that every token passes.

    Raises:
        NotImplementedError: A mixture of experts.
    """
    why = (
        "keys and their statistics are those of a weight that every token passes."
        " forward_pass_shift edits mixtures, and W_O is no part of one"
    )
    return plain_taps(model, matrices, layers, why)


@contextmanager
def moved(
    model: Any, site: Site, rows: Int[Tensor, " n"], delta: Float[Tensor, "n d_out"]
) -> Iterator[None]:
    """Add `delta` to what leaves a weight, at these rows of the flattened batch."""
    tap = key_taps(model, [site.matrix], site.layer)[0]

    def add(module: Any, args: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        flat = whole.flatten(0, -2)
        changed = flat.index_add(0, rows.to(flat.device), delta.to(flat)).view_as(whole)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = tap.z[0].module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


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

    def at(
        self, values: Float[Tensor, "batch pos d"], after: Sequence[tuple[int, int]] | None = None
    ) -> Float[Tensor, "edits n d"]:
        """The values at the keys' positions, by edit and context.

        With `after`, pairs of an edit and how many tokens further on: those positions instead.
        """
        kept = values.flatten(0, 1)[self.rows.to(values.device)].unflatten(0, (-1, self.n))
        if after is None:
            return kept
        rows = self.rows.unflatten(0, (-1, self.n))
        further = torch.stack([rows[edit] + steps for edit, steps in after])
        return values.flatten(0, 1)[further.to(values.device)]


def contexts_of(
    model: Any,
    edits: Sequence[Edit],
    prefixes: Sequence[str],
    token: Token,
    prepend_bos: bool | None,
    targets: bool = True,
) -> Contexts:
    """Each edit's prompt by itself and behind each of the prefixes, which end it with a space."""
    check_token(token)
    texts = [joined(prefix, edit.text) for edit in edits for prefix in ("", *prefixes)]
    owners = [edit for edit in edits for _ in ("", *prefixes)]
    wanted = [edit.target_new for edit in owners] if targets else None
    batch = make_batch(model, texts, wanted, prepend_bos=prepend_bos)
    if token == "last":
        positions = batch.last.tolist()
    else:
        positions = [
            positions_in(model, text, edit, prepend_bos)[-1]
            for text, edit in zip(texts, owners, strict=True)
        ]
    return Contexts(batch, tuple(positions), 1 + len(prefixes))


def check_token(token: str) -> None:
    """Refuse what is no `Token`.

    Raises:
        ValueError: Neither "subject_last" nor "last".
    """
    if token not in ("subject_last", "last"):
        raise ValueError(f"token must be 'subject_last' or 'last', found {token!r}")


def positions_in(
    model: Any, text: str, edit: Edit, prepend_bos: bool | None = None
) -> tuple[int, ...]:
    """Where the subject's tokens stand in a text that ends with the edit's prompt."""
    start = len(text) - len(edit.text) + edit.start
    return subject_positions(model, text, edit.subject, prepend_bos, start)


def joined(prefix: str, text: str) -> str:
    """A text behind a prefix, with one space between."""
    return f"{prefix.rstrip()} {text}" if prefix.strip() else text


def _norm_entries(model: Any, layers: list[int]) -> dict[int, list[Point]]:
    """Where each layer's norms take their input."""
    entries: dict[int, list[Point]] = {}
    for layer in layers:
        block = model.blocks[layer]
        held = [getattr(block, name, None) for name in ("ln1", "ln1_post", "ln2", "ln2_post")]
        norms = dict.fromkeys(norm for norm in held if isinstance(norm, nn.Module))
        entries[layer] = [Point(norm, "input", "hidden_states") for norm in norms]
    return entries


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
