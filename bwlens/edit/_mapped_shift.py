"""Mapped shift: the subject's write without a backward pass, its value from other edits'."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.data.given import Edits, as_edits
from bwlens.edit._memit import normal_rows
from bwlens.edit._subject_shift import DEPTH, values_of
from bwlens.edit._where import layer_for
from bwlens.edit.aims import Aims
from bwlens.edit.direction import token_directions
from bwlens.edit.given import count, number, texts_of
from bwlens.edit.keys import PREFIXES, contexts_of, key_taps
from bwlens.edit.known import open_edits
from bwlens.edit.statistics import Statistics, statistics_for
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.flows import as_rows
from bwlens.model.identity import fingerprint, model_label
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.passes import run, wide
from bwlens.model.places import Point
from bwlens.model.prompts import Edit
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site, resolve_layer
from bwlens.model.tokens import text_to_ids
from bwlens.runs.parts import Part, in_parts
from bwlens.runs.tensors import read_tensors, write_tensors

_READ_DEPTH = 16 / 29  # Layer 16 of SmolLM2's 0 to 29, of 8, 12, 16 and 20 on other edits.
_AT_ONCE = 32  # Edits whose values are searched in one part.
_LEAST = 8
_FORM = "ValueMap"


@one_thread_at_a_time
def mapped_shift(
    model: LensModel,
    edits: Edits,
    *,
    fitted: ValueMap | str | os.PathLike[str],
    scale: float = 2.0,
    prefixes: Sequence[str] = PREFIXES,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    prepend_bos: bool | None = None,
) -> WeightChange:
    """`subject_shift` with forward passes alone: its value is foretold from those of other edits.

    `W += sum_i outer(u_i, scale * v(t_i, c_i))` with the whitened keys u_i of `subject_shift`, and
    v the `ValueMap` that was fitted to the values found for other edits: of the target t and of the
    stream c at the prompt's last token, halfway up. Weaker than what is searched for (see
    docs/results/editing.md), it needs one pass up to there.

    Args:
        model: The model that the map was fitted on.
        edits: One edit, or several to make together.
        fitted: What `ValueMap.fit` gave, or a file that it was saved to.
        scale: What the value is multiplied by, as a mean of several is shorter than each.
        prefixes: Contexts that the key is the mean over; () takes the prompt alone.
        statistics: Of W_out's keys (`key_statistics`), or their file. None takes the demo model's.
        prepend_bos: None is the model's own default.

    Returns:
        The change, a row an edit. `note` names the edits left out as known already.

    Raises:
        ValueError: A malformed argument, or a map or statistics of another model.
        NotImplementedError: A mixture of experts, or a model out of scope.

    Source: this project.

    Example:
        >>> edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
        >>> change = mapped_shift(model, edit, fitted="values.safetensors")  # doctest: +SKIP
    """
    if not isinstance(fitted, ValueMap):
        fitted = _loaded(str(fitted), Path(fitted).stat().st_mtime_ns)
    listed = as_edits(edits)
    scale, prefixes = number(scale, "scale"), texts_of(prefixes, "prefixes")
    fitted.check(model)
    site = Site("W_out", fitted.layer)
    whitener = statistics_for(model, [site], statistics)[site]
    details = {"method": "mapped_shift", "layer": site.layer, "scale": scale}
    listed, note = open_edits(model, listed, prepend_bos)
    if not listed:
        return WeightChange(note=note, details=details)
    keys, streams = _read(model, listed, site, fitted.read_layer, prefixes, prepend_bos)
    delta = scale * fitted.values(_targets(model, listed), streams)
    x = normal_rows(whitener, keys, weight=0.0)
    return WeightChange({site: LowRankMatrix(x.to(delta), delta)}, note, details)


@dataclass(frozen=True, eq=False, repr=False)
class ValueMap:
    """Kernel ridge regression from what an edit asks, and of what, to the value that writes it.

    `v(t, c) = mean + sum_i k((t, c), (t_i, c_i)) w_i`, with
    `k = exp(cos(t, t_i) - 1) exp(cos(c, c_i) - 1)`, both taken from their means.

    Attributes:
        layer: Whose W_out is written to.
        read_layer: Behind which the stream c is read.
        tensors: "targets" t and "streams" c [edit, d_model], "weights" w [edit, d_out], "mean".
        fingerprint: `bwlens.model.identity.fingerprint` of the model.
        label: What the model is called.
    """

    layer: int
    read_layer: int
    tensors: Mapping[str, Tensor]
    fingerprint: str
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", dict(sorted(self.tensors.items())))

    def __repr__(self) -> str:
        n = len(self.tensors["weights"])
        name = self.label or self.fingerprint
        return f"ValueMap(W_out of layer {self.layer} of {name}; of {n:,} edits)"

    def values(
        self, targets: Float[Tensor, "edit d_model"], streams: Float[Tensor, "edit d_model"]
    ) -> Float[Tensor, "edit d_out"]:
        """The values of edits."""
        known = {name: tensor.to(targets) for name, tensor in self.tensors.items()}
        kernel = _kernel(
            (targets, known["targets"], known["targets"]),
            (streams, known["streams"], known["streams"]),
        )
        return known["mean"] + kernel @ known["weights"]

    @staticmethod
    def fit(
        model: LensModel,
        edits: Edits,
        *,
        layer: int | None = None,
        read_layer: int | None = None,
        ridge: float = 2.0,
        steps: int = 10,
        log_odds: float = 8.0,
        clamp: float = 2.0,
        prefixes: Sequence[str] = PREFIXES,
        folder: str | os.PathLike[str] | None = None,
        prepend_bos: bool | None = None,
        progress: bool = True,
    ) -> ValueMap:
        """Find the values of many edits as `subject_shift` does, and fit the map to them.

        None of them is to be edited later in a test, nor others of their subjects.

        Args:
            model: A TransformerBridge or HookedTransformer; it is left as it was.
            edits: Some hundreds at least, of the kinds to be made later.
            layer: See `subject_shift`, as are the next but two.
            read_layer: Behind which the stream at the prompt's last token is read; None takes
                16/29 of the depth.
            ridge: What is added to the kernel's diagonal.
            steps: See `subject_shift`.
            log_odds: See there.
            clamp: See there.
            prefixes: See there.
            folder: Where values are kept, so that a run that was stopped is carried on.
            prepend_bos: None is the model's own default.
            progress: Show a bar.

        Raises:
            ValueError: Too few edits, a malformed argument, or a folder of other settings.
            NotImplementedError: A mixture of experts, or a model out of scope.

        Example:
            >>> fitted = ValueMap.fit(model, records.edits)  # doctest: +SKIP
            >>> fitted.save("values.safetensors")  # doctest: +SKIP
        """
        listed = as_edits(edits)
        if len(listed) < _LEAST:
            raise ValueError(f"{len(listed)} edits to fit a map to; it needs hundreds")
        count(steps, "steps")
        for name, value in {"ridge": ridge, "clamp": clamp}.items():
            if not number(value, name) > 0:
                raise ValueError(f"{name} is {value}; expected a number > 0")
        goal, prefixes = number(log_odds, "log_odds"), texts_of(prefixes, "prefixes")
        top = len(model.blocks) - 1
        at = layer_for(model, "subject", round(DEPTH * top)) if layer is None else layer
        site = Site("W_out", resolve_layer(model, at))
        read = round(_READ_DEPTH * top) if read_layer is None else read_layer
        read = max(resolve_layer(model, read), site.layer)
        settings = {
            **{"model": fingerprint(model), "layer": site.layer, "read_layer": read},
            **{"steps": steps, "log_odds": goal, "clamp": clamp, "prefixes": list(prefixes)},
            **{"prepend_bos": prepend_bos, "edits": [repr(edit) for edit in listed]},
        }

        def found(part: int) -> Part:
            several = listed[part * _AT_ONCE : (part + 1) * _AT_ONCE]
            contexts = contexts_of(model, several, prefixes, "subject", prepend_bos)
            values, _ = values_of(Aims(model, contexts, site), steps, goal, clamp)
            _, streams = _read(model, several, site, read, (), prepend_bos)
            tensors = {"values": values, "targets": _targets(model, several), "streams": streams}
            return Part({name: _table(tensor) for name, tensor in tensors.items()})

        sizes = [min(_AT_ONCE, len(listed) - at) for at in range(0, len(listed), _AT_ONCE)]
        tables = in_parts(found, sizes, settings, folder, progress=progress, label="Values")
        parts = {name: torch.from_numpy(np.array(table)) for name, table in tables.items()}
        return ValueMap(
            site.layer, read, _fitted(parts, ridge), settings["model"], model_label(model)
        )

    def check(self, model: LensModel) -> None:
        """Refuse a model that this was not fitted for.

        Raises:
            ValueError: Another model.
        """
        if (mark := fingerprint(model)) != self.fingerprint:
            raise ValueError(
                f"this ValueMap was fitted on another model, {self.label or 'unnamed'} with"
                f" fingerprint {self.fingerprint}; this one is {model_label(model)} with {mark}."
                f" Fit one on it with ValueMap.fit(model, edits); if it is the same with changes"
                f" applied, undo them first"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a safetensors file; replaced whole or not at all.

        Raises:
            ValueError: There is no such folder.
        """
        names = ("layer", "read_layer", "fingerprint", "label")
        about = {name: getattr(self, name) for name in names}
        return write_tensors(path, self.tensors, _FORM, {"about": json.dumps(about)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> ValueMap:
        """Read what `save` wrote.

        Raises:
            ValueError: Another kind of file.
            FileNotFoundError: There is none.
        """
        tensors, metadata = read_tensors(path, _FORM, "ValueMap.save")
        return ValueMap(tensors=tensors, **json.loads(metadata["about"]))


@lru_cache(1)
def _loaded(path: str, written: int) -> ValueMap:
    return ValueMap.load(path)


def _table(rows: Float[Tensor, "edit d"]) -> pd.DataFrame:
    return pd.DataFrame(rows.float().cpu().numpy(), columns=[str(i) for i in range(rows.shape[1])])


def _fitted(parts: Mapping[str, Float[Tensor, "edit _"]], ridge: float) -> dict[str, Tensor]:
    values, targets, streams = (parts[k].double() for k in ("values", "targets", "streams"))
    mean = values.mean(0)
    kernel = _kernel((targets, targets, targets), (streams, streams, streams))
    weights = torch.linalg.solve(kernel + ridge * torch.eye(len(kernel)), values - mean)
    tensors = {"targets": targets, "streams": streams, "weights": weights, "mean": mean}
    return {name: tensor.float() for name, tensor in tensors.items()}


def _kernel(*sides: tuple[Tensor, Tensor, Tensor]) -> Float[Tensor, "edit known"]:
    """Of rows and known rows, on each side, with those whose mean is taken off."""
    total: Any = 0
    for rows, known, of_mean in sides:
        mean = of_mean.mean(0)
        unit, known_unit = (
            torch.nn.functional.normalize(one - mean, dim=-1) for one in (rows, known)
        )
        total = total + unit @ known_unit.T - 1
    return total.exp()


def _targets(model: LensModel, edits: Sequence[Edit]) -> Float[Tensor, "edit d_model"]:
    """Each target's mean column of the unembedding."""
    ids = [list(text_to_ids(model, edit.target_new, False)) for edit in edits]
    return torch.stack([token_directions(model, one).mean(0) for one in ids])


def _read(
    model: LensModel,
    edits: Sequence[Edit],
    site: Site,
    read_layer: int,
    prefixes: Sequence[str],
    prepend_bos: bool | None,
) -> tuple[Float[Tensor, "edit d_in"], Float[Tensor, "edit d_model"]]:
    """Mean keys at the subjects, and the streams at the last tokens of the plain prompts."""
    contexts = contexts_of(model, edits, prefixes, "subject", prepend_bos, targets=False)
    (tap,) = key_taps(model, site.matrix, site.layer)
    block = model.blocks[read_layer]
    end, tokens = Point(block, "output"), contexts.batch.tokens
    passed = run(model, tokens, taps=[tap], points=[end], until=block)
    x = wide(as_rows(passed.flows[0].x)).unflatten(0, tokens.shape)
    stream, last = wide(passed.seen[end][0]), contexts.batch.last.to(passed.seen[end][0].device)
    plain = contexts.by_edit(stream[torch.arange(len(last)), last])[:, 0]
    return contexts.at(x).mean(1), plain
