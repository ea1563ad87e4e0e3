"""Where a head's scores pass, whichever code computes them, and putting other patterns in place.

A head's scores are the product of its queries and keys of which a softmax is taken; both are seen
as torch computes them inside a block's attention, so no model's own hook points, scale, soft cap,
mask or sliding window need be known. A kernel that keeps its scores to itself is taken apart for
the time (`scaled_dot_product_attention`), or switched to "eager" and back (flash, flex).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bwlens.model.blocks import attention_of, contents
from bwlens.model.locking import alone_with, for_this_thread
from bwlens.model.losses import Run, forward
from bwlens.model.passes import all_modules, called_instead
from bwlens.model.prompts import Batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, check_model, resolve_layers

Change = Callable[[Float[Tensor, "batch head query key"]], Float[Tensor, "batch head query key"]]
"""What is put in the place of a layer's attention pattern."""

_PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum", "baddbmm"}
_TIMES = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"}
_OVER = {"div", "__truediv__", "div_", "__itruediv__", "true_divide", "divide"}
_SAME = {
    "transpose", "view", "reshape", "permute", "contiguous", "expand", "unsqueeze", "flatten",
    "repeat_interleave", "to", "float", "double", "clone", "swapaxes", "type",
}  # fmt: skip
"""Functions after which a tensor is still the same numbers, in another order or form."""


@dataclass(eq=False)
class Attended:
    """What passed one layer's attention in a forward pass.

    Attributes:
        layer: The layer.
        batch: How many prompts there are.
        product: Queries times keys [..., query, key], before scale, cap and mask.
        query: The queries in that product.
        key: The keys in it.
        factor: What queries and keys had been multiplied by together before.
        scores: What the softmax was taken of; one column more where the layer has a sink.
        pattern: What it gave.
        arrived: Called with R = dL/d(product) * factor as it comes by in a backward pass.
        pattern_arrived: Called with dL/d(pattern), of the same shape, before that.
    """

    layer: int
    batch: int
    product: Tensor
    query: Tensor
    key: Tensor
    factor: float
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    pattern: Tensor = field(default_factory=lambda: torch.empty(0))
    arrived: Callable[[Tensor], None] | None = None
    pattern_arrived: Callable[[Tensor], None] | None = None

    def by_head(self, tensor: Tensor) -> Float[Tensor, "batch head query key"]:
        """Any of these maps, a sink's column left out."""
        n_query, n_key = self.product.shape[-2:]
        return tensor[..., :n_key].reshape(self.batch, -1, n_query, n_key)

    def takes(self, scores: Tensor) -> bool:
        """Whether scores may come from this product, by their shape."""
        *heads, n_query, n_key = self.product.shape
        *rows, n_rows, n_columns = scores.shape
        same = torch.Size(heads).numel() == torch.Size(rows).numel() and n_query == n_rows
        return same and n_columns - n_key in (0, 1)

    def through(self, scores_gradient: Tensor) -> Float[Tensor, "batch head query key"]:
        """What R would be with another gradient of the scores."""
        (found,) = torch.autograd.grad(
            self.scores, self.product, scores_gradient, retain_graph=True
        )
        return self.by_head(found) * self.factor

    def product_hook(self, gradient: Tensor) -> None:
        """A gradient has reached the product."""
        if self.arrived is not None:
            self.arrived(self.by_head(gradient) * self.factor)

    def pattern_hook(self, gradient: Tensor) -> None:
        """A gradient has reached the pattern."""
        if self.pattern_arrived is not None:
            self.pattern_arrived(gradient)


class _Scores(TorchFunctionMode):
    """Sees the products and softmaxes that are taken in one layer's attention."""

    def __init__(self, layer: int, batch: int, act: Callable[[Attended], Tensor | None]) -> None:
        super().__init__()
        self._layer, self._batch, self._act = layer, batch, act
        self._products: list[Attended] = []
        self._factors: dict[int, tuple[float, Tensor]] = {}  # with the tensor, to keep its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            with self:
                return _in_the_open(*args, **kwargs)
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        if name == "softmax":
            return self._softmax(args[0] if args else kwargs["input"], out)
        if name in _PRODUCTS:
            return self._product(name, args, kwargs, out)
        self._follow(name, args, out)
        return out

    def _follow(self, name: str, args: tuple[Any, ...], out: Tensor) -> None:
        """Plain numbers that queries and keys are multiplied by before they meet."""
        factor = self._factor(args[0]) if args else 1.0
        other: Any = args[1] if len(args) > 1 else None
        if isinstance(other, Tensor) and other.ndim == 0 and not other.requires_grad:
            other = float(other)
        number = isinstance(other, int | float)
        if name in _TIMES and number:
            factor *= other
        elif name in _OVER and number:
            factor /= other
        elif name not in _SAME:
            return
        if factor != 1.0:
            self._factors[id(out)] = (factor, out)

    def _factor(self, tensor: Any) -> float:
        return self._factors.get(id(tensor), (1.0,))[0]

    def _product(self, name: str, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        factors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        factor = 1.0
        if name == "baddbmm":
            factors, factor = factors[1:], float(kwargs.get("alpha", 1.0))
        if len(factors) != 2 or out.ndim < 3:
            return out
        query, key = factors
        factor *= self._factor(query) * self._factor(key)
        attended = Attended(self._layer, self._batch, out, query, key, factor)
        self._products.append(attended)
        if not out.requires_grad:
            return out
        out.register_hook(attended.product_hook)
        return out.clone()  # which may be changed in place

    def _softmax(self, scores: Tensor, out: Tensor) -> Tensor:
        taken = [one for one in self._products if scores.ndim >= 3 and one.takes(scores)]
        if not taken:
            return out
        attended = taken[-1]
        attended.scores, attended.pattern = scores, out
        if out.requires_grad:
            out.register_hook(attended.pattern_hook)
        new = self._act(attended)
        return out if new is None else new


def _in_the_open(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as torch's documentation writes it down."""
    if dropout_p:
        raise NotImplementedError("attention with dropout; put the model in eval mode")
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        lowest = torch.finfo(scores.dtype).min
        hidden = attn_mask.dtype is torch.bool
        scores = scores.masked_fill(~attn_mask, lowest) if hidden else scores + attn_mask
    return torch.softmax(scores, dim=-1) @ value


def attentions(model: LensModel, layers: Layers = None) -> dict[int, nn.Module]:
    """The attention of each layer asked for; of all, those that have one.

    Raises:
        ValueError: A layer out of range.
        NotImplementedError: A layer asked for has none, or several; or no layer has one.
    """
    check_model(model)
    parts: dict[int, nn.Module] = {}
    for layer in resolve_layers(model, layers):
        part = attention_of(model.blocks[layer])
        if part is not None:
            parts[layer] = part
        elif layers is not None:
            raise NotImplementedError(
                f"layer {layer} has no attention map: it is made of {contents(model.blocks[layer])}"
            )
    if not parts:
        made_of = contents(model.blocks[0])
        raise NotImplementedError(
            f"this model has no attention that bwlens can read: its blocks are made of {made_of}"
        )
    return parts


def attended(
    model: LensModel,
    batch: Batch,
    objective: Callable[[Tensor, Batch], Tensor],
    layers: Layers = None,
    **options: Any,
) -> tuple[Run, dict[int, Attended]]:
    """A forward pass with its losses, and what passed the attention of each layer.

    Args:
        model: A TransformerBridge or HookedTransformer.
        batch: The prompts.
        objective: Gives their losses.
        layers: Which; None is all that have a map.
        options: As `passes.run` has them.

    Raises:
        NotImplementedError: As `attentions`; a layer asked for takes no softmax of queries times
            keys (a recurrence), several, or not of one key for each token.
    """
    with watched(model, layers) as seen:
        run = forward(model, batch, objective, around=seen.around, **options)
    return run, seen.passed(batch)


@dataclass(eq=False)
class Watched:
    """Attentions that a pass is to be watched at.

    Attributes:
        around: What the pass calls instead of each (`passes.run`).
    """

    around: dict[nn.Module, Callable[[Any, Any, Any], Any]]
    _seen: dict[int, list[Attended]]
    _contents: dict[int, str]
    _named: bool

    def passed(self, batch: Batch) -> dict[int, Attended]:
        """What has passed each layer's attention.

        Raises:
            NotImplementedError: As `attended`.
        """
        n_pos = batch.tokens.shape[1]
        maps: dict[int, Attended] = {}
        for layer, several in self._seen.items():
            if not several and not self._named:
                continue
            what = f"the attention of layer {layer} ({self._contents[layer]})"
            if len(several) != 1:
                raise NotImplementedError(
                    f"{what} took {len(several)} softmaxes of queries times keys; expected one, so"
                    f" it has no attention map that bwlens can read; ask for other layers"
                )
            one = several[0]
            if one.product.shape[-2:] != (n_pos, n_pos):
                raise NotImplementedError(
                    f"{what} scores {one.product.shape[-1]} keys for {n_pos} tokens, so they are no"
                    f" map from token to token; ask for other layers"
                )
            maps[layer] = one
        if not maps:
            raise NotImplementedError(
                "no layer of this model took a softmax of queries times keys, so it has no"
                " attention maps (a recurrence has none)"
            )
        return maps


@contextmanager
def watched(model: LensModel, layers: Layers = None) -> Generator[Watched, None, None]:
    """Whatever pass is run within may be watched; its scores are shown meanwhile.

    Raises:
        ValueError, NotImplementedError: As `attentions`.
    """
    parts = attentions(model, layers)
    seen: dict[int, list[Attended]] = {layer: [] for layer in parts}

    around = {part: _around(layer, seen[layer].append) for layer, part in parts.items()}
    what = {layer: contents(model.blocks[layer]) for layer in parts}
    with shown_scores(model):
        yield Watched(around, seen, what, layers is not None)


def lowest(passed: Mapping[int, Attended]) -> tuple[list[Tensor], list[str]]:
    """How far down a backward pass must go for every R to come by, as `Run.gradients` takes it."""
    layer = min(passed)
    return [passed[layer].query], [f"the queries of layer {layer}"]


@contextmanager
def changed_patterns(
    model: LensModel, changes: Mapping[int, Change]
) -> Generator[None, None, None]:
    """Each layer's pattern [batch, head, query, key] is what its change makes of it, meanwhile.

    Also where the user runs the model; other threads are refused it.

    Raises:
        ValueError, NotImplementedError: As `attentions`.
    """
    parts = attentions(model, list(changes))
    with ExitStack() as stack:
        stack.enter_context(for_this_thread(model))
        stack.enter_context(shown_scores(model))
        for layer, part in parts.items():

            def act(one: Attended, change: Change = changes[layer]) -> Tensor:
                n_key = one.product.shape[-1]
                new = change(one.by_head(one.pattern)).to(one.pattern)
                new = new.reshape(*one.pattern.shape[:-1], n_key)
                return torch.cat([new, one.pattern[..., n_key:]], dim=-1)

            stack.enter_context(called_instead(part, _around(layer, act)))
        yield


def _around(layer: int, act: Callable[[Attended], Tensor | None]) -> Callable[[Any, Any, Any], Any]:
    def around(forward: Any, args: Any, kwargs: Any) -> Any:
        first = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        with _Scores(layer, len(first), act):
            return forward(*args, **kwargs)

    return around


@contextmanager
def shown_scores(model: LensModel) -> Generator[None, None, None]:
    """Attention that a kernel computes out of sight is computed by "eager" meanwhile."""
    configs = {id(c): c for m in all_modules(model) if (c := getattr(m, "config", None))}
    hiding = {
        key: way
        for key, c in configs.items()
        if isinstance(way := getattr(c, "_attn_implementation", None), str)
        and way not in ("eager", "sdpa")
    }
    with alone_with(model):
        try:
            for key in hiding:
                configs[key]._attn_implementation = "eager"
            yield
        finally:
            for key, way in hiding.items():
                configs[key]._attn_implementation = way
