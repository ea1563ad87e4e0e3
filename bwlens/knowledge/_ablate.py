"""Rows of a store taken away for a time: whether the model needs them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch

from bwlens.knowledge._neurons import Neuron
from bwlens.model.locking import for_this_thread
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site, resolve_layer
from bwlens.model.weights import Weight, weights_of


@contextmanager
def ablate(model: LensModel, what: Any, *, factor: float = 0.0) -> Generator[None, None, None]:
    """Within the `with`, rows of W_out are multiplied by `factor`; after it they are as they were.

    Zero is the same as taking the neurons' activations away: y loses a_j W_out[j], at every
    position. Contexts may nest; the rows come back bit by bit, after an exception too. Other
    threads are refused the model meanwhile.

    Args:
        model: A TransformerBridge or HookedTransformer.
        what: Neurons, each (layer, index) or with an expert (layer, index, expert), as
            `Neurons.top` gives them; or a layer (a whole store, its bias left), a `Site`, several.
        factor: What the rows are multiplied with.

    Raises:
        ValueError: Nothing named, or a row, layer or expert that the model does not have.
        TypeError: Something else than neurons, layers and sites.
        NotImplementedError: Weights that are quantised or shared between layers.

    Example:
        >>> found = neurons(model, "The capital of France is")  # doctest: +SKIP
        >>> with ablate(model, found.top(20)):  # doctest: +SKIP
        ...     print(model.generate("The capital of France is", max_new_tokens=1))
    """
    chosen = _rows_of(model, what)
    with for_this_thread(model):
        before: list[tuple[Weight, torch.Tensor, torch.Tensor]] = []
        try:
            with torch.no_grad():
                for weight, indices in chosen:
                    rows = weight.live[indices].clone()
                    before.append((weight, indices, rows))
                    weight.live[indices] = rows * factor
            yield
        finally:
            with torch.no_grad():
                for weight, indices, rows in reversed(before):
                    weight.live[indices] = rows


def _rows_of(model: LensModel, what: Any) -> list[tuple[Weight, torch.Tensor]]:
    """The rows named, store by store, each once."""
    several = isinstance(what, Iterable) and not isinstance(what, str | Neuron)
    named: list[Any] = list(what) if several else [what]
    if (
        isinstance(what, tuple)
        and len(what) in (2, 3)
        and all(isinstance(i, int) for i in what[:2])
    ):
        named = [what]  # one neuron
    if not named:
        raise ValueError("nothing to ablate: name neurons as (layer, index), or whole layers")
    indices: dict[Site, list[int] | None] = {}
    for one in named:
        if isinstance(one, tuple) and len(one) in (2, 3):
            neuron = Neuron(*one)
            site = Site("W_out", resolve_layer(model, neuron.layer), neuron.site.expert)
            rows = indices.setdefault(site, [])
            if rows is not None:
                rows.append(neuron.index)
        elif isinstance(one, Site):
            indices[one] = None
        elif isinstance(one, int) and not isinstance(one, bool):
            indices[Site("W_out", resolve_layer(model, one))] = None
        else:
            raise TypeError(
                f"{one!r} names nothing to ablate; expected (layer, index), with experts (layer,"
                f" index, expert), a layer, or a Site"
            )
    weights = weights_of(model, indices)
    out = []
    for site, weight in weights.items():
        rows = indices[site]
        d_mlp = weight.shape[0]
        rows = list(range(d_mlp)) if rows is None else sorted(set(rows))
        if bad := [row for row in rows if not 0 <= row < d_mlp]:
            raise ValueError(f"{site} has rows 0 to {d_mlp - 1}, found {bad[0]}")
        out.append((weight, torch.tensor(rows, device=weight.device)))
    return out
