"""What a user has in hands as a `WeightChange`: an adapter, checkpoints, a step, a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bwlens.changes.adapters import Adapters, adapters_in, read_adapters, read_peft_model
from bwlens.changes.change import WeightChange
from bwlens.changes.differences import difference, from_dense
from bwlens.changes.files import metadata_of, tensors_of
from bwlens.changes.names import parameters_of
from bwlens.changes.steps import OptimizerStep
from bwlens.model.protocol import LensModel

_WAYS = (
    "a WeightChange or a file of one, a PEFT adapter's folder or PeftModel, a checkpoint (folder,"
    " file or model) or a pair of two (before, after), an OptimizerStep, or a safetensors file of"
    " differences named as the model's parameters"
)


def as_change(
    model: LensModel,
    change: Any,
    *,
    adapter: Adapters = None,
    differences: bool = False,
    rank: int = 16,
) -> WeightChange:
    """The change of this model's matrices that is meant; the model is not touched.

    Args:
        model: The model whose weights are changed.
        change: A `WeightChange` or a file that one was saved to; a folder with a PEFT LoRA adapter,
            or a PeftModel; a checkpoint (a folder, a safetensors or .bin file, a model), which is
            compared with `model`; a pair of checkpoints (before, after); an `OptimizerStep`.
        adapter: Which of several adapters: a name, several (added up), or how many times of each.
        differences: A file's tensors are differences already, not weights.
        rank: How many rows to keep of a difference of full rank.

    Raises:
        ValueError: Another model's, broken files, or nothing that can be read.
        NotImplementedError: DoRA and other adapters that are no plain product.
    """
    if isinstance(change, OptimizerStep):
        return change.step
    if isinstance(change, WeightChange):
        return change
    if isinstance(change, tuple | list):
        if len(change) != 2:
            raise ValueError(f"{len(change)} checkpoints; expected a pair (before, after)")
        before, after = (_state(one) for one in change)
        what = f"{_name(change[0])} to {_name(change[1])}"
        return difference(model, before, after, rank, what)
    if hasattr(change, "peft_config"):
        return read_peft_model(model, change, adapter)
    if not isinstance(change, str | Path):
        return difference(model, None, _state(change), rank, f"the model to {_name(change)}")
    path = Path(change).expanduser()
    if adapters_in(path):
        return read_adapters(model, path, adapter)
    if path.suffix == ".safetensors" and path.is_file():
        if metadata_of(path).get("format") == "bwlens.WeightChange":
            return WeightChange.load(path)
        if path.name.startswith("adapter_"):
            raise ValueError(
                f"{path.name!r} is an adapter's tensors without their alpha; give the folder that"
                f" has its adapter_config.json as well"
            )
    if not path.exists():
        raise ValueError(f"there is no {str(path)!r}; expected {_WAYS}")
    if differences:
        return from_dense(model, tensors_of(path).items(), rank, path.name)
    return difference(model, None, tensors_of(path), rank, f"the model to {path.name}")


def _state(given: Any) -> Mapping[str, Any]:
    """The tensors of a checkpoint by name."""
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        if not path.exists():
            raise ValueError(f"there is no checkpoint {str(path)!r}; name a folder or file")
        return tensors_of(path)
    if isinstance(given, Mapping):
        return given
    if hasattr(given, "state_dict"):
        return parameters_of(given)
    raise TypeError(f"a change cannot be read from a {type(given).__name__}; expected {_WAYS}")


def _name(given: Any) -> str:
    return Path(given).name if isinstance(given, str | Path) else type(given).__name__
