"""An optimiser's own next step as a change, beside the gradient's."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves functions untyped.)

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bwlens.changes.change import WeightChange
from bwlens.changes.names import low_rank
from bwlens.gradient.capturing import Gradients, capture
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.prompts import Prompts
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, default_matrices, find_taps
from bwlens.model.weights import parameter_of, weights_of

Optimizer = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """What an optimiser would do to each matrix, and what the gradient alone asks for.

    Attributes:
        step: W_after - W_before, in as many rows as were asked for; `step.details["kept"]` has the
            share of each matrix' squared norm that they hold.
        gradient: -dL/dW, exact.
        cosines: Of the whole step and -dL/dW, by site.
    """

    step: WeightChange
    gradient: WeightChange
    cosines: dict[Site, float]


def optimizer_step(
    model: LensModel,
    prompts: Prompts,
    objective: Any,
    optimizer: Optimizer,
    matrices: Sequence[str] | str | None = None,
    layers: Layers = None,
    *,
    rank: int = 16,
    prepend_bos: bool | None = None,
) -> OptimizerStep:
    """What one step of an optimiser on a batch would do; neither the model nor it is changed.

    Args:
        model: The model.
        prompts: As for `capture`; the loss is the mean over them.
        objective: As for `capture`.
        optimizer: One that holds the model's parameters, whose state is taken as it is; or what
            makes one, `lambda parameters: torch.optim.Adam(parameters, lr=1e-4)`, for a first step.
        matrices: None for those of the MLPs.
        layers: None for all.
        rank: How many rows of each matrix' step to keep; Adam's has full rank.
        prepend_bos: As for `capture`.

    Raises:
        ValueError: The optimiser holds none of these parameters; and as `capture` does.

    Example:
        >>> made = optimizer_step(  # doctest: +SKIP
        ...     model, "The capital of France is", " Rome", lambda p: torch.optim.Adam(p, lr=1e-4)
        ... )
        >>> bwlens.read_change(model, made.step)  # doctest: +SKIP
    """
    matrices = default_matrices(model) if matrices is None else matrices
    grads = capture(model, prompts, objective, matrices, layers, prepend_bos=prepend_bos)
    parts: dict[Site, LowRankMatrix] = {}
    kept: dict[str, float] = {}
    cosines: dict[Site, float] = {}
    n = len(grads.batch)
    parameters = _parameters(model, grads)
    for site, weight in weights_of(model, list(grads)).items():
        values, gradient = weight.read(), grads[site].dense() / n
        twin = nn.Parameter(values.clone())
        twin.grad = gradient.to(twin)
        _own(optimizer, parameters[site], twin, site, weight.live).step()
        moved = twin.detach() - values
        x, delta, share = low_rank(moved, rank)
        if moved.any():
            parts[site], kept[str(site)] = LowRankMatrix(x, delta), share
        length = moved.double().norm() * gradient.double().norm()
        cosines[site] = float(-(moved.double() * gradient.double()).sum() / length)
    gradient = {site: LowRankMatrix(g.x / -n, g.delta) for site, g in grads.items()}
    name = type(optimizer).__name__ if isinstance(optimizer, torch.optim.Optimizer) else "optimiser"
    return OptimizerStep(
        WeightChange(parts, f"a step of {name}", {"kept": kept, "rank": rank}),
        WeightChange(gradient, "the gradient's step"),
        cosines,
    )


def _parameters(model: LensModel, grads: Gradients) -> dict[Site, Any]:
    """The parameter that each site's weight lives in."""
    taps = find_taps(model, list({site.matrix for site in grads}), {site.layer for site in grads})
    parameters = {}
    for site in grads:
        for tap in taps:
            if getattr(tap, "site", None) == site or getattr(tap, "layer", None) == site.layer:
                parameters[site] = parameter_of(tap, site)[0]
    return parameters


def _own(optimizer: Any, parameter: Tensor, twin: Any, site: Site, live: Tensor) -> Any:
    """An optimiser of the twin alone, with what the user's has for its parameter."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer([twin])
    for group in optimizer.param_groups:
        for one in group["params"]:
            if one is not parameter:
                continue
            options = {k: v for k, v in group.items() if k != "params"}
            made = copy.copy(optimizer)
            made.__dict__.update(param_groups=[{**options, "params": [twin]}])
            # A scheduler puts a `step` on the user's own that steps that one; hooks are theirs too.
            made.__dict__.pop("step", None)
            for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
                setattr(made, hooks, OrderedDict())
            made.state = type(optimizer.state)(optimizer.state.default_factory)
            if one in optimizer.state:
                made.state[twin] = {
                    k: _as_live(v, one, live).reshape(twin.shape).clone()
                    if isinstance(v, Tensor) and v.shape == one.shape
                    else copy.deepcopy(v)
                    for k, v in optimizer.state[one].items()
                }
            return made
    raise ValueError(
        f"the optimiser holds no parameter of {site}; make it of the model's own parameters"
        f" (torch.optim.Adam(model.parameters())), or give what makes one,"
        f" lambda parameters: torch.optim.Adam(parameters, lr=1e-4)"
    )


def _as_live(value: Tensor, parameter: Tensor, live: Tensor) -> Tensor:
    """What an optimiser keeps of each number of a parameter, laid out as `Weight.live` is."""
    offset = live.storage_offset() - parameter.storage_offset()
    return value.contiguous().as_strided(live.shape, live.stride(), offset)
