"""What passed the weights in one forward pass: the x and z of each, also of experts."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bwlens.model.places import ExpertTap, Point, Site, Tap

Seen = Mapping[Point, list[Tensor]]
"""The tensors that passed each point, in order."""


@dataclass(frozen=True, eq=False)
class Flow:
    """One x and z as they passed: a site's, or the fused sites of an expert's parameter."""

    tap: Tap | ExpertTap
    name: str
    x: Tensor
    z: Tensor
    parts: tuple[tuple[Site, slice | Tensor], ...]
    """Each site with its columns of z."""
    tokens: Tensor | None = None
    """Which token of the flattened batch each row is; None where rows are the batch itself."""


class ExpertCalls(TorchFunctionMode):
    """Notes each product of an input with one slice of a batched expert parameter."""

    def __init__(self, taps: list[ExpertTap]) -> None:
        super().__init__()
        self._owners = {
            id(getattr(tap.experts, name)): (tap, name) for tap in taps for name in tap.weights
        }
        self.seen: list[tuple[ExpertTap, str, int, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and len(args) > 1:
            base = args[1]._base
            if base is not None and id(base) in self._owners:
                tap, name = self._owners[id(base)]
                expert = (args[1].storage_offset() - base.storage_offset()) // base.stride(0)
                self.seen.append((tap, name, expert, args[0], out))
        return out


@contextmanager
def expert_calls(taps: list[ExpertTap]) -> Generator[ExpertCalls | None, None, None]:
    """Run batched experts one by one, so that each one's x and z can be noted."""
    if not taps:
        yield None
        return
    with experts_one_by_one([tap.experts.config for tap in taps]), ExpertCalls(taps) as calls:
        yield calls


@contextmanager
def experts_one_by_one(configs: Iterable[Any]) -> Generator[None, None, None]:
    """Experts of models with these configs run one after the other within."""
    before = {id(config): (config, config._experts_implementation) for config in configs}
    try:
        for config, _ in before.values():
            config._experts_implementation = "eager"
        yield
    finally:
        for config, way in before.values():
            config._experts_implementation = way


def points_of(taps: Collection[Tap | ExpertTap]) -> set[Point]:
    """Where the x and z of taps may pass, and the routing of experts."""
    points = {point for tap in taps if isinstance(tap, Tap) for point in (*tap.x, *tap.z)}
    return points | {tap.routing for tap in taps if tap.routing is not None}


def flows_of(
    tap: Tap | ExpertTap, seen: Seen, calls: ExpertCalls | None, n_tokens: int
) -> list[Flow]:
    """What passed a tap, in a batch of so many tokens."""
    if isinstance(tap, ExpertTap):
        return _expert_flows(tap, seen, calls)
    x, z = (_only(tap, side, candidates, seen) for side, candidates in (("x", tap.x), ("z", tap.z)))
    tokens = (
        None if tap.routing is None else _routed(seen[tap.routing][0], int(tap.site.expert or 0))
    )
    n_rows = n_tokens if tokens is None else len(tokens)
    if n_rows == 0:  # an expert that no token was sent to
        return []
    per_head = x.ndim == 4 and tap.site.matrix in ("W_Q", "W_K", "W_V")
    if per_head or {len(as_rows(x)), len(as_rows(z))} != {n_rows}:
        raise NotImplementedError(
            f"{tap.site}: x of shape {tuple(x.shape)} and z of shape {tuple(z.shape)} do not belong"
            f" to {n_rows} tokens; if heads have inputs of their own, switch that off with"
            f" model.set_use_split_qkv_input(False) and model.set_use_attn_in(False)"
        )
    return [Flow(tap, str(tap.site), x, z, ((tap.site, tap.columns(z.shape[-1])),), tokens)]


def as_rows(tensor: Tensor) -> Tensor:
    """One row per token: batch and position flattened, and heads, where they stand apart."""
    if tensor.ndim == 4:
        return rearrange(tensor, "batch pos head d_head -> (batch pos) (head d_head)")
    return rearrange(tensor, "... d -> (...) d")


def _only(tap: Tap, side: str, candidates: tuple[Point, ...], seen: Seen) -> Tensor:
    """The tensor that passed the first candidate that fired."""
    for point in candidates:
        if tensors := seen.get(point):
            if len(tensors) > 1:
                raise NotImplementedError(
                    f"{tap.site} ran {len(tensors)} times in one forward pass (shared or recurrent"
                    f" layers); bwlens reads layers that run once"
                )
            return tensors[0]
    raise NotImplementedError(
        f"{side} of {tap.site} passed no hook point of this model in its present mode; reload the"
        f" model raw (bwlens.load_model), and report the architecture if that does not help"
    )


def _routed(routing: Tensor, expert: int) -> Tensor:
    """The tokens sent to an expert, in the order in which mixtures take them."""
    return torch.where(routing.flatten(0, -2).T.eq(expert))[1]


def _expert_flows(tap: ExpertTap, seen: Seen, calls: ExpertCalls | None) -> list[Flow]:
    """What passed each expert of a layer, one flow per expert and parameter."""
    routing = seen[tap.routing][0]
    flows = []
    for owner, weight, expert, x, z in calls.seen if calls is not None else ():
        if owner is not tap:
            continue
        tokens = _routed(routing, expert)
        if len(tokens) != len(x):
            raise NotImplementedError(
                f"expert {expert} of layer {tap.layer} took {len(x)} rows, but the router sent"
                f" {len(tokens)}; this kind of mixture is not known to bwlens"
            )
        matrices = tap.weights[weight]
        width = z.shape[-1] // len(matrices)
        parts = tuple(
            (Site(matrix, tap.layer, expert), slice(k * width, (k + 1) * width))
            for k, matrix in enumerate(matrices)
        )
        name = f"expert {expert} of layer {tap.layer}"
        flows.append(Flow(tap, name, x, z, parts, tokens))
    if not flows:
        raise NotImplementedError(
            f"the experts of layer {tap.layer} ran in a way that bwlens cannot follow; set them to"
            f" run one by one: model.original_model.set_experts_implementation('eager')"
        )
    return flows
