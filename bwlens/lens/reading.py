"""The words of a prompt's cells, by one reading or another."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from bwlens.gradient.capturing import Gradients
from bwlens.gradient.objectives import Objective
from bwlens.lens.rows import READ_THROUGH, parts_of, stream_rows
from bwlens.model.replay import Replay
from bwlens.model.sites import Site
from bwlens.reading.effect import EffectOf, tempered
from bwlens.reading.readouts import Readout, readout, readout_of_scores
from bwlens.reading.standardised import head_by
from bwlens.reading.transported import transported
from bwlens.runs.parts import progress_bar

MOST_CELLS = 512

Positions = Literal["last", "subject"] | int | Iterable[int] | slice | None
"""Positions of a prompt's tokens, negative ones from its end."""


def resolve_positions(
    positions: Any, n_pos: int, subject: Sequence[int], last: int, name: str = "positions"
) -> tuple[int, ...] | None:
    """Positions from 0, ascending; None for all. `name` is the argument's, for messages.

    Raises:
        ValueError: Out of range, no position at all, or "subject" where none was named.
    """
    if positions is None:
        return None
    if positions == "last":
        return (last,)
    if isinstance(positions, str):
        if positions != "subject" or not subject:
            needs = ", and needs subject=... for 'subject'" if positions == "subject" else ""
            raise ValueError(
                f"{name} is {positions!r}; expected 'last', 'subject', numbers or a slice{needs}"
            )
        return tuple(subject)
    try:
        if isinstance(positions, slice):
            numbers = list(range(n_pos)[positions])
        else:
            several: Iterable[Any] = positions if isinstance(positions, Iterable) else [positions]
            numbers = [operator.index(one) for one in several]
    except TypeError:
        raise ValueError(f"{name} is {positions!r}; expected whole numbers") from None
    if not numbers or not all(-n_pos <= one < n_pos for one in numbers):
        raise ValueError(
            f"{name} is {positions!r}, but the prompt has the positions 0 to {n_pos - 1} (or"
            f" -{n_pos} to -1 from its end)"
        )
    return tuple(sorted({one % n_pos for one in numbers}))


@dataclass(frozen=True, eq=False)
class Reading:
    """What is to be read of one prompt's gradients.

    Attributes:
        model: The model.
        grads: The gradients of one prompt.
        objective: The loss they are gradients of.
        matrices: Which of them.
        layers: Which layers.
        positions: Which positions; None for all.
        top_k: How many words at each end.
        followed: Ids whose ranks are kept.
        imprint, temper, bias, jacobian: As for `backward_lens`.
        every: The prompt's pass, to be run again, where effects are measured.
    """

    model: Any
    grads: Gradients
    objective: Objective
    matrices: Sequence[str]
    layers: Sequence[int]
    positions: tuple[int, ...] | None
    top_k: int
    followed: Sequence[int]
    imprint: str
    temper: float
    bias: bool
    jacobian: Any
    every: Replay | None = None

    def by(self, reading: str) -> dict[str, Readout]:
        """The readout [layer, pos] of each matrix, by one reading."""
        return self._effects() if reading == "effect" else self._of_vectors(reading)

    def _of_vectors(self, reading: str) -> dict[str, Readout]:
        normalize = reading == "normalised"
        of_delta = head_by(self.model, reading, self.bias)
        of_x = head_by(self.model, self.imprint, self.bias)
        k = min(self.top_k, of_x.W_U.shape[1])
        n_pos = self.grads.batch.tokens.shape[1]
        chosen = None if self.positions is None else list(self.positions)
        read: dict[tuple[str, str], Readout] = {}
        for matrix in self.matrices:
            # W_in and W_gate (and W_Q, W_K, W_V) share their x: read it once.
            factor, key = READ_THROUGH[matrix], _shared(matrix)
            if key in read:
                continue
            every = (stream_rows(self.grads, matrix, layer, factor) for layer in self.layers)
            # Only what is read is copied: of a long prompt that is little.
            read_of = (r if chosen is None else r[chosen] for r in every)
            rows = torch.stack([r.to(of_x.W_U.device) for r in read_of])
            if factor == "delta" and reading == "transported":
                rows = transported(self.jacobian, self.layers, rows)
            words = readout(
                of_x if factor == "x" else of_delta, rows, k, list(self.followed),
                normalize=normalize,
            )  # fmt: skip
            read[key] = words if chosen is None else words.placed(chosen, n_pos)
        return {matrix: read[_shared(matrix)] for matrix in self.matrices}

    def affordable(self, subject: Sequence[int]) -> Reading:
        """This, or of too many cells for effects those of the subject and the last token."""
        n_pos = self.grads.batch.tokens.shape[1]
        cells = len(self.matrices) * len(self.layers) * n_pos
        if self.positions is not None or cells <= MOST_CELLS:
            return self
        last = int(self.grads.batch.last[0])
        warnings.warn(
            f"the effect of {cells} cells would take long: only the subject's and the last token"
            f" are read; name positions=... or layers=... for others",
            stacklevel=3,
        )
        return replace(self, positions=tuple(sorted({*subject[-1:], last})))

    def _effects(self) -> dict[str, Readout]:
        n_pos = self.grads.batch.tokens.shape[1]
        chosen = range(n_pos) if self.positions is None else self.positions
        task = EffectOf(self.model, self.grads, self.objective, self.every)
        found = {}
        total = len(self.matrices) * len(self.layers) * len(chosen)
        with progress_bar("effects", total, shown=total > 16) as advance:
            for matrix in self.matrices:
                cells = [
                    (self._site(matrix, layer), pos) for layer in self.layers for pos in chosen
                ]
                there = [i for i, (site, _) in enumerate(cells) if site in self.grads]
                effects = task.of([cells[i] for i in there], advance=advance)
                at = torch.tensor(
                    [self.layers.index(cells[i][0].layer) * n_pos + cells[i][1] for i in there]
                )
                scores = effects.scores
                if self.temper:
                    likely = torch.stack([task.probabilities_at(cells[i][1]) for i in there])
                    scores = tempered(scores, likely, self.temper)
                norms = torch.stack(
                    [self.grads[cells[i][0]].delta[cells[i][1]].norm().to(scores) for i in there]
                )
                found[matrix] = readout_of_scores(
                    scores,
                    norms,
                    ~effects.measured,
                    at.to(scores.device),
                    (len(self.layers), n_pos),
                    min(self.top_k, scores.shape[1]),
                    self.followed,
                )
        return found

    def _site(self, matrix: str, layer: int) -> Site:
        parts = parts_of(self.grads, matrix, layer)
        if any(site.expert is not None for site in parts):
            raise NotImplementedError(
                f"{matrix} of layer {layer} is a mixture of experts, where a token has a step of"
                f" its own in each expert; their effect is not read: name layers or matrices that"
                f" are none (W_O is no part of one), or take another reading"
            )
        return Site(matrix, layer)


def _shared(matrix: str) -> tuple[str, str]:
    return READ_THROUGH[matrix], "attn" if matrix[2:] in "QKVO" else "mlp"
