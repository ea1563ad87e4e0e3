"""Many facts at once: what each lacks is spread over several W_out, as MEMIT and AlphaEdit do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.edit.keys import Contexts, key_taps
from bwlens.edit.value import ValueSearch
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.flows import as_rows
from bwlens.model.passes import prompts_at_once, run, wide
from bwlens.model.prompts import Edit
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Point, Site, resolve_layers

_FIRST, _LAST = 13 / 47, 17 / 47  # Layers 13 to 17 of 0 to 47 in MEMIT's GPT-2 xl.

Rows = Callable[[Site, Float[Tensor, "edits d_in"]], Float[Tensor, "edits d_in"]]
"""How a method solves for one matrix: with K the edits' keys, X of the change `X^T R`."""


def range_of(model: LensModel, layers: Layers) -> list[Site]:
    """W_out of the layers, or at 13/47 to 17/47 of the depth."""
    top = len(model.blocks) - 1
    default = range(int(_FIRST * top), int(_LAST * top) + 1)
    chosen = resolve_layers(model, default if layers is None else layers)
    return [Site("W_out", layer) for layer in chosen]


def spread(
    model: LensModel,
    edits: Sequence[Edit],
    sites: Sequence[Site],
    search: ValueSearch,
    shifts: Float[Tensor, "edits d_model"],
    rows: Rows,
) -> tuple[WeightChange, dict[str, Any]]:
    """Move each edit's stream after the last of the sites' layers by its shift.

    From the lowest layer up, with the layers below already changed, R is what is still missing,
    divided by the number of layers left, and `W += X^T R`.

    Returns:
        The change, a row for each edit and layer; and for its details the layers and the mean norm
        of what was missing before each, and last of what still is.
    """
    places = Places(model, edits, search, sites[-1].layer)
    goal = places.stream + shifts
    change, missing = WeightChange(), []
    for site, left in zip(sites, range(len(sites), 0, -1), strict=True):
        with change.applied(model):
            keys, stream = places.passed(site)
            x = rows(site, keys)
        residual = goal - stream
        missing.append(float(residual.norm(dim=1).mean()))
        change = change + WeightChange({site: LowRankMatrix(x.to(residual), residual / left)})
    with change.applied(model):
        residual = goal - places.passed(sites[-1])[1]
    missing.append(float(residual.norm(dim=1).mean()))
    return change, {"layers": [site.layer for site in sites], "missing": missing}


class Places:
    """Where edits' keys stand, of many edits in batches of a bounded size.

    Attributes:
        stream: What leaves the block at the plain prompts' keys [edit, d_model].
    """

    def __init__(
        self, model: LensModel, edits: Sequence[Edit], search: ValueSearch, layer: int
    ) -> None:
        self._model, block = model, model.blocks[layer]
        self._end = Point(block, "output")
        size = max(1, prompts_at_once(model) // (1 + len(search.before(model))))
        self._batches: list[tuple[Contexts, dict[Any, Any]]] = []
        streams = []
        for start in range(0, len(edits), size):
            contexts = search.contexts(model, edits[start : start + size])
            passed = self._run(contexts, keeping=[block])
            # What comes above is not looked at, so that it need not run again.
            given = passed.left.get(block)
            above = {} if given is None else dict.fromkeys(model.blocks[layer + 1 :], given)
            self._batches.append((contexts, above))
            streams.append(self._stream(contexts, passed))
        self.stream = torch.cat(streams)

    def passed(
        self, site: Site
    ) -> tuple[Float[Tensor, "edit d_in"], Float[Tensor, "edit d_model"]]:
        """Each edit's mean key over its contexts, and what leaves the block, as things are now."""
        taps = key_taps(self._model, site.matrix, site.layer)
        keys, streams = [], []
        for contexts, above in self._batches:
            passed = self._run(contexts, taps=taps, giving=above)
            (flow,) = passed.flows
            x = wide(as_rows(flow.x)).unflatten(0, contexts.batch.tokens.shape)
            keys.append(contexts.at(x).mean(1))
            streams.append(self._stream(contexts, passed))
        return torch.cat(keys), torch.cat(streams)

    def _run(self, contexts: Contexts, **options: Any) -> Any:
        no_words = torch.tensor([0])
        tokens = contexts.batch.tokens
        return run(self._model, tokens, points=[self._end], positions=no_words, **options)

    def _stream(self, contexts: Contexts, passed: Any) -> Float[Tensor, "edit d_model"]:
        return contexts.at(wide(passed.seen[self._end][0]))[:, 0]
