"""One neuron: the words of its row, and where in a text its weight is largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.data.prose import read_prose
from bwlens.knowledge._neurons import N_WORDS, Neuron
from bwlens.model.flows import as_rows
from bwlens.model.passes import run
from bwlens.model.prompts import Batch, make_batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import find_taps, resolve_layer
from bwlens.model.tokens import token_texts
from bwlens.model.weights import weights_of
from bwlens.reading.readouts import readout
from bwlens.runs.paths import writable

_AT_ONCE = 16
_BESIDE = 12


class Context(NamedTuple):
    """A token of a text, with what stands beside it and the neuron's weight there."""

    weight: float
    before: tuple[str, ...]
    token: str
    after: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class NeuronPage:
    """What one neuron writes, and what it answers to.

    Attributes:
        neuron: Which one.
        promoted: The words that its row raises most where its weight is positive.
        suppressed: Those that it lowers most there.
        contexts: Where in the text its weight is largest (in size), the largest first.
        n_tokens: How many tokens of text there were.
    """

    neuron: Neuron
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]
    contexts: tuple[Context, ...]
    n_tokens: int

    def save(self, path: str | Path) -> Path:
        """Write it as a page (.html).

        Raises:
            ValueError: Another ending, or a folder that is not there.
        """
        from bwlens.show.neurons import neuron_page

        path = writable(path, (".html",))
        path.write_text(neuron_page(self), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        first = self.contexts[0] if self.contexts else None
        at = "" if first is None else f", strongest at {''.join(first.before[-4:])}[{first.token}]"
        return f"NeuronPage({self.neuron}: raises {' '.join(self.promoted[:4])}{at})"

    def _repr_html_(self) -> str:
        from bwlens.show.neurons import neuron

        return neuron(self)


def neuron_page(
    model: LensModel,
    neuron: Sequence[Any],
    text: str | Sequence[str] = "demo",
    *,
    top_k: int = 10,
) -> NeuronPage:
    """One neuron's row in words, and the tokens of a text at which it is weighted most.

    Args:
        model: A TransformerBridge or HookedTransformer.
        neuron: (layer, index), with experts (layer, index, expert).
        text: Texts, or a source as `bwlens.evaluate` has it for perplexity; 100 lines are read.
        top_k: How many contexts.

    Raises:
        ValueError: No such row, or no text.

    Example:
        >>> neuron_page(model, (3, 17), ["Messi plays for Barcelona."])  # doctest: +SKIP
    """
    one = Neuron(*neuron)
    one = one._replace(layer=resolve_layer(model, one.layer))
    weight = weights_of(model, [one.site])[one.site]
    if not 0 <= one.index < weight.shape[0]:
        raise ValueError(f"{one.site} has rows 0 to {weight.shape[0] - 1}, found {one.index}")
    lines = read_prose(text) if isinstance(text, str) else [line for line in text if line.strip()]
    if not lines:
        raise ValueError("no text to look for the neuron in; give some lines")
    limit = int(getattr(model.cfg, "n_ctx", 512) or 512)
    found: list[tuple[float, list[int], int]] = []
    n_tokens = 0
    for batch, weights in activations(model, lines, [one.layer], limit):
        column = weights(one)
        n_tokens += batch.n_rows
        sizes = column.abs().masked_fill(~batch.mask.cpu(), -1.0)
        for place in sizes.flatten().topk(min(top_k, sizes.numel())).indices.tolist():
            row, pos = divmod(place, sizes.shape[1])
            if sizes[row, pos] > 0:
                length = int(batch.lengths[row])
                found.append((float(column[row, pos]), batch.tokens[row, :length].tolist(), pos))
    found.sort(key=lambda context: -abs(context[0]))
    contexts = []
    for value, ids, pos in found[:top_k]:
        texts = token_texts(model.tokenizer, ids)
        low = max(0, pos - _BESIDE)
        after = texts[pos + 1 : pos + 1 + _BESIDE // 2]
        contexts.append(Context(value, tuple(texts[low:pos]), texts[pos], tuple(after)))
    row = weight.live[one.index].detach()
    read = readout(model, row[None], top_k=min(N_WORDS, model.cfg.d_vocab), normalize=True)
    ends = [
        token_texts(model.tokenizer, ids[0].tolist()) for ids in (read.top_ids, read.bottom_ids)
    ]
    return NeuronPage(one, tuple(ends[0]), tuple(ends[1]), tuple(contexts), n_tokens)


def activations(
    model: LensModel, lines: Sequence[str], layers: Sequence[int], limit: int = 512
) -> Any:
    """Batches of lines, and for each a function from a neuron to its weights [batch, pos].

    Lines that are too long are cut; an expert's weight is 0 where a token does not pass it.
    """
    taps = find_taps(model, "W_out", list(layers))
    tokens = [make_batch(model, line).tokens[0, :limit].tolist() for line in lines]
    for at in range(0, len(tokens), _AT_ONCE):
        batch = make_batch(model, tokens[at : at + _AT_ONCE])
        passed = run(model, batch.tokens, taps=taps, until=model.blocks[max(layers)])
        yield batch, _Weights(batch, passed.flows)


class _Weights:
    """What passed some stores."""

    def __init__(self, batch: Batch, flows: Sequence[Any]) -> None:
        self._shape, self._flows = tuple(batch.tokens.shape), flows

    def __call__(self, one: Neuron) -> Float[Tensor, "batch pos"]:
        """The weights of one neuron."""
        return self.store(one)[..., one.index]

    def store(self, one: Neuron) -> Float[Tensor, "batch pos d_mlp"]:
        """Those of all neurons of its store."""
        for flow in self._flows:
            if any(site == one.site for site, _ in flow.parts):
                x = as_rows(flow.x).detach().float().cpu()
                if flow.tokens is None:
                    return x.reshape(*self._shape, -1)
                every = torch.zeros(self._shape[0] * self._shape[1], x.shape[1])
                return every.index_copy(0, flow.tokens.cpu(), x).reshape(*self._shape, -1)
        raise ValueError(f"no token passed {one.site}")
