"""The road from a residual vector to the vocabulary: the model's own final norm and unembedding.

Configs name what a model does behind its unembedding (a scale, a soft cap) each in its own way, and
some name what it does not do. So it is measured on one short forward pass: a `Head` gives the
model's logits from its last stream to rounding, or there is none.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bwlens.model.fitting import Reading, fit_reading, rounding_of
from bwlens.model.places import Point
from bwlens.model.probing import logits_and, probe_batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import check_model, check_stream
from bwlens.model.unhooked import has_hooks, hooks_off

_TILE = 4096
"""Columns of W_U multiplied at a time."""


@dataclass(frozen=True, eq=False)
class Head:
    """The road from a residual vector to the vocabulary: final norm, unembedding, soft cap.

    `logits = cap(scale * (norm(v) W_U + b_U))`, with `cap(s) = soft_cap tanh(s / soft_cap)`.
    `norm` takes and gives [n, 1, d_model], without its user's hooks; `eps` is its own; `centred`
    says whether it subtracts the mean (LayerNorm). `error` is how far the model's own logits were
    from these, as a share of their spread over the vocabulary. Readings of other kinds take
    `centre` from each column of W_U, and divide each score by one of `lengths`.
    """

    norm: Callable[[Tensor], Tensor]
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"] | None
    soft_cap: float | None
    scale: float
    eps: float
    centred: bool
    error: float | None = None
    centre: Float[Tensor, " d_model"] | None = None
    lengths: Float[Tensor, " d_vocab"] | None = None


@dataclass(frozen=True)
class _Measured:
    """What was found out about a model, and the parts that it holds for."""

    parts: tuple[Any, ...]
    uses_norm: bool = True
    reading: Reading | None = None
    error: float = 0.0
    refusal: str = ""


_known: WeakKeyDictionary[Any, _Measured] = WeakKeyDictionary()


def head_of(model: LensModel) -> Head:
    """The model's own final norm and unembedding, and the scale and cap that it is seen to use.

    Measured by one forward pass of four tokens, again after the final norm or the unembedding was
    replaced. The user's hooks are off, there and whenever the head is used.

    Raises:
        TypeError: Not a TransformerLens model.
        NotImplementedError: The logits are not made of the last block's stream in this way (a
            projection, a prediction head or another norm stands between), with figures.
    """
    check_model(model)
    check_stream(model)
    W_U, b_U = model.unembed.W_U.detach(), model.unembed.b_U
    if W_U.is_meta:
        raise NotImplementedError(
            "the unembedding is not in memory (offloaded, or never loaded); load the model whole,"
            " without offloading to CPU or disk"
        )
    norm = getattr(model, "ln_final", None)
    parts = _parts(model, norm, W_U)
    measured = _known.get(model)
    if measured is None or measured.parts != parts:
        measured = _known[model] = _measure(model, norm, W_U, b_U, parts)
    if measured.reading is None:
        raise NotImplementedError(measured.refusal)
    if not measured.uses_norm:
        norm = None
    reading, call = measured.reading, _unhooked(norm)
    return Head(
        norm=call,
        W_U=W_U,
        b_U=None if b_U is None else reading.of_bias(b_U.detach()),
        soft_cap=reading.soft_cap,
        scale=reading.scale,
        eps=_eps_of(norm, model.cfg),
        centred=norm is not None and _is_centred(call, W_U),
        error=measured.error,
    )


def _parts(model: LensModel, norm: Any, W_U: Tensor) -> tuple[Any, ...]:
    """What a measurement holds for: other parts than these are measured anew."""
    modules = [norm, getattr(norm, "original_component", None), model.unembed]
    parts: list[Any] = [W_U.data_ptr(), tuple(W_U.shape), W_U.dtype, _declared(model)]
    for module in modules:
        if module is not None:
            parts += [ref(module), type(module), id(vars(module).get("forward"))]
    return tuple(parts)


def _declared(model: LensModel) -> Reading:
    """What the configs say: exact where true, and tried first; not all of it is."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    if not isinstance(cap, int | float) or cap <= 0:
        cap = getattr(config, "final_logit_softcapping", None)
    return Reading(soft_cap=float(cap) if isinstance(cap, int | float) and cap > 0 else None)


def _measure(model: LensModel, norm: Any, W_U: Tensor, b_U: Tensor | None, parts: Any) -> _Measured:
    """The reading that gives the model's own logits from the stream behind its last block."""
    stream_at = Point(model.blocks[-1], "output")
    norm_at = None if norm is None else Point(norm, "input")
    points = {stream_at} if norm_at is None else {stream_at, norm_at}
    logits, seen = logits_and(model, points, probe_batch(model).tokens)
    logits = logits.detach().flatten(0, -2).to("cpu", torch.float64)
    stream = stream_of(seen.get(stream_at))
    expected = (
        "expected cap(scale * (norm(v) W_U + b_U)), v what leaves the last block; the vocabulary's"
        " words cannot be read with this model's final norm and unembedding. bwlens.capture and the"
        " gradients' own algebra work without them"
    )
    refused = partial(_Measured, parts, True, None, 0.0)
    if stream is None:
        return refused(f"the last block ran out of bwlens' sight; {expected}")
    if not torch.isfinite(stream).all():
        return refused(
            f"the stream of the last block is not finite in {stream.dtype}; load the model in"
            f" float32 or bfloat16"
        )
    if stream.numel() // stream.shape[-1] != len(logits):
        return refused(
            f"the last block gives {list(stream.shape)} for {len(logits)} tokens: several residual"
            f" streams, or another layout than one vector a token; {expected}"
        )
    if stream.shape[-1] != W_U.shape[0] or logits.shape[-1] != W_U.shape[1]:
        return refused(
            f"the last block gives vectors of width {stream.shape[-1]} and the model"
            f" {logits.shape[-1]} logits, but its unembedding takes {W_U.shape[0]} and gives"
            f" {W_U.shape[1]}: a projection stands between; {expected}"
        )
    tolerance = rounding_of(logits, W_U.dtype)
    bias = None if b_U is None else b_U.detach().to("cpu", torch.float64)

    def fitted(norm: Any, vectors: Tensor) -> tuple[Reading, float]:
        scores = _scores(_unhooked(norm), vectors, W_U)
        return fit_reading(scores, bias, logits, _declared(model), tolerance)

    errors, entering = [], None if norm_at is None else seen.get(norm_at)
    for uses_norm in (True, False) if entering else (False,):
        reading, error = fitted(norm if uses_norm else None, stream)
        if error <= tolerance:
            return _Measured(parts, uses_norm, reading, error)
        errors.append(error)
    between = (
        " (something stands between the last block and the final norm)"
        if entering and fitted(norm, entering[-1])[1] <= tolerance
        else ""
    )
    return refused(
        f"this model's logits are no scaled and capped unembedding of its last stream: the closest"
        f" reading is off by {min(errors):.1%} of their spread, where rounding is"
        f" {tolerance:.2%}{between}; {expected}"
    )


def stream_of(passed: Sequence[Any] | None) -> Tensor | None:
    """The stream out of what left a block the last time that it ran: it may stand in a list."""
    last: Any = passed[-1] if passed else None
    while isinstance(last, list | tuple) and last:
        last = last[0]
    return last if isinstance(last, Tensor) else None


@torch.no_grad()
def _scores(norm: Callable[[Tensor], Tensor], stream: Tensor, W_U: Tensor) -> Tensor:
    """norm(v) W_U of each row, in float64 on the CPU: [n, d_vocab]."""
    wide = torch.promote_types(W_U.dtype, torch.float32)
    rows = stream.flatten(0, -2).to(W_U.dtype)
    hidden = norm(rows[:, None])[:, 0].to(W_U.device, wide)
    tiles = [hidden @ W_U[:, at : at + _TILE].to(wide) for at in range(0, W_U.shape[1], _TILE)]
    return torch.cat(tiles, 1).to("cpu", torch.float64)


def _unhooked(norm: Any) -> Callable[[Tensor], Tensor]:
    """The norm as the model itself has it, wherever it lies, without its user's hooks."""
    if norm is None:
        return lambda v: v
    modules = list(norm.modules())
    home = next((p.device for p in norm.parameters()), None)

    def call(v: Tensor) -> Tensor:
        there = v if home is None else v.to(home)
        if not any(map(has_hooks, modules)):
            return norm(there).to(v.device)
        with hooks_off(modules):
            return norm(there).to(v.device)

    return call


def _eps_of(norm: Any, cfg: Any) -> float:
    """The epsilon inside the final norm; 0 where there is no norm."""
    if norm is None or isinstance(norm, nn.Identity):
        return 0.0
    own = getattr(norm, "original_component", None)
    for holder, name in ((own, "eps"), (own, "variance_epsilon"), (norm, "eps"), (cfg, "eps")):
        value = getattr(holder, name, None)
        if isinstance(value, float):
            return value
    return 1e-5


@torch.no_grad()
def _is_centred(norm: Callable[[Tensor], Tensor], W_U: Tensor) -> bool:
    """Whether the final norm subtracts the mean: whether it takes a constant vector for none."""
    rows = W_U.new_zeros(3, 1, W_U.shape[0])
    rows[1] = 8.0
    rows[2, :, ::2] = 8.0
    nothing, flat, uneven = norm(rows).flatten(1).float()
    return bool((flat - nothing).norm() < 1e-2 * (uneven - nothing).norm())
