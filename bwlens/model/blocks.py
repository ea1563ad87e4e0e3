"""The weights of one block, found by the parts it shows, and why some of them cannot be read.

A part counts because it has the projections of an MLP or of attention, never by a model's name. A
projection that gives more than the next one takes holds more than its name says. Tensors are taken
by plain PyTorch hooks: compatibility mode renames hook points, silences some, and shows others
through copies that are off the autograd graph.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)
# pyright: reportPrivateUsage=false
# (torch has no other way to a module's own children and tensors.)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from bwlens.model.places import ATTENTION, MLP, SHARED, ExpertTap, Point, Site, Tap

_OF_A_BRIDGE = {
    # The dense layers of a model with mixtures elsewhere have names of their own.
    "W_in": ("in", "input", "dense_in"),
    "W_gate": ("gate", "dense_gate"),
    "W_out": ("out", "dense_out"),
    "W_Q": ("q",),
    "W_K": ("k",),
    "W_V": ("v",),
    "W_O": ("o",),
}
_OF_HUGGING_FACE = {
    "W_in": "up_proj",
    "W_gate": "gate_proj",
    "W_out": "down_proj",
    "W_Q": "q_proj",
    "W_K": "k_proj",
    "W_V": "v_proj",
    "W_O": "o_proj",
}


@dataclass(eq=False)
class BlockTaps:
    """The taps of a block, and for each matrix that is there but cannot be read, why."""

    taps: list[Tap | ExpertTap] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def of(self, matrices: tuple[str, ...]) -> list[Tap | ExpertTap]:
        """Those of some matrices only."""
        some: list[Tap | ExpertTap] = []
        for tap in self.taps:
            if isinstance(tap, ExpertTap):
                weights = {n: ms for n, ms in tap.weights.items() if set(ms) & set(matrices)}
                some += [replace(tap, weights=weights)] if weights else []
            elif tap.site.matrix in matrices:
                some.append(tap)
        return some


def block_taps(block: nn.Module, layer: int) -> BlockTaps:
    """The taps of every matrix of a block."""
    found = BlockTaps()
    mlps, attentions = _parts(block)
    own = _experts_of(block)
    if own is not None and all(_experts_of(part) is not own for part in mlps):
        mlps.append(block)  # Gemma 4: experts beside an MLP, not shown by TransformerLens 3
    mixture = any(_experts_of(part) is not None for part in mlps)
    plain = [part for part in mlps if _experts_of(part) is None]
    for part in mlps:
        if part not in plain:
            _add_mixture(found, part, layer, within=part is not block)
    for part in plain[:1]:
        _add_mlp(found, part, layer, SHARED if mixture else None)
    for names, extra in ((MLP, plain[1:]), (ATTENTION, attentions[1:])):
        if extra:
            kinds = ", ".join(_kind(part) for part in extra)
            found.refused |= dict.fromkeys(
                names, f"the block has more than one part for it: {kinds}"
            )
    for part in attentions[:1]:
        _add_attention(found, part, layer)
    return found


def dense_mlps(block: nn.Module) -> list[nn.Module]:
    """The MLPs of a block that every token passes."""
    return [part for part in _parts(block)[0] if _experts_of(part) is None]


def mixtures(block: nn.Module) -> list[nn.Module]:
    """The parts of a block that send each token to some of their experts."""
    return [part for part in _parts(block)[0] if _experts_of(part) is not None]


def attention_of(block: nn.Module) -> nn.Module | None:
    """The attention of a block, or whatever stands in its place; None without one."""
    return next(iter(_parts(block)[1]), None)


def contents(block: nn.Module) -> str:
    """What a block is made of, for people: names of its parts and their kinds."""
    parts = _unwrapped(block).named_children()
    return ", ".join(f"{name} ({_kind(part)})" for name, part in parts) or _kind(block)


def _parts(block: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """MLPs and attentions: those that TransformerLens shows, else those of the block it wraps."""
    shown = {n: m for n, m in block._modules.items() if m is not None and not n.startswith("_")}
    attentions = [shown["attn"]] if "attn" in shown else []
    mlps = [
        part
        for name, part in shown.items()
        if name == "mlp" or (name != "attn" and (_is_mlp(part) or _experts_of(part) is not None))
    ]
    if not mlps and not attentions:
        for part, kind in _inside(_unwrapped(block)):
            (mlps if kind == "mlp" else attentions).append(part)
    return mlps, attentions


def _inside(module: nn.Module) -> Iterator[tuple[nn.Module, Literal["mlp", "attn"]]]:
    for child in map(_unwrapped, module.children()):
        if all(_linear(child, _OF_HUGGING_FACE[name]) for name in ATTENTION):
            yield child, "attn"
        elif _is_mlp(child) or _experts_of(child) is not None:
            yield child, "mlp"
        else:
            yield from _inside(child)


def _is_mlp(part: nn.Module) -> bool:
    """Whether a part that may be anything takes what it gives to a wider or narrower middle."""
    taps = _projections(part, 0, MLP)
    first, last = _widths(taps.get("W_in")), _widths(taps.get("W_out"))
    return first is not None and last is not None and first == last[::-1]


def _linear(part: nn.Module, name: str) -> bool:
    return isinstance(part._modules.get(name), nn.Linear)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The Hugging Face module inside the components of a bridge."""
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner
    return module


def _kind(module: nn.Module) -> str:
    return type(_unwrapped(module)).__name__


# MLPs and mixtures.


def _experts_of(part: nn.Module) -> nn.Module | None:
    experts = getattr(_unwrapped(part), "experts", None)
    return experts if isinstance(experts, nn.Module) else None


def _add_mlp(found: BlockTaps, part: nn.Module, layer: int, expert: Any = None) -> None:
    taps = _projections(part, layer, MLP, expert)
    out = _widths(taps.get("W_out"))
    for name in ("W_in", "W_gate"):
        widths = _widths(taps.get(name))
        if out and widths and widths[1] != out[0]:
            found.refused[name] = (
                f"{_kind(taps.pop(name).holder)} gives {widths[1]} columns, but W_out takes"
                f" {out[0]}, so it holds more than this matrix, and which columns are which is not"
                f" known to bwlens"
            )
    found.taps += taps.values()


def _add_mixture(found: BlockTaps, part: nn.Module, layer: int, within: bool) -> None:
    """The experts that tokens are sent to, and the one `within` the part that all of them pass."""
    experts = _experts_of(part)
    assert experts is not None
    routing = getattr(part, "hook_expert_indices", None)
    if isinstance(experts, nn.ModuleList) and routing is not None:  # HookedTransformer
        for index, expert in enumerate(experts):
            taps = _of_hooked_transformer(expert, layer, MLP, index, Point(routing, "output"))
            found.taps += taps.values()
    else:
        experts = _unwrapped(experts)
        weights = _batched(experts)
        if isinstance(weights, str):
            found.refused |= dict.fromkeys(MLP, weights)
        else:
            found.taps.append(ExpertTap(layer, experts, weights))
    for child in _unwrapped(part).children() if within else ():
        if _unwrapped(child) is not experts and _is_mlp(child):
            _add_mlp(found, child, layer, SHARED)


def _batched(experts: nn.Module) -> dict[str, tuple[str, ...]] | str:
    """What the 3-D parameters of experts hold, or why they cannot be read."""
    shapes = {name: p.shape for name, p in experts.named_parameters() if p.ndim == 3}
    known: dict[str, tuple[str, ...]] = {"down_proj": ("W_out",)}
    if "gate_up_proj" in shapes:
        known["gate_up_proj"] = ("W_gate", "W_in")
    else:
        known["up_proj"] = ("W_in",)
    plain = getattr(experts, "is_concatenated", True) and not getattr(
        experts, "is_transposed", False
    )
    if plain and shapes.keys() == known.keys():  # [expert, d_out, d_in]
        (_, d_model, d_mlp), *others = (shapes[name] for name in known)
        plain = all(
            tuple(s[1:]) == (d_mlp * len(known[n]), d_model)
            for n, s in zip(list(known)[1:], others, strict=True)
        )
    if not plain or shapes.keys() != known.keys():
        return (
            f"{type(experts).__name__} keeps its experts' weights in"
            f" {', '.join(sorted(shapes)) or 'no batched parameters'}"
            f" ({'plain' if plain else 'transposed or interleaved'}); bwlens reads experts with a"
            f" plain gate_up_proj (or up_proj) and down_proj"
        )
    # In the order of the forward pass.
    return {name: known[name] for name in reversed(known)}


# Attention.


def _add_attention(found: BlockTaps, part: nn.Module, layer: int) -> None:
    taps = _projections(part, layer, ATTENTION)
    out = _widths(taps.get("W_O"))
    for name in ("W_Q", "W_K", "W_V"):
        widths = _widths(taps.get(name))
        if not out or not widths:
            continue
        if name == "W_Q" and widths[1] == 2 * out[0] and (heads := _gated_heads(part)):
            taps[name] = replace(taps[name], gated_heads=heads)
        elif out[0] % widths[1] or (name == "W_Q" and widths[1] != out[0]):
            found.refused[name] = (
                f"{_kind(taps.pop(name).holder)} gives {widths[1]} columns, but the heads hand"
                f" {out[0]} to W_O, so it holds more or other than this matrix"
            )
    found.taps += taps.values()


def _gated_heads(part: Any) -> int:
    """The number of heads where TransformerLens splits their queries from gates, else 0."""
    config = getattr(part, "config", None)
    gated = getattr(config, "gated_q_proj", False)
    return int(getattr(config, "n_heads", 0)) if gated else 0


# Projections.


def _projections(
    part: nn.Module, layer: int, names: tuple[str, ...], expert: Any = None
) -> dict[str, Tap]:
    """A tap for each of the names that the part has."""
    if hasattr(part, "hook_in") and hasattr(part, "hook_out"):
        return _of_a_bridge(part, layer, names, expert)
    raw = [n for n in names if _linear(part, _OF_HUGGING_FACE[n])]
    if raw:
        return {
            n: _of_a_linear(part._modules[_OF_HUGGING_FACE[n]], Site(n, layer, expert)) for n in raw
        }
    return _of_hooked_transformer(part, layer, names, expert)


def _of_a_linear(linear: Any, site: Site) -> Tap:
    return Tap(site, (Point(linear, "input"),), (Point(linear, "output"),), linear)


def _of_a_bridge(part: Any, layer: int, names: tuple[str, ...], expert: Any) -> dict[str, Tap]:
    """Each projection of a bridge is a component with a hook_in and a hook_out of its own."""
    taps: dict[str, Tap] = {}
    for name in names:
        if name == "W_gate" and not any(a in part._modules for a in _OF_A_BRIDGE["W_in"]):
            continue  # alone, it is the router of a mixture
        for attribute in _OF_A_BRIDGE[name]:
            projection = part._modules.get(attribute)
            if projection is None or not hasattr(projection, "hook_out"):
                continue
            holder = _unwrapped(projection)
            # What enters the weight's own module is the x. Where that module does not run (gated
            # MLPs in compatibility mode, per-head results), hook_in shows it, or the container's.
            x = [Point(holder, "input"), Point(projection.hook_in, "output")]
            z = [Point(projection.hook_out, "input")]
            if name not in ("W_out", "W_O"):
                x.append(Point(part.hook_in, "output"))
            # hook_out is silent with use_attn_result; the container's is the same z.
            if name == "W_O":
                z.append(Point(part.hook_out, "input"))
            taps[name] = Tap(Site(name, layer, expert), tuple(x), tuple(z), holder)
            break
    return taps


def _of_hooked_transformer(
    part: Any,
    layer: int,
    names: tuple[str, ...],
    expert: Any = None,
    routing: Point | None = None,
) -> dict[str, Tap]:
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
    taps: dict[str, Tap] = {}
    for name in names:
        if name not in ways or not hasattr(part, name) or getattr(part, name) is None:
            continue
        x, z = ways[name]
        z_point = z if isinstance(z, Point) else Point(getattr(part, z), "input")
        taps[name] = Tap(Site(name, layer, expert), (x,), (z_point,), part, routing)
    return taps


def _widths(tap: Tap | None) -> tuple[int, int] | None:
    """d_in and d_out of the module that holds a weight; None where it does not say."""
    if tap is None:
        return None
    holder = tap.holder
    widths = getattr(holder, "in_features", None), getattr(holder, "out_features", None)
    if hasattr(holder, "nf"):  # transformers' Conv1D
        widths = tuple(holder._parameters["weight"].shape)  # pyright: ignore
    d_in, d_out = widths
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None
