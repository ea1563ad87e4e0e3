"""Which weight matrices a model has, and what may be asked of it.

A weight matrix W computes ``z = x W``; `find_taps` says where its x and its z pass, on a
TransformerBridge (raw or in compatibility mode) and on a HookedTransformer alike. How the weights
of a block are found is in `blocks`; what a tap is, in `places`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)
# pyright: reportUnnecessaryComparison=false, reportUnnecessaryIsInstance=false
# (What torch's types rule out does come, and what users give is checked.)

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from bwlens.model.blocks import block_taps, contents
from bwlens.model.locking import alone_with
from bwlens.model.places import MATRICES as MATRICES
from bwlens.model.places import MLP, ExpertTap, Point, Tap
from bwlens.model.places import Site as Site
from bwlens.model.places import as_site as as_site
from bwlens.model.protocol import LensModel

Layers = Iterable[int] | int | slice | None
"""Layers from 0, negative ones from the end: one, several, a slice, or None for all."""


def find_taps(
    model: LensModel, matrices: Sequence[str] | str, layers: Layers = None
) -> list[Tap | ExpertTap]:
    """Every tap of the matrices and layers asked for, layer by layer.

    Raises:
        ValueError: Unknown matrix, layer out of range, or no layer has such a matrix.
        NotImplementedError: The model is no decoder-only model that runs in this process, or keeps
            a matrix asked for in a form that bwlens cannot read.
    """
    check_model(model)
    names = resolve_matrices(matrices)
    wanted = resolve_layers(model, layers)
    taps: list[Tap | ExpertTap] = []
    for layer in wanted:
        block = block_taps(model.blocks[layer], layer)
        for name in names:
            if name in block.refused:
                raise NotImplementedError(
                    f"{name} of layer {layer} cannot be read: {block.refused[name]}. Ask for other"
                    f" matrices or layers; {_what_it_has(model)}"
                )
        taps += block.of(names)
    there = {matrix for tap in taps for matrix in tap.matrices}
    if missing := [name for name in names if name not in there]:
        where = f"layers {wanted[0]}-{wanted[-1]}" if len(wanted) > 1 else f"layer {wanted[0]}"
        raise ValueError(
            f"{', '.join(missing)}: no such matrix in {where} of this model; {_what_it_has(model)}"
        )
    return taps


def plain_taps(
    model: LensModel, matrices: Sequence[str] | str, layers: Layers, why: str
) -> list[Tap]:
    """The taps of weights that every token passes; `why` tells the user what asks for these.

    Raises:
        ValueError: As `find_taps` does.
        NotImplementedError: A mixture of experts, whose tokens go to different weights, or a
            projection that holds gates beside its queries.
    """
    plain = []
    for tap in find_taps(model, matrices, layers):
        if not isinstance(tap, Tap) or tap.site.expert is not None:
            layer = tap.site.layer if isinstance(tap, Tap) else tap.layer
            raise NotImplementedError(f"layer {layer} is a mixture of experts; {why}")
        if tap.gated_heads:
            raise NotImplementedError(
                f"{tap.site} shares its projection with gates; only bwlens.capture and weights tell"
                f" them apart. {why}"
            )
        plain.append(tap)
    return plain


def available_matrices(model: LensModel) -> tuple[str, ...]:
    """The names out of `MATRICES` that bwlens can read in some layer of the model."""
    check_model(model)
    taps = [tap for block in model.blocks for tap in block_taps(block, 0).taps]
    there = {matrix for tap in taps for matrix in tap.matrices}
    return tuple(matrix for matrix in MATRICES if matrix in there)


def default_matrices(model: LensModel) -> tuple[str, ...]:
    """The matrices of the model's MLPs, which are read where none are named.

    Raises:
        NotImplementedError: The model has none that bwlens can read.
    """
    if there := tuple(m for m in available_matrices(model) if m in MLP):
        return there
    why = {reason for block in model.blocks for reason in block_taps(block, 0).refused.values()}
    raise NotImplementedError(
        f"bwlens reads the MLPs where no matrices are named, and finds none that it can read in"
        f" this model{f' ({why.pop()})' if why else ''}; {_what_it_has(model)}"
    )


def _what_it_has(model: LensModel) -> str:
    """What could be asked for instead, or what the blocks are made of."""
    if there := available_matrices(model):
        return f"it has {', '.join(there)}"
    made_of = contents(model.blocks[0])
    return f"it has none of those bwlens knows, and its blocks are made of {made_of}"


def resolve_matrices(matrices: Sequence[str] | str) -> tuple[str, ...]:
    """Names of matrices, each once, in the order asked for; a string is one name.

    Raises:
        TypeError: Neither a name nor several.
        ValueError: An unknown name, or none.
    """
    several = isinstance(matrices, Iterable) and not isinstance(matrices, str)
    names: list[Any] = list(matrices) if several else [matrices]
    if odd := [name for name in names if not isinstance(name, str)]:
        raise TypeError(
            f"matrices must be names among {', '.join(MATRICES)}; found {odd[0]!r}, a"
            f" {type(odd[0]).__name__}"
        )
    unknown = [name for name in names if name not in MATRICES]
    if unknown or not names:
        found = ", ".join(map(repr, unknown)) or "an empty list"
        raise ValueError(f"matrices must be among {', '.join(MATRICES)}; found {found}")
    return tuple(dict.fromkeys(names))


def resolve_layers(model: LensModel, layers: Layers) -> list[int]:
    """Layer indices in ascending order, negative ones counted from the end.

    Raises:
        ValueError: A layer is out of range or no whole number, or none is named.
    """
    n_layers = len(model.blocks)
    there = f"this model has layers 0 to {n_layers - 1} (or -{n_layers} to -1 from the end)"
    if layers is None:
        return list(range(n_layers))
    given: Any = layers
    if isinstance(given, slice):
        try:
            chosen: list[Any] = list(range(n_layers))[given]
        except TypeError:
            raise ValueError(f"layers {given} asked for; {there}") from None
    else:
        several = isinstance(given, Iterable) and not isinstance(given, str)
        chosen = list(given) if several else [given]
    if odd := [n for n in chosen if isinstance(n, bool) or not hasattr(n, "__index__")]:
        raise ValueError(f"layer {odd[0]!r} asked for; expected whole numbers, {there}")
    chosen = [n.__index__() for n in chosen]
    bad = [layer for layer in chosen if not -n_layers <= layer < n_layers]
    if bad or not chosen:
        what = f"layer {bad[0]}" if bad else "an empty list of layers"
        raise ValueError(f"{what} asked for, but {there}")
    return sorted({layer % n_layers for layer in chosen})


def resolve_layer(model: LensModel, layer: int) -> int:
    """The index of one layer, counted from 0.

    Raises:
        ValueError: It is out of range, no whole number, or several.
    """
    first, *more = resolve_layers(model, layer)
    if more:
        raise ValueError(f"layers {[first, *more]} asked for where one layer is edited; name one")
    return first


def check_model(model: LensModel) -> None:
    """Refuse a model that bwlens cannot read, saying what was found.

    Raises:
        TypeError: Not a TransformerLens model at all.
        NotImplementedError: A remote model, an encoder or encoder-decoder, or a model without a
            stack of blocks.
    """
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise TypeError(
            f"{name} is a PEFT model, not a TransformerLens one; merge its adapters"
            f" (merged = model.merge_and_unload()) and boot the result:"
            f" TransformerBridge.boot_transformers(name, hf_model=merged, tokenizer=tokenizer)"
        )
    # Looked for, not asked for: a bridge would build it anew.
    if not (hasattr(type(model), "hook_dict") or "hook_dict" in getattr(model, "__dict__", ())):
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


def check_stream(model: LensModel) -> None:
    """Refuse to read a stream that has another width than the unembedding takes.

    Raises:
        NotImplementedError: The model projects between its blocks and its unembedding.
    """
    width, taken = getattr(model.cfg, "d_model", None), model.unembed.W_U.shape[0]
    if width is not None and width != taken:
        raise NotImplementedError(
            f"the residual stream of this {type(model).__name__} has {width} entries, but its"
            f" unembedding takes {taken}: a projection stands between them, which a reading in the"
            f" vocabulary cannot pass. Gradients are exact all the same: bwlens.capture"
        )


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
    model: LensModel, names_filter: str | Sequence[str] | Callable[[str], bool]
) -> Generator[tuple[dict[str, Point], bool], None, None]:
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
        if not isinstance(names_filter, Iterable):
            raise TypeError(
                f"names_filter is {names_filter!r}; expected a hook name such as"
                f" 'blocks.3.hook_resid_mid', several, or a predicate of names"
            )
        names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        for name in names:
            if name not in known:
                last = name.rpartition(".")[2]
                close = [k for k in known if k.endswith("." + last)][:3] or list(known)[:3]
                raise ValueError(f"no hook point {name!r} in this model; there are {close} ...")
    flags = {f for name in names if (f := _SWITCHES.get(name.rpartition(".")[2]))}
    if not required and {"use_attn_in", "use_split_qkv_input"} <= flags:
        flags -= {"use_attn_in", "use_split_qkv_input"}  # mutually exclusive
    # A predicate takes what this model can switch on.
    tolerated = () if required else (NotImplementedError, ValueError, AssertionError)
    with alone_with(model):
        before = {flag: bool(getattr(model.cfg, flag, False)) for flag in flags}
        try:
            for flag in flags:
                with suppress(*tolerated):
                    if not before[flag]:
                        getattr(model, f"set_{flag}")(True)
            points = {n: Point(known[n], "output", branch=_parts(n)) for n in names}
            yield points, required
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
