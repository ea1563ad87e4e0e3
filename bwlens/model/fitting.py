"""Which scale and soft cap make a model's logits of norm(v) W_U: fitted to them."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

_MOST = 20_000
"""Logits that a fit looks at; all of them are compared with what it gives."""


@dataclass(frozen=True)
class Reading:
    """`logits = cap(scale * s + bias_scale * b_U)`, with `s = norm(v) W_U`."""

    scale: float = 1.0
    bias_scale: float | None = None
    """None where the bias is scaled as all is."""
    soft_cap: float | None = None

    def __call__(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """The logits of scores [n, d_vocab]."""
        logits = self.scale * scores
        if bias is not None:
            logits = logits + (self.scale if self.bias_scale is None else self.bias_scale) * bias
        return logits if self.soft_cap is None else self.soft_cap * (logits / self.soft_cap).tanh()

    def of_bias(self, bias: Tensor) -> Tensor:
        """The bias that gives these logits once it is added before the scale."""
        return bias if self.bias_scale is None else bias * (self.bias_scale / self.scale)


def reading_error(
    reading: Reading,
    scores: Float[Tensor, "n d_vocab"],
    bias: Float[Tensor, " d_vocab"] | None,
    logits: Float[Tensor, "n d_vocab"],
) -> float:
    """How far a reading is from the logits, as a share of their spread over the vocabulary.

    The worst row counts, so that one token's own way is no average.
    """
    spread = (logits - logits.mean(1, keepdim=True)).norm(dim=1)
    off = (reading(scores, bias) - logits).norm(dim=1)
    worst = (off / spread.clamp_min(1e-30)).max()
    return float(worst) if torch.isfinite(worst) else float("inf")


def rounding_of(logits: Float[Tensor, "n d_vocab"], dtype: torch.dtype) -> float:
    """How far rounding to a dtype may take logits apart, as a share of their spread."""
    spread = (logits - logits.mean(1, keepdim=True)).norm(dim=1).clamp_min(1e-30)
    return max(1e-4, torch.finfo(dtype).eps * float((logits.norm(dim=1) / spread).max()))


def fit_reading(
    scores: Float[Tensor, "n d_vocab"],
    bias: Float[Tensor, " d_vocab"] | None,
    logits: Float[Tensor, "n d_vocab"],
    declared: Reading,
    tolerance: float,
) -> tuple[Reading, float]:
    """The simplest reading that gives the logits as well as any, and its error; all in float64.

    What the config declares comes first, then the bare unembedding, a scale, a scale and a cap. A
    simpler one counts only where the next is no closer: half precision hides much.
    """
    if not torch.isfinite(logits).all() or not torch.isfinite(scores).all():
        return declared, float("inf")
    some = logits.numel() // _MOST + 1
    fewer = (scores.flatten()[::some], logits.flatten()[::some])
    beside = None if bias is None or not bias.any() else bias.expand_as(scores).flatten()[::some]
    digits = 7 if tolerance < 1e-3 else 4 if tolerance < 4e-3 else 3

    def tried(*readings: Reading) -> list[tuple[Reading, float]]:
        return [(reading, reading_error(reading, scores, bias, logits)) for reading in readings]

    found = tried(declared, Reading())
    for cap in {declared.soft_cap, None}:
        if cap is None or bool((fewer[1].abs() < cap).all()):
            found += tried(_rounded(_scaled(*fewer, beside, cap), digits))
    if min(error for _, error in found) > tolerance:
        found += tried(_rounded(_capped(*fewer, beside), digits))
    best = min(error for _, error in found)
    return next((r, e) for r, e in found if e <= 1.2 * best + 0.02 * tolerance)


def _scaled(scores: Tensor, logits: Tensor, bias: Tensor | None, cap: float | None) -> Reading:
    """Least squares for the scale, and the bias' own, under a cap that is known."""
    straight = logits if cap is None else cap * (logits / cap).atanh()
    columns = [scores] if bias is None else [scores, bias]
    found = torch.linalg.lstsq(torch.stack(columns, 1), straight[:, None]).solution[:, 0].tolist()
    return Reading(found[0], found[1] if bias is not None else None, cap)


def _capped(scores: Tensor, logits: Tensor, bias: Tensor | None) -> Reading:
    """The cap that leaves least between, by golden section on a grid's best stretch."""
    peak = float(logits.abs().max())

    def at(power: float) -> tuple[float, Reading]:
        reading = _scaled(scores, logits, bias, peak * (1 + 10**power))
        return float((reading(scores, bias) - logits).square().sum()), reading

    grid = [k / 4 for k in range(-24, 9)]
    best = min(grid, key=lambda power: at(power)[0])
    low, high = best - 0.25, best + 0.25
    for _ in range(40):
        third = (high - low) * 0.381966
        if at(low + third)[0] < at(high - third)[0]:
            high -= third
        else:
            low += third
    return at((low + high) / 2)[1]


def _rounded(reading: Reading, digits: int) -> Reading:
    """As many digits as a fit to rounded logits has, so that 1/16 is 0.0625."""

    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.{digits}g}")

    scale, bias_scale, cap = short(reading.scale), short(reading.bias_scale), reading.soft_cap
    same = bias_scale is None or scale is None or abs(bias_scale - scale) < 1e-4 * abs(scale)
    return replace(
        reading,
        scale=scale or 1.0,
        bias_scale=None if same else bias_scale,
        soft_cap=None if cap is None else float(f"{cap:.4g}"),
    )
