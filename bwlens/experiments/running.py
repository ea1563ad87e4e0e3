"""Edits in batches of like length, and experiments run on them.

One forward and one backward pass a batch, shared by all experiments that are run together, with
everything reduced to a few numbers a prompt on the model's device, so that memory does not grow
with the number of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bwlens.data.given import Edits, as_edits
from bwlens.experiments.base import Experiment, Reading, Result
from bwlens.gradient.capturing import capture
from bwlens.gradient.objectives import NLL
from bwlens.model.prompts import make_batch
from bwlens.model.segments import segment_codes
from bwlens.model.sites import available_matrices, check_model, resolve_layers
from bwlens.model.targets import unwarned, warn_of_edits
from bwlens.runs.parts import Failure, Part, progress_bar

if TYPE_CHECKING:
    import pandas as pd

MAX_MEMORY = 2**30
"""Bytes that the activations and gradients of a batch may take, by a rough estimate."""

_MOST_PROMPTS = 64


def run(
    experiment: Experiment,
    model: Any,
    records: Edits,
    *,
    prepend_bos: bool | None = None,
    max_memory: int = MAX_MEMORY,
    progress: bool = True,
) -> Result:
    """Run one experiment over edits, in memory.

    Args:
        experiment: With its settings.
        model: A TransformerBridge or HookedTransformer.
        records: Edits or records, one or several; `read_records` gives some.
        prepend_bos: Whether prompts get a BOS token; None is the model's own default.
        max_memory: Bytes that a batch may take, by a rough estimate.
        progress: Show a bar.

    Raises:
        ValueError: No edits, none that can be read, or settings that do not fit the model.
    """
    work = Batches([experiment], model, records, prepend_bos, max_memory)
    tables: list[pd.DataFrame] = []
    failures = list(work.failures)
    with progress_bar(experiment.title, sum(work.sizes), shown=progress) as advance:
        for number, size in enumerate(work.sizes):
            part = work(number)
            tables.append(part.tables[experiment.name])
            failures += part.failures
            advance(size)
    return Result(experiment, joined(tables), tuple(sorted(failures, key=lambda f: f.item)))


class Batches:
    """Edits in batches of like length, and the work of some experiments on each.

    Edits that cannot be tokenised, or are too long for the model, are set aside as `failures`.

    Raises:
        ValueError: No edits, none that can be read, or settings that do not fit the model.
    """

    def __init__(
        self,
        experiments: Sequence[Experiment],
        model: Any,
        edits: Edits,
        prepend_bos: bool | None = None,
        max_memory: int = MAX_MEMORY,
    ) -> None:
        check_model(model)
        self._experiments, self._model, self._edits = list(experiments), model, as_edits(edits)
        self._prepend_bos = prepend_bos
        wanted = {m for experiment in experiments for m in experiment.wanted(model)}
        self._matrices = [m for m in available_matrices(model) if m in wanted]
        asked = [resolve_layers(model, experiment.layers) for experiment in experiments]
        self._layers = sorted({layer for layers in asked for layer in layers})
        lengths, self.failures = self._lengths()
        if not lengths:
            first = self.failures[0]
            raise ValueError(f"none of the {len(self._edits)} edits can be read; {first.message}")
        warn_of_edits(model, self._edits)
        self.batches = _plan(lengths, max(1, max_memory // memory_per_token(model, self._matrices)))

    @property
    def sizes(self) -> list[int]:
        """Number of edits of each batch."""
        return [len(batch) for batch in self.batches]

    @unwarned()
    def __call__(self, number: int) -> Part:
        """Measure one batch; where it fails as a whole, its edits one by one."""
        items = self.batches[number]
        try:
            return Part(self._measure(items))
        except (ValueError, FloatingPointError) as error:
            if len(items) == 1:
                return Part(self._nothing(), [self._failure(items[0], error)])
        parts, failures = [self._nothing()], []
        for item in items:
            try:
                parts.append(self._measure([item]))
            except (ValueError, FloatingPointError) as error:
                failures.append(self._failure(item, error))
        tables = {e.name: joined([part[e.name] for part in parts]) for e in self._experiments}
        return Part(tables, failures)

    def _measure(self, items: Sequence[int]) -> dict[str, pd.DataFrame]:
        edits = tuple(self._edits[item] for item in items)
        prompts = [edit.text for edit in edits]
        grads = capture(
            self._model,
            prompts,
            NLL([edit.target_new for edit in edits]),
            self._matrices or ("W_out",),
            self._layers if self._matrices else [len(self._model.blocks) - 1],
            prepend_bos=self._prepend_bos,
        )
        codes = segment_codes(self._model, edits, grads.batch, self._prepend_bos)
        tables = {}
        for experiment in self._experiments:
            layers = tuple(resolve_layers(self._model, experiment.layers))
            rows = experiment.measure(
                Reading(self._model, edits, grads, codes, self._prepend_bos, layers)
            )
            if len(rows):
                rows["item"] = torch.tensor(items)[torch.tensor(rows["item"].to_numpy())].numpy()
            tables[experiment.name] = rows
        return tables

    def _nothing(self) -> dict[str, Any]:
        import pandas as pd

        return {experiment.name: pd.DataFrame() for experiment in self._experiments}

    def _failure(self, item: int, error: Exception) -> Failure:
        # A batch of one calls its only prompt "prompt 0".
        message = str(error).replace("prompt 0", "the prompt")
        return Failure(item, f"edit {item} ({self._edits[item].text!r}): {message}")

    @unwarned()
    def _lengths(self) -> tuple[dict[int, int], tuple[Failure, ...]]:
        """Number of tokens of each edit that can be read, and what is wrong with the others."""
        lengths: dict[int, int] = {}
        failures: list[Failure] = []
        for item, edit in enumerate(self._edits):
            try:
                batch = make_batch(
                    self._model, edit.text, edit.target_new, prepend_bos=self._prepend_bos
                )
                lengths[item] = int(batch.lengths[0])
            except ValueError as error:
                failures.append(self._failure(item, error))
        return lengths, tuple(failures)


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows of all parts, in the order of the data."""
    import pandas as pd

    rows = pd.concat([table for table in tables if len(table)] or list(tables), ignore_index=True)
    if "item" not in rows:
        return rows
    return rows.sort_values("item", kind="stable", ignore_index=True)


def memory_per_token(model: Any, matrices: Sequence[str]) -> int:
    """Bytes that a token takes in a forward and backward pass, by a rough estimate."""
    cfg = model.cfg
    d_model, n_layers = cfg.d_model, len(model.blocks)
    d_mlp = getattr(cfg, "d_mlp", None) or 4 * d_model
    # About thirty vectors of the residual stream's width and eight of the MLP's are kept for the
    # backward pass of each layer, and six of the vocabulary's for the loss.
    kept = n_layers * (30 * d_model + 8 * d_mlp) + 6 * cfg.d_vocab
    held = n_layers * len(matrices) * (d_model + d_mlp)
    return 4 * (kept + held)


def _plan(lengths: Mapping[int, int], most_tokens: int) -> list[list[int]]:
    """Edits of like length together, as many as a batch may hold of them."""
    batches: list[list[int]] = []
    for item in sorted(lengths, key=lambda item: (lengths[item], item)):
        size = len(batches[-1]) if batches else 0
        if size and size < _MOST_PROMPTS and (size + 1) * lengths[item] <= most_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches
