"""Subject shift: ROME's write, its value found by a few Newton steps on the target's log-odds."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.data.given import Edits, as_edits
from bwlens.edit._memit import normal_rows
from bwlens.edit._where import layer_for
from bwlens.edit.aims import Aims
from bwlens.edit.given import count, number, texts_of
from bwlens.edit.keys import PREFIXES, Position, check_position, contexts_of
from bwlens.edit.known import open_edits
from bwlens.edit.statistics import Statistics, statistics_for
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.passes import prompts_at_once
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site, resolve_layer

DEPTH = 5 / 29  # Layer 5 of SmolLM2's 0 to 29, chosen on tuning records.


@one_thread_at_a_time
def subject_shift(
    model: LensModel,
    edits: Edits,
    *,
    layer: int | None = None,
    steps: int = 10,
    log_odds: float = 8.0,
    clamp: float = 2.0,
    prefixes: Sequence[str] = PREFIXES,
    position: Position = "subject",
    statistics: Statistics | str | os.PathLike[str] | None = None,
    prepend_bos: bool | None = None,
) -> WeightChange:
    """Write what makes the target probable under the subject's whitened key, in one W_out.

    `W += sum_i outer(u_i, v_i)`, one row an edit:

    - `u_i` as in ROME, `C^-1 k / (k^T C^-1 k)` with k the mean of what enters W_out at the
      subject's last token, over the prompt by itself and behind the prefixes; several edits are
      solved for together, `u_i . k_j = [i = j]`.
    - `v_i` is found by Newton's steps for one equation, `f(v) = log_odds`:
      `v += (log_odds - f) grad f / ||grad f||^2`, f being the target's log-odds against all other
      words, mean over its tokens and the contexts. After each step `||v||` is kept within
      `clamp * ||h||`, h the stream after the block; it ends where f is reached.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        edits: One edit, or several to make together.
        layer: Which W_out; None takes what `where` measured for this model or, where it did not,
            5/29 of the depth.
        steps: Newton steps at most, each a forward and backward pass from the layer on.
        log_odds: What f is to reach, in nats.
        clamp: Largest norm of the value, in norms of the stream h at the plain prompt.
        prefixes: Contexts to average over; () takes the prompt alone.
        position: Where the key stands: the "subject"'s last token, or the prompt's "last".
        statistics: Of W_out's keys (`key_statistics`), or their file. None takes the demo model's.
        prepend_bos: None is the model's own default.

    Returns:
        The change, a row an edit. `details` hold f of each edit before each step and after the
        last; `note` the edits left out as known already.

    Raises:
        ValueError: A malformed argument, statistics missing or of another model, f not finite.
        NotImplementedError: A mixture of experts, or a model out of scope.

    Source: this project. Parts: ROME, equation 2; Backward Lens, section 6.

    Example:
        >>> edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
        >>> change = subject_shift(model, edit, layer=3, position="last")  # doctest: +SKIP
    """
    listed = as_edits(edits)
    check_position(position)
    count(steps, "steps")
    log_odds = number(log_odds, "log_odds", "a finite number of nats")
    if not number(clamp, "clamp") > 0:
        raise ValueError(f"clamp is {clamp}; expected a number of norms > 0")
    prefixes = texts_of(prefixes, "prefixes")
    default = layer_for(model, position, round(DEPTH * (len(model.blocks) - 1)))
    site = Site("W_out", default if layer is None else resolve_layer(model, layer))
    whitener = statistics_for(model, [site], statistics)[site]
    details = {"method": "subject_shift", "layer": site.layer, "log_odds": []}
    listed, note = open_edits(model, listed, prepend_bos)
    if not listed:
        return WeightChange(note=note, details=details)
    keys, values = [], []
    at_once = max(1, prompts_at_once(model) // (1 + len(prefixes)))
    for start in range(0, len(listed), at_once):
        several = listed[start : start + at_once]
        contexts = contexts_of(model, several, prefixes, position, prepend_bos)
        aims = Aims(model, contexts, site)
        written, history = values_of(aims, steps, log_odds, clamp)
        keys.append(aims.keys.mean(1))
        values.append(written)
        details["log_odds"] += history
    x = normal_rows(whitener, torch.cat(keys), weight=0.0)
    delta = torch.cat(values)
    return WeightChange({site: LowRankMatrix(x.to(delta), delta)}, note, details)


def values_of(
    aims: Aims, steps: int, goal: float, clamp: float
) -> tuple[Float[Tensor, "edit d_out"], list[list[float]]]:
    """The value of each edit, and its log-odds before each step and after the last."""
    limit = clamp * aims.stream[:, 0].norm(dim=-1)
    values = torch.zeros_like(aims.outputs[:, 0])
    history: list[list[float]] = [[] for _ in values]
    for step in range(steps + 1):
        values = values.detach().requires_grad_()
        odds = _log_odds(aims, values)
        reached = odds.detach() >= goal
        for of_edit, f in zip(history, odds.tolist(), strict=True):
            if not of_edit or of_edit[-1] < goal:
                of_edit.append(f)
        if not torch.isfinite(odds).all():
            raise ValueError(
                f"the target's log-odds are {odds.tolist()} after {step} steps; load the model in"
                f" float32"
            )
        if step == steps or reached.all():
            break
        (slope,) = torch.autograd.grad(odds.sum(), [values])
        newton = ((goal - odds.detach()) / slope.square().sum(-1).clamp(min=1e-20))[:, None] * slope
        with torch.no_grad():
            moved = values + torch.where(reached[:, None], 0.0, newton)
            values = moved * (limit / moved.norm(dim=-1)).clamp(max=1.0)[:, None]
    return values.detach(), history


def _log_odds(aims: Aims, values: Float[Tensor, "edit d_out"]) -> Float[Tensor, " edit"]:
    """Of each edit's target against all other words, mean over its tokens and the contexts."""
    log_p = aims.of_target(aims.words(values))
    # Where the target is all but certain, log(1 - p) stays finite.
    odds = log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-6)))
    mask = aims.mask.to(odds.device)
    return torch.where(mask, odds, 0.0).sum((1, 2)) / mask.sum((1, 2))
