"""LoRA adapters as PEFT writes them, read without PEFT: `adapter_config.json` and its tensors.

An adapter adds s B A to a weight [out, in], s = alpha / r, or alpha / sqrt(r) with rsLoRA. As x
multiplies it that is s A^T B^T: `x` is A, `delta` is s B^T.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and safetensors leave some of their functions untyped.)

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.changes.files import tensors_of
from bwlens.changes.names import match, places_of
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight$")

Adapters = str | Sequence[str] | Mapping[str, float] | None
"""Which of several adapters: one, the sum of some, or of each so many times."""


def adapters_in(folder: Path) -> dict[str, Path]:
    """The folders of a PEFT folder's adapters by name: its own ("default") and those below it."""
    own = {"default": folder} if (folder / CONFIG).is_file() else {}
    below = sorted(folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
    return own | {path.parent.name: path.parent for path in below}


def read_adapters(model: LensModel, folder: Path, adapter: Adapters) -> WeightChange:
    """What a PEFT folder's adapter, or the sum of several, adds to a model's weights.

    Raises:
        ValueError: No such adapter, several and none named, broken files, an adapter of another
            base.
        NotImplementedError: No LoRA, or a kind of it that is no plain product (DoRA).
    """
    there = adapters_in(folder)

    def read(name: str) -> WeightChange:
        where = there[name]
        file = next((where / f for f in _FILES if (where / f).is_file()), None)
        if file is None:
            raise ValueError(f"{str(where)!r} has a {CONFIG}, but none of {', '.join(_FILES)}")
        try:
            config = json.loads((where / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(where / CONFIG)!r} is no JSON: {error}") from error
        return change_of(model, config, tensors_of(file), f"adapter {name} of {folder.name}")

    return _combined(adapter, list(there), str(folder), read)


def read_peft_model(model: LensModel, peft: Any, adapter: Adapters) -> WeightChange:
    """The same of a PeftModel in memory, whose base is not touched.

    Raises:
        ValueError, NotImplementedError: As `read_adapters` does.
    """
    state: dict[str, Tensor] = peft.state_dict()

    def read(name: str) -> WeightChange:
        its = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
        own = {n: tensor for n, tensor in state.items() if its.search(n)}
        config = peft.peft_config[name]
        return change_of(model, config.to_dict(), own, f"adapter {name}")

    return _combined(adapter, list(peft.peft_config), "this PeftModel", read)


def _combined(adapter: Adapters, there: list[str], where: str, read: Any) -> WeightChange:
    if adapter is None:
        if len(there) > 1 and "default" not in there:
            raise ValueError(
                f"{where} has the adapters {', '.join(there)}; name one, adapter={there[0]!r}, or"
                f" several to be added up"
            )
        adapter = "default" if "default" in there else there[0]
    named = [adapter] if isinstance(adapter, str) else adapter
    weights = dict(named) if isinstance(named, Mapping) else dict.fromkeys(named, 1.0)
    if unknown := [name for name in weights if name not in there]:
        raise ValueError(f"{where} has no adapter {unknown[0]!r}; there is {', '.join(there)}")
    parts = [read(name) if times == 1 else read(name) * times for name, times in weights.items()]
    total, *more = parts
    for part in more:
        total = total + part
    return total


def change_of(
    model: LensModel, config: Mapping[str, Any], tensors: Mapping[str, Tensor], note: str
) -> WeightChange:
    """An adapter's factors at the model's own matrices.

    Raises:
        ValueError: Factors without their other half, or made for other modules or shapes.
        NotImplementedError: Another kind of adapter.
    """
    _check_kind(config, tensors)
    factors: dict[str, dict[str, Tensor]] = {}
    left = [name for name in tensors if not _FACTOR.match(name)]
    for name, tensor in tensors.items():
        if found := _FACTOR.match(name):
            factors.setdefault(found[1], {})[found[2]] = tensor
    if not factors:
        raise ValueError(f"no lora_A and lora_B in the adapter's tensors, but {left[:3]}")
    places = places_of(model)
    parts: dict[Site, LowRankMatrix] = {}
    for module, pair in factors.items():
        if pair.keys() != {"A", "B"} or pair["A"].ndim != 2 or pair["B"].ndim != 2:
            raise ValueError(
                f"{module} has {sorted(f'lora_{n} {list(t.shape)}' for n, t in pair.items())};"
                f" expected lora_A [r, in] and lora_B [out, r]"
            )
        own = match(f"{module}.weight", places)
        if own is None:
            raise ValueError(
                f"the adapter changes {module!r}, which is none of this model's matrices; it was"
                f" made for another base"
                f" ({config.get('base_model_name_or_path') or 'its config names none'}). This"
                f" model's are called like {next(iter(places))!r}"
            )
        A, B = pair["A"].float(), pair["B"].float()
        if len(A) != B.shape[1]:
            raise ValueError(f"{module}: lora_A has rank {len(A)} and lora_B {B.shape[1]}")
        for place in places[own]:
            rows = scale_of(config, module, len(A)) * B.T
            delta = rows if place.outputs is None else rows[:, place.outputs]
            parts[place.site] = LowRankMatrix(A, delta)
        _check_shape(model, module, places[own], A, B, config)
    other = f"; not read: {', '.join(left[:4])}" if left else ""
    return WeightChange(parts, note + other, {"adapter": dict(config), "left_out": left})


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What B A is multiplied by: PEFT's alpha over the rank, or over its root."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _check_kind(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise NotImplementedError(
            f"this is a {kind} adapter, not LoRA; merge it into its base"
            f" (PeftModel.merge_and_unload, save_pretrained), and give the merged folder: the"
            f" difference to the base is read"
        )
    dora = [name for name in tensors if "lora_magnitude_vector" in name]
    if config.get("use_dora") or dora:
        raise NotImplementedError(
            "this adapter is DoRA: it rescales each column of the weight to a length of its own, so"
            " what it adds is no product of its factors; merge it into its base"
            " (PeftModel.merge_and_unload, save_pretrained), and give the merged folder: the"
            " difference to the base is read"
        )


def _check_shape(
    model: LensModel, module: str, places: Sequence[Any], A: Tensor, B: Tensor, config: Any
) -> None:
    from bwlens.model.weights import weights_of

    shapes = [w.shape for w in weights_of(model, [p.site for p in places]).values()]
    d_in, d_out = shapes[0][0], sum(shape[1] for shape in shapes)
    if A.shape[1] != d_in or len(B) < d_out:
        raise ValueError(
            f"the adapter's {module} is for a weight [{len(B)}, {A.shape[1]}] (out, in), and this"
            f" model's is [{d_out}, {d_in}]: it was made for another base"
            f" ({config.get('base_model_name_or_path') or 'its config names none'})"
        )
    bad = [t for t in (A, B) if not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"{module}: a factor of the adapter holds nan or inf; the file is broken")
