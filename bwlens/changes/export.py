"""A model with a change, as a folder that `from_pretrained` reads.

A bridge wraps the modules of the Hugging Face model inside it and splits some of its parameters
(queries, keys and values out of one matrix). What is written is a new model of the same class with
the parameters under their own names; a copy of the bridge's own goes back to the rows that it was
copied from. Before anything is put in its place, the new model must give the bridge's logits.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.model.passes import device_of, run
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site
from bwlens.model.weights import Weight

_WRAPPED = "_original_component."
_PROBE = 8  # Tokens whose logits must agree.
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-6}  # Of the largest logit; half precision below.


def check_exportable(model: LensModel, folder: str | os.PathLike[str]) -> Path:
    """The folder to be written, if the model has a Hugging Face model inside and it is free.

    Raises:
        NotImplementedError: A HookedTransformer, or a bridge with processed weights.
        ValueError: The folder holds something already, or cannot be made.
    """
    inner = getattr(model, "original_model", None)
    if not hasattr(inner, "save_pretrained") or not hasattr(inner, "config"):
        raise NotImplementedError(
            f"a {type(model).__name__} holds no Hugging Face model to be saved; load the model as a"
            f" TransformerBridge (bwlens.load_model(..., kind='bridge')), or keep the change itself"
            f" with change.save(path)"
        )
    if getattr(model, "compatibility_mode", False):
        raise NotImplementedError(
            "this bridge is in compatibility mode, where weights are folded into one another; load"
            " the model raw (bwlens.load_model) and save the change of that"
        )
    folder = Path(folder)
    if not folder.parent.is_dir():
        raise ValueError(f"cannot write {str(folder)!r}: there is no folder {str(folder.parent)!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} holds something already; name a new or empty folder")
    return folder


class Export:
    """A model of the same class without a bridge around it, to be filled and written.

    Made before the change is applied: a weight that the bridge keeps in a copy of its own is then
    found in the model's parameters by its values, as each of its output columns must stand once in
    a parameter of the same layer.

    Raises:
        NotImplementedError: A parameter is not shown by the bridge, or a copy stands in none.
    """

    def __init__(self, model: LensModel, weights: Mapping[Site, Weight]) -> None:
        inner = model.original_model
        config = copy.deepcopy(inner.config)
        # How the file was packed; these are plain numbers.
        vars(config).pop("quantization_config", None)
        with torch.random.fork_rng():  # a new model draws its first weights
            self._plain = type(inner)(config)
        self._model, self._weights = model, weights
        if getattr(inner, "generation_config", None) is not None:
            self._plain.generation_config = copy.deepcopy(inner.generation_config)
        state = self._state()
        kept = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
        self._copies = {
            site: find_rows(site, weight.read().T, state)
            for site, weight in weights.items()
            if weight.live.untyped_storage().data_ptr() not in kept
        }

    def write(self, folder: Path) -> None:
        """Write the model as it is now, whole or not at all.

        Raises:
            NotImplementedError: A model of this class does not come out the same.
        """
        state = self._state()
        for site, (name, rows, by_column) in self._copies.items():
            new = state[name].clone()
            target = new.T if by_column else new
            target[rows] = self._weights[site].read().T.to(target)
            state[name] = new
        self._plain.load_state_dict({k: v.cpu() for k, v in state.items()}, assign=True)
        self._plain.tie_weights()
        _check_same(self._model, self._plain.eval())
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            self._plain.save_pretrained(draft)
            if self._model.tokenizer is not None:
                _own_tokenizer(self._model.tokenizer).save_pretrained(draft)
            draft.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            os.replace(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _state(self) -> dict[str, Tensor]:
        """The bridge's tensors by the names that they have without a bridge around."""
        inner = self._model.original_model.state_dict()
        shown = {name.replace(_WRAPPED, ""): tensor for name, tensor in inner.items()}
        names = list(self._plain.state_dict())
        if missing := [name for name in names if name not in shown]:
            raise NotImplementedError(
                f"this bridge does not show {missing[0]} of its {type(self._plain).__name__}, so"
                f" that model cannot be written; keep the change itself with change.save(path)"
            )
        return {name: shown[name] for name in names}


def _own_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer as it was before TransformerLens made it add a BOS token, where that is left.

    It is read again from where the model's tokenizer says that it came from; where nothing is
    there, or another tokenizer, the model's own is taken.
    """
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError):
        return tokenizer
    return own if own.get_vocab() == tokenizer.get_vocab() else tokenizer


def find_rows(
    site: Site, rows: Float[Tensor, "d_out d_in"], state: Mapping[str, Tensor]
) -> tuple[str, Tensor, bool]:
    """The parameter that holds these rows (or columns), and where: name, places, "by column".

    Raises:
        NotImplementedError: None does.
    """
    for name, tensor in state.items():
        if f".{site.layer}." not in name or tensor.ndim != 2 or tensor.numel() <= rows.numel():
            continue
        for by_column in (False, True):
            table = (tensor.T if by_column else tensor).detach()
            if table.shape[1] != rows.shape[1] or table.dtype != rows.dtype:
                continue
            places: dict[bytes, list[int]] = {}
            for place, row in enumerate(table.cpu()):
                places.setdefault(_bytes(row), []).append(place)
            there = [places.get(_bytes(row), []) for row in rows.cpu()]
            if all(len(several) == 1 for several in there):
                return name, torch.tensor([place for (place,) in there]), by_column
    raise NotImplementedError(
        f"{site} is a copy of the bridge's own that stands nowhere in the Hugging Face model, so a"
        f" change of it cannot be written there; keep the change itself with change.save(path)"
    )


def _bytes(row: Tensor) -> bytes:
    return row.contiguous().view(torch.uint8).numpy().tobytes()


def _check_same(model: LensModel, twin: Any) -> None:
    d_vocab = model.cfg.d_vocab
    ids = torch.tensor([[(37 * i + 1) % d_vocab for i in range(_PROBE)]])
    expected = run(model, ids.to(device_of(model))).logits.float().cpu()
    with torch.no_grad():
        logits = twin(ids, use_cache=False).logits.float()
    close = _CLOSE.get(next(twin.parameters()).dtype, 0.05)
    apart = float((logits - expected[..., : logits.shape[-1]]).abs().max() / expected.abs().max())
    if not apart <= close:
        raise NotImplementedError(
            f"a {type(twin).__name__} with this bridge's weights gives other logits ({apart:.1%} of"
            f" the largest apart), so nothing was written; keep the change itself with"
            f" change.save(path)"
        )
