"""The one engine: a forward pass, what it notes of the tensors passing, what it adds to them.

What a pass changes for its time (hooks, modes, the experts' way of running) is put back after it.
Passes of several threads take turns on a model; a pass' hooks act in its own thread alone.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import local
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bwlens.model import earlier
from bwlens.model.flows import Flow, expert_calls, flows_of, points_of
from bwlens.model.locking import alone_with
from bwlens.model.partly import Partly
from bwlens.model.places import ExpertTap, Point, Tap
from bwlens.model.protocol import LensModel

_PROMPTS = 64  # In one batch: more gain nothing on a CPU.


@dataclass(frozen=True, eq=False)
class Addition:
    """What is added to what passes the first of some points that fires.

    Attributes:
        points: Where it may pass, the most exact first (`Tap.z`).
        added: Of as many entries as what passes, or a function that gives it.
        given: What that function is given passes the first of these that fired (`Tap.x`).
        name: What is added to, for messages.
    """

    points: tuple[Point, ...]
    added: Tensor | Callable[[Tensor], Tensor]
    given: tuple[Point, ...] = ()
    name: str = "a matrix"


@dataclass(frozen=True, eq=False)
class Passed:
    """What a forward pass showed.

    Attributes:
        logits: [batch, pos, d_vocab]; with `positions`, those alone; with `until`, of none.
        seen: The tensors that passed each point, additions included.
        flows: x and z of each tap; several of a mixture, none of an expert that had no token.
        left: What left each module of `keeping` that ran once, as it left.
        kept: The keys and values that it was given to keep.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    seen: Mapping[Point, list[Tensor]]
    flows: list[Flow]
    left: Mapping[nn.Module, Any] = field(default_factory=dict)
    kept: Any = None


def run(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    taps: Collection[Tap | ExpertTap] = (),
    points: Collection[Point] = (),
    additions: Sequence[Addition] = (),
    positions: Int[Tensor, "*batch position"] | None = None,
    keeping: Collection[nn.Module] = (),
    giving: Mapping[nn.Module, Any] | None = None,
    around: Mapping[nn.Module, Callable[[Any, Any, Any], Any]] | None = None,
    kept: Any = None,
    partly: Partly | None = None,
    until: nn.Module | None = None,
    graph: bool = False,
) -> Passed:
    """One forward pass in eval mode, padded on the right.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        tokens: Token ids.
        taps: Weights whose x and z are noted.
        points: Other places where what passes is noted.
        additions: What is added on the way.
        positions: The only positions that pass the unembedding, every row's or each row's own.
        keeping: Modules of which what leaves them is kept.
        giving: Modules that do not run, with what they give instead.
        around: Modules with what is called instead, with their forward and its arguments.
        kept: Keys and values (`bwlens.model.earlier`): those of earlier positions are taken from
            it, those of the tokens go to it.
        partly: Modules that only some tokens pass.
        until: The pass ends when this module has run, without logits.
        graph: Whether autograd follows, also where every parameter is frozen.

    Raises:
        NotImplementedError: What was asked for passed no point of this model, or several times; or
            gradients of a model with packed weights.
    """
    noted = points_of(taps) | set(points)
    if graph:
        _check_differentiable(model)
    with ExitStack() as stack:
        stack.enter_context(alone_with(model))
        hooks = stack.enter_context(_Hooks())
        if graph:
            stack.enter_context(_keeping_nothing(model))
        stack.enter_context(torch.set_grad_enabled(graph))
        stack.enter_context(in_eval_mode(model))
        seen: dict[Point, list[Tensor]] = {}
        adding = [_Adding(addition, hooks) for addition in additions]
        # Noted after what is added; where a branch leaves the stream, the stream first.
        note = _Notes(seen)
        for point in sorted(noted, key=lambda point: point.branch):
            hooks.at(point, note.of(point))
        if graph and (noted or around):
            _root(model, hooks)
        left: dict[nn.Module, list[Any]] = {}
        for module in keeping:
            hooks.after(module, lambda m, output: left.setdefault(m, []).append(output))
        for module, given in (giving or {}).items():
            hooks.instead(module, lambda forward, args, kwargs, given=given: given)
        for module, act in (around or {}).items():
            hooks.instead(module, act)
        if partly is not None:
            for module in partly.left:
                hooks.instead(module, partial(partly.passing, module))
        if positions is not None:
            _only_at(model.unembed, positions, hooks)
        if kept is not None:
            stack.enter_context(earlier.known_to_attention(model))
        experts = [tap for tap in taps if isinstance(tap, ExpertTap)]
        calls = stack.enter_context(expert_calls(experts))
        if until is not None:
            hooks.after(until, _end)
        try:
            logits = call(model, tokens, **earlier.options(model, kept))
        except _Ended:
            logits = torch.empty(len(tokens), 0, model.cfg.d_vocab)
        flows = [flow for tap in taps for flow in flows_of(tap, seen, calls, tokens.numel())]
        for one in adding:
            one.check()
    once = {module: outputs[0] for module, outputs in left.items() if len(outputs) == 1}
    return Passed(logits, seen, flows, once, kept)


def call(model: LensModel, tokens: Int[Tensor, "batch pos"], **options: Any) -> Tensor:
    """The model's logits; nothing is switched. The only place where bwlens calls a model."""
    return model(tokens, return_type="logits", padding_side="right", **options)


def device_of(model: LensModel) -> torch.device:
    """Where a model takes its tokens."""
    return next(model.embed.parameters()).device


def prompts_at_once(model: LensModel) -> int:
    """How many short prompts one forward and backward pass takes.

    A batch fills a CPU soon. On a GPU it is what half of the free memory holds: some 34 floats for
    each token, layer and dimension of the stream (Korthikanti et al. 2022), of 64 tokens a prompt.
    """
    device = device_of(model)
    if device.type != "cuda":
        return _PROMPTS
    free, _ = torch.cuda.mem_get_info(device)
    of_prompt = 64 * len(model.blocks) * model.cfg.d_model * 34 * 4
    return min(max(_PROMPTS, free // 2 // of_prompt), 16 * _PROMPTS)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# Hooks of one pass.


class _Ended(Exception):
    """What was to run has run."""


def _end(module: nn.Module, output: Any) -> None:
    raise _Ended


_thread = local()


def _passes() -> list[Any]:
    """This thread's passes at present, the innermost last."""
    return vars(_thread).setdefault("passes", [])


@contextmanager
def called_instead(
    module: nn.Module, act: Callable[[Any, Any, Any], Any]
) -> Generator[None, None, None]:
    """What `act` makes of a module's forward and the arguments is called in its place meanwhile."""
    forward, before = module.forward, vars(module).get("forward")

    def instead(*args: Any, **kwargs: Any) -> Any:
        return act(forward, args, kwargs)

    vars(module)["forward"] = instead
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


class _Hooks(ExitStack):
    """Hooks that act in one pass, not in another thread's, nor in one within this one."""

    def __enter__(self) -> _Hooks:
        _passes().append(self)
        self.callback(_passes().pop)
        return self

    @property
    def _acting(self) -> bool:
        return bool(_passes()) and _passes()[-1] is self

    def at(self, point: Point, act: Callable[[Tensor], Tensor | None]) -> None:
        """Show what passes a point, and put in its place what `act` gives, if anything."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._acting and (new := act(point.take(args, kwargs, None))) is not None:
                return point.put(args, kwargs, new)
            return None

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if self._acting and (new := act(point.take((), {}, output))) is not None:
                return (new, *output[1:]) if isinstance(output, tuple) else new
            return None

        # An input is shown before anything within the module runs.
        if point.side == "input":
            handle = point.module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = point.module.register_forward_hook(after)
        self.callback(handle.remove)

    def after(self, module: nn.Module, act: Callable[[nn.Module, Any], Any]) -> None:
        """Show all that leaves a module, and put in its place what `act` gives, if anything."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return act(module, output) if self._acting else None

        self.callback(module.register_forward_hook(hook).remove)

    def instead(self, module: nn.Module, act: Callable[[Any, Any, Any], Any]) -> None:
        """Give what `act` makes of the module's own forward and its arguments."""

        def acting(forward: Any, args: Any, kwargs: Any) -> Any:
            return act(forward, args, kwargs) if self._acting else forward(*args, **kwargs)

        self.enter_context(called_instead(module, acting))


class _Notes:
    """Notes what passes, and parts branches from their stream."""

    def __init__(self, seen: dict[Point, list[Tensor]]) -> None:
        self._seen = seen
        self._parted_from: dict[int, Tensor] = {}

    def of(self, point: Point) -> Callable[[Tensor], Tensor | None]:
        def note(tensor: Tensor) -> Tensor | None:
            stream = self._parted_from.get(id(tensor), tensor)
            if not point.branch or not tensor.requires_grad:
                self._seen.setdefault(point, []).append(stream)
                return None
            branch = tensor.view_as(tensor)  # the same numbers, another place in the graph
            self._parted_from[id(branch)] = stream
            self._seen.setdefault(point, []).append(branch)
            return branch

        return note


class _Adding:
    """Adds to what passes the first of some points that fires."""

    def __init__(self, addition: Addition, hooks: _Hooks) -> None:
        self._addition = addition
        self._given: dict[Point, Tensor] = {}
        self._times = 0
        self._at: Point | None = None
        for point in addition.given:
            hooks.at(point, self._note(point))
        for point in addition.points:
            hooks.at(point, self._add(point))

    def _note(self, point: Point) -> Callable[[Tensor], None]:
        return lambda tensor: self._given.update({point: tensor})

    def _add(self, point: Point) -> Callable[[Tensor], Tensor | None]:
        def add(z: Tensor) -> Tensor | None:
            if self._at not in (None, point):
                return None  # what was added there is in it already
            self._at = point
            self._times += 1
            return z + self._added().to(z).reshape(z.shape)

        return add

    def _added(self) -> Tensor:
        added = self._addition.added
        if isinstance(added, Tensor):
            return added
        for point in self._addition.given:
            if point in self._given:
                return added(self._given[point])
        raise NotImplementedError(
            f"x of {self._addition.name} passed no hook point before its z in the model's present"
            f" mode; reload the model raw (bwlens.load_model)"
        )

    def check(self) -> None:
        """It was added once."""
        if self._times != 1:
            raise NotImplementedError(
                f"{self._addition.name} ran {self._times} times where bwlens can reach it; expected"
                f" once. Reload the model raw (bwlens.load_model)"
            )


def _only_at(unembed: nn.Module, positions: Tensor, hooks: _Hooks) -> None:
    """Let only these positions on to the unembedding."""
    # Not before the final norm: GPT-2 reshapes what leaves it to all positions.
    point = Point(unembed, "input")
    rows = slice(None) if positions.ndim == 1 else torch.arange(len(positions))[:, None]
    hooks.at(point, lambda stream: stream[rows, positions.to(stream.device)])


def _root(model: LensModel, hooks: _Hooks) -> None:
    """Where every parameter is frozen the graph needs a root, below the embedding's hook points."""

    def as_root(module: nn.Module, output: Any) -> Tensor | None:
        if isinstance(output, Tensor) and not output.requires_grad:
            return output.detach().requires_grad_().clone()  # a copy may be changed in place
        return None

    embed = model.get_submodule("embed")
    for module in (getattr(embed, "original_component", None), embed):
        if module is not None:
            hooks.after(module, as_root)


# The model's own state.


def all_modules(model: LensModel) -> list[nn.Module]:
    """Every module of a model and of the Hugging Face model that it wraps, each once."""
    # A bridge's own tree leaves out some modules of the model it wraps (GPT-2's first dropout).
    # Each is looked into once, which `modules()` of both trees, one within the other, does not.
    every: dict[nn.Module, None] = {}
    ahead: list[Any] = [getattr(model, "original_model", None), model]
    while ahead:
        module = ahead.pop()
        if module is not None and module not in every:
            every[module] = None
            ahead += reversed(module._modules.values())
    return list(every)


@contextmanager
def in_eval_mode(model: LensModel) -> Generator[None, None, None]:
    """Eval mode within (no dropout, so no random numbers drawn), each module's own mode after."""
    training = [module for module in all_modules(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _keeping_nothing(model: LensModel) -> Generator[None, None, None]:
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


def _check_differentiable(model: LensModel) -> None:
    """Refuse packed weights: what is computed with them cuts the graph, wholly or in part."""
    for module in all_modules(model):
        # PyTorch's quantised modules unpack their weight in a method.
        if callable(getattr(type(module), "weight", None)):
            raise NotImplementedError(
                f"this model is quantised: {type(module).__module__}.{type(module).__name__}"
                f" computes with packed weights, which autograd cannot follow, so every gradient"
                f" below would lack a part; load the model in float32, bfloat16 or float16"
            )
