"""One forward pass that notes the tensors passing chosen modules, and their share in a loss.

Everything a pass changes for its time (hooks, eval mode, gradients on, the experts' way of running)
is put back on leaving, also after an exception. Passes of several threads take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bwlens.model.locking import alone_with
from bwlens.model.places import ExpertTap, Point, Site, Tap
from bwlens.model.prompts import Batch

_HALF_SCALE = {torch.float16: 1024.0}
"""Losses are scaled up by this (exactly, a power of two) where small gradients would vanish."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished forward pass with its losses, still on the graph."""

    logits: Tensor
    losses: Tensor
    scale: float

    def gradients(
        self, tensors: list[Tensor], names: list[str], allow_unused: bool = False
    ) -> list[Any]:
        """dL/dtensor for each; the losses' sum is taken, as prompts do not touch one another."""
        off_graph = [n for t, n in zip(tensors, names, strict=True) if not t.requires_grad]
        if off_graph:
            raise ValueError(f"{off_graph[0]} was computed off the autograd graph")
        total = self.losses.sum() * self.scale
        found = torch.autograd.grad(total, tensors, allow_unused=True)
        for name, delta in zip(names, found, strict=True):
            if delta is None and not allow_unused:
                raise ValueError(
                    f"the loss does not depend on {name}, so it has no gradient there; ask for"
                    f" other layers or matrices, or use an objective that reads the logits"
                )
            if delta is not None and not torch.isfinite(delta).all():
                raise ValueError(
                    f"the gradient at {name} is not finite; the model overflows in"
                    f" {delta.dtype}, load it in float32 or bfloat16"
                )
        if self.scale == 1.0:
            return list(found)
        return [None if delta is None else delta.float() / self.scale for delta in found]

    def next_logits(self, batch: Batch) -> Tensor:
        """The logits after each prompt's last token [batch, d_vocab], off the graph."""
        rows = torch.arange(len(batch), device=self.logits.device)
        return self.logits.detach()[rows, batch.last.to(self.logits.device)].clone()


def check_mode() -> None:
    """Refuse to run where no gradient can be had."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "bwlens needs a backward pass, which torch.inference_mode() forbids; call it outside"
            " (torch.no_grad() around it is fine)"
        )


def forward(model: Any, batch: Batch, objective: Any) -> Run:
    """Run the model and the objective, and check what the objective gave.

    Raises:
        NotImplementedError: A module that autograd cannot follow takes part.
        ValueError: The objective gave something else than one finite loss per prompt.
    """
    _check_differentiable(model)
    logits = model(batch.tokens, return_type="logits", padding_side="right")
    precise = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    losses = objective(precise, batch)
    if not isinstance(losses, Tensor) or losses.shape != (len(batch),):
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise ValueError(
            f"the objective returned {found}; expected one loss per prompt, shape ({len(batch)},):"
            f" reduce over positions, not over the batch"
        )
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        found = float(losses.detach()[bad[0]])
        raise ValueError(
            f"the loss of prompt {bad[0]} is {found}; expected a finite number. Check the model's"
            f" weights and dtype ({logits.dtype})"
        )
    if not losses.requires_grad:
        raise ValueError(
            "the objective's loss is cut off from the model (it has no gradient); compute it from"
            " the logits it is given, without .detach(), .item() or torch.no_grad()"
        )
    return Run(logits, losses, _HALF_SCALE.get(logits.dtype, 1.0))


_thread = local()


def _recordings() -> list[Any]:
    """What this thread records at present, the innermost last."""
    return vars(_thread).setdefault("recordings", [])


def _check_differentiable(model: nn.Module) -> None:
    """Refuse packed weights: what is computed with them cuts the graph, wholly or in part."""
    for module in all_modules(model):
        # PyTorch's quantised modules unpack their weight in a method.
        if callable(getattr(type(module), "weight", None)):
            raise NotImplementedError(
                f"this model is quantised: {type(module).__module__}.{type(module).__name__}"
                f" computes with packed weights, which autograd cannot follow, so every gradient"
                f" below would lack a part; load the model in float32, bfloat16 or float16"
            )


@contextmanager
def recording(model: nn.Module, points: set[Point]) -> Iterator[dict[Point, list[Tensor]]]:
    """Note the tensors that pass the points, with gradients on and the model in eval mode."""
    seen: dict[Point, list[Tensor]] = {}
    parted_from: dict[int, Tensor] = {}

    def note(point: Point) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            recordings = _recordings()
            if not recordings or recordings[-1] is not seen:
                return None  # another thread's pass, or one within this one
            tensor = point.take(args, kwargs, output)
            stream = parted_from.get(id(tensor), tensor)
            if not point.branch or not tensor.requires_grad:
                seen.setdefault(point, []).append(stream)
                return None
            branch = tensor.view_as(tensor)  # the same numbers, another place in the graph
            parted_from[id(branch)] = stream
            seen.setdefault(point, []).append(branch)
            return branch

        return hook

    with ExitStack() as stack:
        stack.enter_context(alone_with(model))
        _recordings().append(seen)
        stack.callback(_recordings().pop)
        stack.enter_context(_keeping_nothing(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(in_eval_mode(model))
        # Where a branch leaves the stream, the stream is noted first.
        for point in sorted(points, key=lambda point: point.branch):
            handle = point.module.register_forward_hook(note(point), with_kwargs=True)
            stack.callback(handle.remove)
        # Where every parameter is frozen the graph needs a root, below the embedding's hook points.
        embed = model.get_submodule("embed")
        for module in (getattr(embed, "original_component", None), embed):
            if module is not None:
                handle = module.register_forward_hook(_as_root)
                stack.callback(handle.remove)
        yield seen


def _as_root(module: nn.Module, args: Any, output: Any) -> Tensor | None:
    """Make the embedding's output require a gradient, in a copy that may be changed in place."""
    if isinstance(output, Tensor) and not output.requires_grad:
        return output.detach().requires_grad_().clone()
    return None


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Every module of a model and of the Hugging Face model that it wraps, each once."""
    # A bridge's own tree leaves out some modules of the model it wraps (GPT-2's first dropout).
    wrapped = getattr(model, "original_model", None)
    return list(dict.fromkeys([*model.modules(), *(() if wrapped is None else wrapped.modules())]))


@contextmanager
def _keeping_nothing(model: nn.Module) -> Iterator[None]:
    """Modules keep what they kept before: a pass's attention patterns hold its whole graph."""
    modules = all_modules(model)
    before = [
        {name: kept for name, kept in vars(module).items() if type(kept) is Tensor}
        for module in modules
    ]
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            for name, value in vars(module).items():
                if type(value) is Tensor and not value.is_leaf and value is not kept.get(name):
                    vars(module)[name] = kept.get(name)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode within (no dropout, so no random numbers drawn), each module's own mode after."""
    training = [module for module in all_modules(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True, eq=False)
class Flow:
    """One x and z as they passed: a site's, or the fused sites of an expert's parameter."""

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
def expert_calls(taps: list[ExpertTap]) -> Iterator[ExpertCalls | None]:
    """Run batched experts one by one, so that each one's x and z can be noted."""
    if not taps:
        yield None
        return
    configs = {id(tap.experts.config): tap.experts.config for tap in taps}
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation = "eager"
        with ExpertCalls(taps) as calls:
            yield calls
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def flows_of(
    tap: Tap | ExpertTap,
    seen: dict[Point, list[Tensor]],
    calls: ExpertCalls | None,
    batch: Batch,
) -> list[Flow]:
    """What passed a tap."""
    if isinstance(tap, ExpertTap):
        return _expert_flows(tap, seen, calls)
    x, z = (_only(tap, side, candidates, seen) for side, candidates in (("x", tap.x), ("z", tap.z)))
    tokens = (
        None if tap.routing is None else _routed(seen[tap.routing][0], int(tap.site.expert or 0))
    )
    n_rows = batch.tokens.numel() if tokens is None else len(tokens)
    if n_rows == 0:  # an expert that no token was sent to
        return []
    per_head = x.ndim == 4 and tap.site.matrix in ("W_Q", "W_K", "W_V")
    if per_head or {len(as_rows(x)), len(as_rows(z))} != {n_rows}:
        raise NotImplementedError(
            f"{tap.site}: x of shape {tuple(x.shape)} and z of shape {tuple(z.shape)} do not belong"
            f" to {n_rows} tokens; if heads have inputs of their own, switch that off with"
            f" model.set_use_split_qkv_input(False) and model.set_use_attn_in(False)"
        )
    return [Flow(str(tap.site), x, z, ((tap.site, tap.columns(z.shape[-1])),), tokens)]


def as_rows(tensor: Tensor) -> Tensor:
    """One row per token: batch and position flattened, and heads, where they stand apart."""
    return tensor.flatten(2).flatten(0, 1) if tensor.ndim == 4 else tensor.flatten(0, -2)


def _only(
    tap: Tap, side: str, candidates: tuple[Point, ...], seen: dict[Point, list[Tensor]]
) -> Tensor:
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


def _expert_flows(
    tap: ExpertTap, seen: dict[Point, list[Tensor]], calls: ExpertCalls | None
) -> list[Flow]:
    """What passed each expert of a layer, one flow per expert and parameter."""
    routing = seen[tap.routing][0]
    flows = []
    for owner, name, expert, x, z in calls.seen if calls is not None else ():
        if owner is not tap:
            continue
        tokens = _routed(routing, expert)
        if len(tokens) != len(x):
            raise NotImplementedError(
                f"expert {expert} of layer {tap.layer} took {len(x)} rows, but the router sent"
                f" {len(tokens)}; this kind of mixture is not known to bwlens"
            )
        matrices = tap.weights[name]
        width = z.shape[-1] // len(matrices)
        parts = tuple(
            (Site(matrix, tap.layer, expert), slice(k * width, (k + 1) * width))
            for k, matrix in enumerate(matrices)
        )
        flows.append(Flow(f"expert {expert} of layer {tap.layer}", x, z, parts, tokens))
    if not flows:
        raise NotImplementedError(
            f"the experts of layer {tap.layer} ran in a way that bwlens cannot follow; set them to"
            f" run one by one: model.original_model.set_experts_implementation('eager')"
        )
    return flows
