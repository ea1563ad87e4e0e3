"""Where the weights are, and where their x and z pass.

The only room that knows TransformerLens' insides. A weight matrix W computes ``z = x W``; a
`Tap` names the modules that hand over `x` (what enters W) and `z` (what leaves it), on a
TransformerBridge (raw or in compatibility mode) and on a HookedTransformer alike. Sites are found
because a module has the parts, never because a model is called by some name.

Tensors are taken from modules by plain PyTorch hooks rather than by TransformerLens hook names:
compatibility mode renames hook points, silences some of them, and shows others through reshaping
copies that are off the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

MATRICES = ("W_in", "W_gate", "W_out", "W_Q", "W_K", "W_V", "W_O")
"""Names of the weight matrices of a transformer block, TransformerLens' own."""

_PROJECTIONS = {
    # The dense layers of a model with mixtures elsewhere have names of their own.
    "W_in": ("mlp", ("in", "input", "dense_in")),
    "W_gate": ("mlp", ("gate", "dense_gate")),
    "W_out": ("mlp", ("out", "dense_out")),
    "W_Q": ("attn", ("q",)),
    "W_K": ("attn", ("k",)),
    "W_V": ("attn", ("v",)),
    "W_O": ("attn", ("o",)),
}


@dataclass(frozen=True, order=True)
class Site:
    """One weight matrix: its name, its layer (from 0) and, in a mixture, its expert."""

    matrix: str
    layer: int
    expert: int | None = None

    def __str__(self) -> str:
        expert = "" if self.expert is None else f", expert {self.expert}"
        return f"{self.matrix} of layer {self.layer}{expert}"


def as_site(key: Any) -> Site:
    """A site from what stands in the brackets of `grads["W_in", 3]`, an expert's number last.

    Raises:
        KeyError: Neither a `Site` nor a matrix and a layer.
    """
    if isinstance(key, Site):
        return key
    if isinstance(key, tuple) and len(key) in (2, 3):
        return Site(*key)
    raise KeyError(f"{key!r} is no matrix and layer; write grads['W_in', 3], or a Site")


@dataclass(frozen=True)
class Point:
    """A tensor on its way: what goes into a module, or what comes out of it.

    An input is the positional argument at `index`, or the keyword argument `keyword` if given.
    A `branch` parts from its tensor here: its gradient is that of what follows this module, without
    the other ways that the same tensor goes (an MLP's input without the residual stream).
    """

    module: nn.Module
    side: Literal["input", "output"]
    keyword: str | None = None
    index: int = 0
    branch: bool = False

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """The tensor itself, out of a forward call's arguments and result."""
        if self.side == "output":
            return output[0] if isinstance(output, tuple | list) else output
        if self.keyword is not None and self.keyword in kwargs:
            return kwargs[self.keyword]
        return args[self.index]


@dataclass(frozen=True, eq=False)
class Tap:
    """A site with the places its x and z may pass, the most exact first.

    Not every hook point fires in every mode, so there can be several candidates; the first that
    fires is used. In a mixture of experts, `routing` gives the experts chosen for each token
    [token, choice], and the rows of x are the tokens sent to this expert, by choice, then token.
    `holder` is the module that keeps the weight itself.
    """

    site: Site
    x: tuple[Point, ...]
    z: tuple[Point, ...]
    holder: nn.Module
    routing: Point | None = None


@dataclass(frozen=True, eq=False)
class ExpertTap:
    """The experts of one layer that keep their weights in batched 3-D parameters.

    No hook point sees them: `experts` multiplies slices of `weights` in a loop. `weights` maps the
    name of a parameter to the matrices its slices hold, in the order of their output columns.
    """

    layer: int
    experts: Any
    weights: dict[str, tuple[str, ...]]

    @property
    def routing(self) -> Point:
        """Where the experts chosen for each token pass: [token, choice]."""
        return Point(self.experts, "input", "top_k_index", 1)


def find_taps(
    model: Any, matrices: Sequence[str], layers: Iterable[int] | int | None = None
) -> list[Tap | ExpertTap]:
    """Every tap of the matrices and layers asked for, layer by layer.

    Args:
        model: A TransformerBridge or HookedTransformer.
        matrices: Names out of `MATRICES`.
        layers: Layer indices from 0 (negative ones count from the end); None for all.

    Raises:
        ValueError: Unknown matrix, layer out of range, or no layer has such a matrix.
        NotImplementedError: The model is no decoder-only model that runs in this process, or keeps
            its weights in a form that no hook sees.
    """
    check_model(model)
    unknown = [name for name in matrices if name not in MATRICES]
    if unknown or not matrices:
        found = ", ".join(map(repr, unknown)) or "none at all"
        raise ValueError(f"matrices must be among {', '.join(MATRICES)}; found {found}")
    wanted = resolve_layers(model, layers)
    taps = [
        tap
        for layer in wanted
        for part in ("mlp", "attn")
        if (names := [m for m in matrices if _PROJECTIONS[m][0] == part])
        for tap in _taps_of(getattr(model.blocks[layer], part, None), layer, names)
    ]
    held = {m for tap in taps for m in _matrices_of(tap)}
    missing = [name for name in matrices if name not in held]
    if missing:
        where = f"layers {wanted[0]}-{wanted[-1]}" if len(wanted) > 1 else f"layer {wanted[0]}"
        raise ValueError(
            f"{', '.join(missing)}: no such matrix in {where} of this model; "
            f"it has {', '.join(available_matrices(model)) or 'none of those bwlens knows'}"
        )
    return taps


def plain_taps(
    model: Any, matrices: Sequence[str], layers: Iterable[int] | int | None, why: str
) -> list[Tap]:
    """The taps of weights that every token passes; `why` tells the user what asks for these.

    Raises:
        ValueError: As `find_taps` does.
        NotImplementedError: A mixture of experts, whose tokens go to different weights.
    """
    plain = []
    for tap in find_taps(model, matrices, layers):
        if not isinstance(tap, Tap) or tap.site.expert is not None:
            layer = tap.site.layer if isinstance(tap, Tap) else tap.layer
            raise NotImplementedError(f"layer {layer} is a mixture of experts; {why}")
        plain.append(tap)
    return plain


def available_matrices(model: Any) -> tuple[str, ...]:
    """The names out of `MATRICES` that some layer of the model has."""
    check_model(model)
    held: set[str] = set()
    for layer, block in enumerate(model.blocks):
        for part in ("mlp", "attn"):
            names = [m for m in MATRICES if _PROJECTIONS[m][0] == part]
            for tap in _taps_of(getattr(block, part, None), layer, names):
                held.update(_matrices_of(tap))
    return tuple(m for m in MATRICES if m in held)


def resolve_layers(model: Any, layers: Iterable[int] | int | None) -> list[int]:
    """Layer indices in ascending order, negative ones counted from the end.

    Raises:
        ValueError: A layer is out of range or no whole number, or none is named.
    """
    n_layers = len(model.blocks)
    if layers is None:
        return list(range(n_layers))
    given: Any = layers
    several = isinstance(given, Iterable) and not isinstance(given, str)
    asked: list[Any] = list(given) if several else [given]
    if odd := [layer for layer in asked if not hasattr(layer, "__index__")]:
        raise ValueError(
            f"layer {odd[0]!r} asked for; expected whole numbers, 0 to {n_layers - 1} (or"
            f" -{n_layers} to -1 from the end)"
        )
    bad = [layer for layer in asked if not -n_layers <= layer < n_layers]
    if bad or not asked:
        found = f"layer {bad[0]}" if bad else "an empty list of layers"
        raise ValueError(
            f"{found} asked for, but this model has layers 0 to {n_layers - 1}"
            f" (or -{n_layers} to -1 from the end)"
        )
    return sorted({layer % n_layers for layer in asked})


def resolve_layer(model: Any, layer: int) -> int:
    """The index of one layer, counted from 0.

    Raises:
        ValueError: It is out of range, no whole number, or several.
    """
    found = resolve_layers(model, layer)
    if len(found) > 1:
        raise ValueError(f"layers {found} asked for where one layer is edited; name one")
    return found[0]


def check_model(model: Any) -> None:
    """Refuse a model that bwlens cannot read, saying what was found.

    Raises:
        TypeError: Not a TransformerLens model at all.
        NotImplementedError: A remote model, an encoder or encoder-decoder, or a model without a
            stack of blocks.
    """
    name = type(model).__name__
    if not hasattr(model, "hook_dict"):
        raise TypeError(
            f"expected a TransformerLens model (TransformerBridge or HookedTransformer), found"
            f" {name}; load one with bwlens.load_model(...) or"
            f" TransformerBridge.boot_transformers(...)"
        )
    if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
        raise NotImplementedError(
            f"this {name} holds no weights in this process (a vLLM or remote model?), so it has"
            f" no gradients here; boot it with TransformerBridge.boot_transformers(...)"
        )
    config = getattr(getattr(model, "original_model", None), "config", None)
    if getattr(config, "is_encoder_decoder", False) or hasattr(model, "decoder_blocks"):
        raise NotImplementedError(
            f"this {name} is an encoder-decoder; bwlens reads decoder-only language models"
        )
    cfg = getattr(model, "cfg", None)
    if getattr(cfg, "attention_dir", "causal") != "causal":
        raise NotImplementedError(
            f"this {name} attends in both directions; bwlens reads causal language models, where"
            f" no token sees what comes after it"
        )
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise NotImplementedError(
            f"this {name} has no stack of transformer blocks (model.blocks); bwlens reads"
            f" decoder-only language models"
        )
    if getattr(model, "unembed", None) is None:
        raise NotImplementedError(f"this {name} has no unembedding, so nothing to read a lens with")


def _matrices_of(tap: Tap | ExpertTap) -> set[str]:
    if isinstance(tap, Tap):
        return {tap.site.matrix}
    return {matrix for matrices in tap.weights.values() for matrix in matrices}


def _taps_of(part: Any, layer: int, names: list[str]) -> list[Tap | ExpertTap]:
    """The taps of an MLP or attention module, by whichever parts it shows."""
    if part is None:
        return []
    if (experts := _batched_experts(part)) is not None:
        weights = {
            parameter: matrices
            for parameter, matrices in experts[1].items()
            if any(m in names for m in matrices)
        }
        return [ExpertTap(layer, experts[0], weights)] if weights else []
    if isinstance(getattr(part, "experts", None), nn.ModuleList):
        return [
            tap
            for index, expert in enumerate(part.experts)
            for tap in _hooked_taps(
                expert, layer, names, index, Point(part.hook_expert_indices, "output")
            )
        ]
    if hasattr(part, "hook_in") and hasattr(part, "hook_out"):
        return _bridge_taps(part, layer, names)
    return _hooked_taps(part, layer, names)


def _bridge_taps(part: Any, layer: int, names: list[str]) -> list[Tap | ExpertTap]:
    """Each projection of a bridge is a component with a hook_in and a hook_out of its own."""
    taps: list[Tap | ExpertTap] = []
    for name in names:
        if name == "W_gate" and not any(a in part._modules for a in _PROJECTIONS["W_in"][1]):
            continue  # alone, it is the router of a mixture
        for attribute in _PROJECTIONS[name][1]:
            projection = part._modules.get(attribute)
            if projection is None or not hasattr(projection, "hook_out"):
                continue
            x = [Point(projection.hook_in, "output")]
            z = [Point(projection.hook_out, "input")]
            # hook_in is silent in compatibility mode's gated MLPs; the container's is the same x.
            if name not in ("W_out", "W_O"):
                x.append(Point(part.hook_in, "output"))
            # hook_out is silent with use_attn_result; the container's is the same z.
            if name == "W_O":
                z.append(Point(part.hook_out, "input"))
            taps.append(Tap(Site(name, layer), tuple(x), tuple(z), _unwrapped(projection)))
            break
    return taps


def _hooked_taps(
    part: Any,
    layer: int,
    names: list[str],
    expert: int | None = None,
    routing: Point | None = None,
) -> list[Tap | ExpertTap]:
    """HookedTransformer keeps the weights on the MLP or attention module itself."""
    whole_in, whole_out = Point(part, "input"), Point(part, "output")
    gate, linear = ("hook_pre", "hook_pre_linear")
    if hasattr(part, "hook_gate"):  # an expert names them differently
        gate, linear = ("hook_gate", "hook_pre")
    gated = hasattr(part, "W_gate")
    ways: dict[str, tuple[Point, str | Point]] = {
        "W_in": (whole_in, linear if gated else "hook_pre"),
        "W_gate": (whole_in, gate),
        "W_Q": (Point(part, "input", "query_input"), "hook_q"),
        "W_K": (Point(part, "input", "key_input"), "hook_k"),
        "W_V": (Point(part, "input", "value_input"), "hook_v"),
    }
    if hasattr(part, "hook_post"):
        ways["W_out"] = (Point(part.hook_post, "output"), whole_out)
    if hasattr(part, "hook_z"):
        ways["W_O"] = (Point(part.hook_z, "output"), whole_out)
    taps: list[Tap | ExpertTap] = []
    for name in names:
        if name not in ways or not hasattr(part, name) or getattr(part, name) is None:
            continue
        x, z = ways[name]
        z_point = z if isinstance(z, Point) else Point(getattr(part, z), "input")
        taps.append(Tap(Site(name, layer, expert), (x,), (z_point,), part, routing))
    return taps


def _batched_experts(part: Any) -> tuple[nn.Module, dict[str, tuple[str, ...]]] | None:
    """The experts module with 3-D parameters inside a mixture, and what its parameters hold."""
    experts = getattr(_unwrapped(part), "experts", None)
    if experts is None:
        return None
    experts = _unwrapped(experts)
    batched = {name for name, parameter in experts.named_parameters() if parameter.ndim == 3}
    if not batched:
        return None
    plain = getattr(experts, "is_concatenated", True) and not getattr(
        experts, "is_transposed", False
    )
    if batched != {"gate_up_proj", "down_proj"} or not plain:
        raise NotImplementedError(
            f"{type(experts).__name__} keeps its experts' weights in {', '.join(sorted(batched))}"
            f" ({'plain' if plain else 'transposed or interleaved'}); bwlens reads experts with a"
            f" plain gate_up_proj and down_proj"
        )
    return experts, {"gate_up_proj": ("W_gate", "W_in"), "down_proj": ("W_out",)}


def _unwrapped(module: nn.Module) -> nn.Module:
    """The Hugging Face module inside the components of a bridge."""
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner
    return module


_SWITCHES = {
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_result": "use_attn_result",
}
"""Hook points that fire only when a flag of the model asks for them."""


@contextmanager
def hook_points(
    model: Any, names_filter: str | Sequence[str] | Callable[[str], bool]
) -> Iterator[tuple[dict[str, Point], bool]]:
    """The hook points that a filter lets through, switched on for the time of the context.

    Gives them by name, and whether each was asked for by name (rather than by a predicate).

    Raises:
        ValueError: No hook point has that name.
    """
    check_model(model)
    known = model.hook_dict
    required = not callable(names_filter)
    if callable(names_filter):
        names = [name for name in known if names_filter(name)]
    else:
        names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        for name in names:
            if name not in known:
                last = name.rpartition(".")[2]
                close = [k for k in known if k.endswith("." + last)][:3] or list(known)[:3]
                raise ValueError(f"no hook point {name!r} in this model; there are {close} ...")
    flags = {f for name in names if (f := _SWITCHES.get(name.rpartition(".")[2]))}
    if not required and {"use_attn_in", "use_split_qkv_input"} <= flags:
        flags -= {"use_attn_in", "use_split_qkv_input"}  # mutually exclusive
    before = {flag: bool(getattr(model.cfg, flag, False)) for flag in flags}
    # A predicate takes what this model can switch on.
    tolerated = () if required else (NotImplementedError, ValueError, AssertionError)
    try:
        for flag in flags:
            with suppress(*tolerated):
                if not before[flag]:
                    getattr(model, f"set_{flag}")(True)
        yield {name: Point(known[name], "output", branch=_parts(name)) for name in names}, required
    finally:
        for flag, value in before.items():
            if bool(getattr(model.cfg, flag, False)) != value:
                getattr(model, f"set_{flag}")(value)


def _parts(name: str) -> bool:
    """Whether a hook point stands on a branch of its own.

    The residual stream is the exception: on a bridge, hook_resid_mid is where the MLP's branch
    leaves it, but means the stream.
    """
    return not name.rpartition(".")[2].startswith("hook_resid_")
