"""The parameter that a site's weight lives in: to read it, and to change it in place.

Models keep a weight W [d_in, d_out] transposed (`nn.Linear`), as it is (GPT-2's `Conv1D`), head by
head (HookedTransformer's attention), or as a slice of one parameter for all experts; a `Weight`
shows it as [d_in, d_out] in every case. With grouped queries `W_K` and `W_V` have the width of the
model's own key and value heads, unrepeated.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)
# pyright: reportPrivateUsage=false
# (torch has no other way to a module's own children and tensors.)

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from types import CellType, FunctionType
from typing import Any
from weakref import ProxyTypes, proxy

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from bwlens.model.passes import all_modules
from bwlens.model.places import SHARED, ExpertTap, Site, Tap
from bwlens.model.protocol import LensModel
from bwlens.model.sites import check_model, find_taps, resolve_layers

_STORED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight matrix of a model, where it lives.

    Attributes:
        site: Which one it is, its layer counted from 0.
        live: The model's own memory, off the graph. [d_in, d_out], or with the heads apart in
            HookedTransformer's attention: [d_in, head, d_head] and, for W_O, [head, d_head, d_out].
            What is written here changes the model.
        shape: (d_in, d_out).
    """

    site: Site
    live: Float[Tensor, ...]
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        """What the model stores the weight in."""
        return self.live.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.live.device

    def read(self) -> Float[Tensor, "d_in d_out"]:
        """A copy of the weight."""
        return self.live.clone(memory_format=torch.contiguous_format).view(self.shape)

    def write(self, values: Float[Tensor, "d_in d_out"]) -> None:
        """Put these values in the weight's place, in the model, rounded to its dtype.

        Raises:
            ValueError: The values have another shape than the weight.
        """
        self._check(values)
        with torch.no_grad():
            self.live.copy_(values.reshape(self.live.shape))

    def add(self, change: Float[Tensor, "d_in d_out"]) -> None:
        """W += change, in the model; summed in float32 at least, then rounded once.

        Raises:
            ValueError: The change has another shape than the weight.
        """
        self._check(change)
        self.write(self.plus(change))

    def plus(self, change: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "d_in d_out"]:
        """W + change in the weight's dtype, summed in float32 at least; nothing is written."""
        wide = torch.promote_types(torch.promote_types(self.dtype, change.dtype), torch.float32)
        total = self.live.reshape(self.shape).to(wide) + change.to(self.device, wide)
        return total.to(self.dtype)

    def _check(self, values: Tensor) -> None:
        if tuple(values.shape) != self.shape:
            raise ValueError(
                f"{self.site} is a [{self.shape[0]}, {self.shape[1]}] matrix (d_in, d_out), found"
                f" values of shape {list(values.shape)}"
            )


def weight_of(model: LensModel, site: Site) -> Weight:
    """The weight of a site, in the model's own memory; negative layers count from the end.

    Raises:
        ValueError: The model has no such matrix, layer or expert.
        NotImplementedError: The weight is quantised, not in memory, computed from other parameters,
            or shared between layers, so that it cannot be changed alone.

    Example:
        >>> weight = weight_of(model, Site("W_out", 3))  # doctest: +SKIP
        >>> weight.shape  # doctest: +SKIP
        (768, 192)
    """
    return weights_of(model, [site])[site]


def weights_of(model: LensModel, sites: Iterable[Site]) -> dict[Site, Weight]:
    """The weights of several sites, by the sites asked for; raises as `weight_of` does."""
    check_model(model)
    memory = _Memory(model)
    return {site: _weight(model, site, memory) for site in sites}


def weights_among(model: LensModel, sites: Iterable[Site]) -> dict[Site, Weight]:
    """Those of the sites' weights that `weight_of` would give."""
    check_model(model)
    memory, weights = _Memory(model), dict[Site, Weight]()
    for site in sites:
        with suppress(ValueError, NotImplementedError):
            weights[site] = _weight(model, site, memory)
    return weights


def _weight(model: LensModel, site: Site, memory: _Memory) -> Weight:
    taps = find_taps(model, [site.matrix], site.layer)
    own = Site(site.matrix, resolve_layers(model, site.layer)[0], site.expert)
    parameter, live = _stored(taps, own)
    _check_stored(parameter, own)
    memory.check_unshared(parameter, own)
    live = live.detach()
    per_head_in = live.ndim == 3 and own.matrix == "W_O"
    d_in = live.shape[0] * live.shape[1] if per_head_in else live.shape[0]
    return Weight(own, live, (d_in, live.numel() // d_in))


def parameter_of(tap: Tap | ExpertTap, site: Site) -> tuple[Any, Tensor]:
    """The parameter that holds a site's weight, and the weight in it as `Weight.live` has it.

    Raises:
        NotImplementedError: The module has no such parameter (packed, an adapter).
    """
    return _stored([tap], site)


def copy_of(model: LensModel) -> Any:
    """A copy of a model that shares no storage with it and outlives it.

    A bridge's hooks are closures that `copy.deepcopy` leaves reaching into the first model: they
    are made anew. What modules keep of their last pass is copied off the autograd graph.
    """
    memo: dict[Any, Any] = {}
    for module in all_modules(model):
        for parameter in module.parameters(recurse=False):
            if type(parameter) is nn.Parameter and id(parameter) not in memo:
                values = copy.deepcopy(parameter.detach(), memo)
                memo[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
        for kept in vars(module).values():
            if isinstance(kept, torch.Tensor) and not kept.is_leaf:
                memo[id(kept)] = kept.detach().clone()
    twin = copy.deepcopy(model, memo)
    for module in all_modules(twin):
        for holder in (vars(module), *(vars(module)[name] for name in _HOOKS)):
            for key, value in holder.items():
                if isinstance(value, FunctionType) and value.__closure__:
                    holder[key] = _rehung(value, memo)
    return twin


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _rehung(function: FunctionType, memo: dict[Any, Any]) -> FunctionType:
    """A function whose closure holds the copies of what it held."""
    cells = []
    for cell in function.__closure__ or ():
        content = cell.cell_contents
        weak = isinstance(content, ProxyTypes)
        target = content.__repr__.__self__ if weak else content  # what a proxy stands for
        twin = memo.get(id(target))
        cells.append(cell if twin is None else CellType(proxy(twin) if weak else twin))
    made = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells),
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _stored(taps: list[Tap | ExpertTap], site: Site) -> tuple[Any, Tensor]:
    """The parameter of one of a layer's sites, and the weight in it with d_in first."""
    experts: list[Any] = []
    for tap in taps:
        if isinstance(tap, Tap):
            if tap.site == site:
                return _own_parameter(tap)
            experts += [] if tap.site.expert is None else [tap.site.expert]
            continue
        name, names = next(pair for pair in tap.weights.items() if site.matrix in pair[1])
        parameter = getattr(tap.experts, name)
        if isinstance(site.expert, int) and 0 <= site.expert < len(parameter):
            part = parameter[site.expert].chunk(len(names))[names.index(site.matrix)]
            return parameter, part.T
        experts += range(len(parameter))
    if not experts:
        raise ValueError(f"{site}: that layer is no mixture of experts; leave the expert out")
    fault = "names no expert" if site.expert is None else "does not exist"
    numbers = [expert for expert in experts if isinstance(expert, int)]
    more = " and the shared one ('shared')" if SHARED in experts else ""
    raise ValueError(
        f"{site} {fault}; that layer has the experts {min(numbers)} to {max(numbers)}{more}"
    )


def _own_parameter(tap: Tap) -> tuple[Any, Tensor]:
    """The parameter, and the weight in it with d_in first."""
    holder, name = tap.holder, tap.site.matrix
    # HookedTransformer keeps weights under their names; with grouped queries W_K and W_V repeat
    # the heads of _W_K and _W_V.
    for attribute in (f"_{name}", name):
        parameter = holder._parameters.get(attribute)
        if parameter is not None:
            by_head = parameter.ndim == 3 and name != "W_O"  # [head, d_in, d_head]
            return parameter, parameter.movedim(0, 1) if by_head else parameter
    linear = holder._modules.get(name, holder)
    parameter = linear._parameters.get("weight") if isinstance(linear, nn.Module) else None
    kind = type(linear).__name__
    if parameter is None or parameter.ndim != 2:
        raise NotImplementedError(
            f"{tap.site}: {kind} holds no matrix `weight` of its own (an adapter or a"
            f" parametrisation?); merge it into the model's weights first"
        )
    if isinstance(linear, nn.Linear):
        if tap.gated_heads:
            by_head = "(head half d_head) d_in -> half d_in head d_head"
            return parameter, rearrange(parameter, by_head, head=tap.gated_heads, half=2)[0]
        return parameter, parameter.T
    if hasattr(linear, "nf"):  # transformers' Conv1D
        return parameter, parameter
    raise NotImplementedError(
        f"{tap.site}: {kind} is neither nn.Linear nor Conv1D, so which side of its weight"
        f" {list(parameter.shape)} is the input is not known"
    )


def _check_stored(parameter: Tensor, site: Site) -> None:
    """Plain numbers in memory, which can be added to."""
    kind = "" if type(parameter.data) is Tensor else f" ({type(parameter.data).__name__})"
    if parameter.is_meta:
        raise NotImplementedError(
            f"{site} is not in memory (offloaded, or never loaded); load the model whole, without"
            f" offloading to CPU or disk"
        )
    if parameter.dtype not in _STORED or kind or parameter.is_sparse:
        raise NotImplementedError(
            f"{site} is stored as {parameter.dtype}{kind}, quantised; load the model in float32,"
            f" bfloat16 or float16"
        )


class _Memory:
    """Which bytes the parameters of each block lie in, to find those of several blocks."""

    def __init__(self, model: LensModel) -> None:
        self._spans = sorted(
            (*span, layer)
            for layer, block in enumerate(model.blocks)
            for parameter in block.parameters()
            if (span := _range(parameter))[0] < span[1]
        )
        # The furthest end of each span and those before it: where to stop looking back.
        self._ends = list(accumulate((stop for _, stop, _ in self._spans), max))

    def check_unshared(self, parameter: Tensor, site: Site) -> None:
        """No other layer computes with the same memory."""
        first, last = _range(parameter)
        at = bisect_left(self._spans, (last,)) - 1
        while at >= 0 and self._ends[at] > first:
            _, stop, layer = self._spans[at]
            if stop > first and layer != site.layer:
                raise NotImplementedError(
                    f"{site} is shared with layer {layer}, so a change cannot be made in one layer"
                    f" alone"
                )
            at -= 1


def _range(tensor: Tensor) -> tuple[int, int]:
    """First and last byte of a tensor's memory; distinct for distinct tensors of one storage."""
    start = tensor.data_ptr() if not tensor.is_meta else 0
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (span * tensor.element_size() if start and tensor.numel() else 0)
