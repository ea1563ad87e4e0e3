"""One forward pass, one backward pass: x and delta of every weight matrix asked for.

`torch.autograd.grad` stops at the tensors z = x W: it computes no weight gradient, touches no
`.grad`, and leaves out the layers below. dL/dW = x^T delta is exact, for any loss and any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from bwlens.gradient.guard import check_first_use
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.gradient.objectives import as_objective
from bwlens.model.attention import Attended, lowest, watched
from bwlens.model.flows import Flow, as_rows
from bwlens.model.locking import alone_with
from bwlens.model.losses import Run, check_mode, forward
from bwlens.model.prompts import Batch, Mask, Prompts, make_batch
from bwlens.model.replay import Replay, keeping
from bwlens.model.sites import (
    Layers,
    Point,
    Site,
    as_site,
    find_taps,
    hook_points,
    resolve_matrices,
)


@dataclass(frozen=True, eq=False)
class Gradients(Mapping[Site, LowRankGradient]):
    """The gradient of every weight matrix that was asked for, as its x and delta.

    `grads["W_in", 3]` is a `LowRankGradient`, with experts `grads["W_in", 3, expert]`; negative
    layers count from the end. Iterating gives `Site`s. One row for each token of the batch.

    Attributes:
        losses: One loss per prompt [batch].
        next_logits: Logits after each prompt's last token [batch, d_vocab]: the model's own answer.
        batch: The tokens.
        n_layers: How many layers the model has, read or not; 0 where that is not known.
    """

    losses: Float[Tensor, " batch"]
    next_logits: Float[Tensor, "batch d_vocab"]
    batch: Batch
    _parts: dict[Site, LowRankGradient] = field(repr=False)
    n_layers: int = 0

    def __getitem__(self, key: Any) -> LowRankGradient:
        site = self._site(key)
        if site in self._parts:
            return self._parts[site]
        same = sorted(other for other in self._parts if other.matrix == site.matrix)
        experts = [repr(other.expert) for other in same if other.layer == site.layer]
        if experts and experts != ["None"]:  # one that no token was sent to has no gradient
            has = f"tokens were sent to the experts {', '.join(experts)} there: name one of them"
        elif same:
            has = f"there is {site.matrix} of layers {sorted({other.layer for other in same})}"
        else:
            has = f"there are {', '.join(dict.fromkeys(s.matrix for s in self._parts))}"
        raise KeyError(f"{site} was not captured; {has}")

    def __contains__(self, key: object) -> bool:
        try:
            return self._site(key) in self._parts
        except KeyError:
            return False

    def _site(self, key: Any) -> Site:
        site = as_site(key)
        if -self.n_layers <= site.layer < 0:
            return replace(site, layer=site.layer + self.n_layers)
        return site

    def __iter__(self) -> Iterator[Site]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        matrices = list(dict.fromkeys(site.matrix for site in self._parts))
        layers = sorted({site.layer for site in self._parts})
        return (
            f"Gradients({', '.join(matrices)}; layers {layers[0]}-{layers[-1]};"
            f" {len(self.batch)} prompts, {self.batch.n_rows} tokens)"
        )

    def for_prompt(self, index: int) -> Gradients:
        """The gradients of one prompt of the batch alone."""
        n = len(self.batch)
        if not -n <= index < n:
            raise IndexError(f"prompt {index} asked for, but the batch has {n}")
        index %= n
        keep, batch = slice(index, index + 1), self.batch.only(index)
        # An expert that none of this prompt's tokens was sent to has no gradient.
        parts = {
            site: gradient.for_prompt(index)
            for site, gradient in self._parts.items()
            if index in gradient.prompts
        }
        return Gradients(
            self.losses[keep], self.next_logits[keep], batch, parts, n_layers=self.n_layers
        )


def capture(
    model: Any,
    prompts: Prompts,
    objective: Any,
    matrices: Sequence[str] | str = ("W_in", "W_out"),
    layers: Layers = None,
    *,
    prepend_bos: bool | None = None,
    attention_mask: Mask | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """x and delta of every weight matrix asked for: dL/dW = x^T delta, exactly.

    One forward and one backward pass, in eval mode; the model is left as it was. The first time
    that a layer is read, a pass of four tokens sees that z = x W and that a small step along -delta
    changes the loss as ||delta|| says; `bwlens.checking.trusted()` leaves it out.

    Args:
        model: A TransformerBridge (TransformerLens 3.9-4) or HookedTransformer (3.9).
        prompts: A string, a list of strings, or token ids [pos] or [batch, pos].
        objective: The target after the prompt (text or token ids; its NLL is the loss), an
            objective such as `LogitDifference`, or any function of (logits, batch) that returns
            one loss per prompt.
        matrices: One or several names out of `bwlens.MATRICES`.
        layers: From 0, negative ones from the end; the backward pass stops at the lowest.
        prepend_bos: Whether text prompts get a BOS token; None is the model's own default.
        attention_mask: 1 at real tokens, 0 at padding (left or right), for token prompts.
        device: Where x and delta go; None leaves them where they are.
        dtype: What x and delta are stored in; None keeps the model's own, float32 at least.

    Raises:
        ValueError: Malformed prompts, unknown matrices or layers, a loss of the wrong shape, that
            is not finite, that reads padding, or that does not depend on a matrix asked for.
        NotImplementedError: A model or mode out of scope, named in the message; layers whose
            x^T delta is not their gradient (quantised in passing, adapted), with figures.
        RuntimeError: Called inside `torch.inference_mode()`.

    Source: Backward Lens, section 4.1 and Lemma 4.1.

    Example:
        >>> grads = capture(model, "Lionel Messi plays for", " Paris")  # doctest: +SKIP
        >>> grads["W_out", 3].delta.shape  # doctest: +SKIP
        torch.Size([5, 192])
    """
    return captured(
        model, prompts, objective, matrices, layers, prepend_bos=prepend_bos,
        attention_mask=attention_mask, device=device, dtype=dtype,
    )[0]  # fmt: skip


def captured(
    model: Any,
    prompts: Prompts,
    objective: Any,
    matrices: Sequence[str] | str,
    layers: Layers,
    *,
    prepend_bos: bool | None = None,
    attention_mask: Mask | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    replay: bool = False,
    attention: Callable[[Run, dict[int, Attended]], None] | None = None,
) -> tuple[Gradients, Replay | None]:
    """What `capture` gives, and, asked for, its pass of one prompt, to be run again.

    `attention` is told before the backward pass what passed the attentions of the same layers.
    """
    check_mode()
    matrices = resolve_matrices(matrices)
    taps = find_taps(model, matrices, layers)
    objective = as_objective(objective)
    batch = _batch_for(model, prompts, objective, prepend_bos, attention_mask)
    check_first_use(model, taps)
    with ExitStack() as stack:
        stack.enter_context(alone_with(model))
        again = keeping(model) if replay and len(batch) == 1 else {}
        seen = None if attention is None else stack.enter_context(watched(model, layers))
        around = None if seen is None else seen.around
        run = forward(model, batch, objective, taps, around=around, **again)
        flows = run.passed.flows
        tensors, names = [flow.z for flow in flows], [flow.name for flow in flows]
        if seen is not None and attention is not None:
            attention(run, passed := seen.passed(batch))
            for more, of in zip((tensors, names), lowest(passed), strict=True):
                more += of
        deltas = run.gradients(tensors, names)[: len(flows)]
    rows = _Rows(batch, device, dtype or torch.promote_types(run.logits.dtype, torch.float32))
    parts: dict[Site, LowRankGradient] = {}
    for flow, delta in zip(flows, deltas, strict=True):
        for site, columns in flow.parts:
            if site.matrix in matrices:
                parts[site] = rows.gradient(flow, as_rows(delta)[:, columns])
    order = sorted(parts, key=lambda site: (site.layer, matrices.index(site.matrix), site))
    tokens = batch.tokens[0]
    every = Replay(model, tokens, range(len(tokens)), run.passed) if again else None
    grads = Gradients(
        run.losses.detach(),
        run.next_logits(batch),
        batch,
        {site: parts[site] for site in order},
        n_layers=len(model.blocks),
    )
    return grads, every


def vjps(
    model: Any,
    prompts: Prompts,
    objective: Any,
    names_filter: str | Sequence[str] | Callable[[str], bool],
    *,
    prepend_bos: bool | None = None,
    attention_mask: Mask | None = None,
) -> dict[str, Float[Tensor, "batch ..."]]:
    """dL/d(activation) at TransformerLens hook points, by TransformerLens' own names.

    At hook_resid_pre, -mid and -post that of the whole residual stream; at any other hook point
    that of what follows on its branch (hook_mlp_in: the MLP alone).

    Args:
        model: A TransformerBridge or HookedTransformer.
        prompts: As for `capture`.
        objective: As for `capture`.
        names_filter: A hook name ("blocks.3.hook_resid_mid"), several, or a predicate of names.
            Names must all fire; a predicate keeps those that do. Hook points that fire only on
            request (`hook_mlp_in`, `hook_q_input`, ...) are switched on for the call.
        prepend_bos: As for `capture`.
        attention_mask: As for `capture`.

    Returns:
        Name to gradient, in TransformerLens' shape for that hook point ([batch, pos, d_model],
        [batch, pos, head, d_head], ...); prompts are padded on the right, with zeros there.

    Raises:
        ValueError: No such hook point, or one asked for that did not fire or has no gradient.
    """
    check_mode()
    with hook_points(model, names_filter) as (points, required):
        objective = as_objective(objective)
        batch = _batch_for(model, prompts, objective, prepend_bos, attention_mask)
        with alone_with(model):
            run = forward(model, batch, objective, points=set(points.values()))
            seen = run.passed.seen
            if required:
                _check_seen(points, seen)
            passes = [
                (name, tensor)
                for name, point in points.items()
                for tensor in seen.get(point, ())
                if tensor.requires_grad
            ]
            if not passes:
                raise ValueError("no hook point that the filter lets through gave a gradient")
            names, tensors = (list(column) for column in zip(*passes, strict=True))
            deltas = run.gradients(tensors, names, allow_unused=not required)
    out: dict[str, Tensor] = {}
    for name, delta in zip(names, deltas, strict=True):
        if delta is not None:  # HookedTransformer's ln1 runs three times, for q, k and v
            out[name] = out[name] + delta if name in out else delta
    for name, delta in out.items():
        conversion = getattr(points[name].module, "hook_conversion", None)
        out[name] = delta if conversion is None else conversion.convert(delta)
    return out


def _check_seen(points: dict[str, Point], seen: Mapping[Point, list[Tensor]]) -> None:
    """Each hook point must have passed a tensor that can have a gradient."""
    for name, point in points.items():
        if point not in seen:
            raise ValueError(
                f"{name} did not fire in this model's forward pass, so it has no gradient; the"
                f" names that fire are those of model.run_with_cache(prompt)[1]"
            )
        if not seen[point][0].requires_grad:
            raise ValueError(
                f"{name} only shows its tensor, off the way to the loss, so it has no gradient; ask"
                f" for a hook point on that way, such as a layer's hook_resid_pre"
            )


def _batch_for(
    model: Any,
    prompts: Prompts,
    objective: Any,
    prepend_bos: bool | None,
    attention_mask: Tensor | None,
) -> Batch:
    return make_batch(
        model,
        prompts,
        getattr(objective, "target", None),
        getattr(objective, "other", None),
        prepend_bos=prepend_bos,
        attention_mask=attention_mask,
    )


class _Rows:
    """Puts what passed into rows, padding left out, with their prompt and position."""

    def __init__(self, batch: Batch, device: Any, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        keep = batch.mask.flatten()
        self._keep = None if bool(keep.all()) else keep
        n_prompts, n_pos = batch.tokens.shape
        prompts, positions = (
            torch.arange(n, device=batch.tokens.device) for n in (n_prompts, n_pos)
        )
        self._prompt = repeat(prompts, "prompt -> (prompt pos)", pos=n_pos)
        self._pos = repeat(positions, "pos -> (prompt pos)", prompt=n_prompts)

    def gradient(self, flow: Flow, delta: Tensor) -> LowRankGradient:
        x = as_rows(flow.x.detach())
        prompt, pos, keep = self._prompt, self._pos, self._keep
        if flow.tokens is not None:
            tokens = flow.tokens.to(prompt.device)
            prompt, pos = prompt[tokens], pos[tokens]
            keep = None if keep is None else keep[tokens]
        if keep is not None:
            here = keep.to(x.device)
            if delta[~here].any():
                raise ValueError(
                    f"the loss depends on padding, at {flow.name}: the objective reads positions"
                    f" after the end of a prompt (leave them out with batch.mask), or the model is"
                    f" not causal"
                )
            x, delta, prompt, pos = x[here], delta[here], prompt[keep], pos[keep]
        device = self._device or x.device
        return LowRankGradient(
            x.to(device, self._dtype),
            delta.to(device, self._dtype),
            prompt.to(device),
            pos.to(device),
        )
