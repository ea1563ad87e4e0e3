"""Does taking away the rows that give an answer take the answer, and only that?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.data.prose import read_prose
from bwlens.knowledge._ablate import ablate
from bwlens.knowledge._neurons import Neuron, Neurons
from bwlens.knowledge._pages import activations
from bwlens.model.losses import last_logits
from bwlens.model.passes import run, wide
from bwlens.model.places import ExpertTap
from bwlens.model.prompts import make_batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import find_taps
from bwlens.model.weights import parameter_of
from bwlens.runs.intervals import summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

SETS = ("largest share", "moved most", "another prompt's", "as frequent", "random")
"""Which neurons are taken away."""

FiringRates = dict[tuple[int, Any], Float[Tensor, " d_mlp"]]

PROMPTS = ("the prompt", "paraphrase", "another subject")

STRONGEST = 0.1
"""A neuron fires at a token where |a_j| |W_out[j]| is among the tenth largest of its layer."""


@dataclass(frozen=True, eq=False, repr=False)
class Controls:
    """What is lost without some neurons; made by `controls`.

    Attributes:
        rows: `neurons` (which, out of `SETS`), `size`, `draw`, `prompt` (its kind), `text`,
            `change` of the answer's log-probability, `kept` (still the likeliest).
    """

    rows: DataFrame

    @property
    def summary(self) -> DataFrame:
        """Means over draws and prompts with 95 % intervals."""
        rows = self.rows.assign(item=self.rows["text"] + self.rows["draw"].astype(str))
        return summarize(rows, ("neurons", "size", "prompt"), ("change", "kept"))

    def figure(self) -> Figure:
        """The change of log p by number of neurons taken away."""
        from bwlens.show.neurons import ablation_figure

        summary = self.summary
        return ablation_figure(summary[summary["quantity"] == "change"], SETS, PROMPTS)

    def __repr__(self) -> str:
        n = self.rows["size"].max()
        mean = self.summary.query("size == @n and quantity == 'change' and prompt == 'the prompt'")
        said = ", ".join(
            f"{a} {b:+.2f}" for a, b in zip(mean["neurons"], mean["mean"], strict=True)
        )
        return f"Controls(log p without {n} neurons: {said})"

    def _repr_html_(self) -> str:
        return self.summary.to_html(index=False, float_format="%.3f")


def controls(
    model: LensModel,
    found: Neurons,
    *,
    n: int | Sequence[int] = (1, 3, 10, 30, 100),
    paraphrases: Sequence[str] = (),
    others: Sequence[str] = (),
    another: Neurons | None = None,
    text: str | Sequence[str] = "demo",
    rates: FiringRates | None = None,
    draws: int = 5,
    seed: int = 0,
) -> Controls:
    """Ablate the n neurons with the largest shares, and as many others, on several prompts.

    The others: those that a step moves most; those with the largest shares in `another` prompt's
    answer; as many of the same layers that fire as often in a text (each drawn among the ten
    closest); as many of the same layers at random. On the prompt, on paraphrases (the same answer)
    and on other subjects' prompts (each its own answer): what falls alike on all is no knowledge
    of this fact.

    Args:
        model: The model that `found` is of.
        found: What `neurons` gave.
        n: How many neurons.
        paraphrases: The same question in other words.
        others: The same question of other subjects.
        another: What `neurons` gave of another prompt.
        text: Where frequencies are counted: lines, or a source as for `neuron_page`.
        rates: What `firing_rates` gave of these layers, counted once for several prompts; None
            counts them.
        draws: How many times the random sets are drawn.
        seed: Of the draws.

    Raises:
        ValueError: More neurons than there are, or none.
    """
    import pandas as pd

    sizes = [n] if isinstance(n, int) else list(n)
    there = sum(map(len, found.weights))
    if not sizes or min(sizes) < 1 or max(sizes) > there:
        raise ValueError(
            f"n is {n}; expected numbers from 1 to {there}, the neurons that were read"
        )
    asked = [("the prompt", found.prompt), *(("paraphrase", p) for p in paraphrases)]
    asked += [("another subject", p) for p in others]
    texts = [text for _, text in asked]
    before = _log_probs(model, texts)
    answers = [
        found.target_id if kind != "another subject" else int(row.argmax())
        for (kind, _), row in zip(asked, before, strict=True)
    ]
    largest = found.top(max(sizes))
    if rates is None:
        rates = firing_rates(model, {one.layer for one in largest}, text)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for size in sizes:
        chosen = largest[:size]
        sets = [("largest share", 0, chosen), ("moved most", 0, found.top(size, by="moved"))]
        sets += [] if another is None else [("another prompt's", 0, another.top(size))]
        for draw in range(draws):
            sets.append(("as frequent", draw, alike(chosen, rates, generator)))
            sets.append(("random", draw, alike(chosen, rates, generator, closest=None)))
        for name, draw, some in sets:
            with ablate(model, some):
                after = _log_probs(model, texts)
            for (kind, said), was, now, answer in zip(asked, before, after, answers, strict=True):
                rows.append(
                    {
                        "neurons": name,
                        "size": size,
                        "draw": draw,
                        "prompt": kind,
                        "text": said,
                        "change": float(now[answer] - was[answer]),
                        "kept": float(now.argmax() == answer),
                    }
                )
    return Controls(pd.DataFrame(rows))


def firing_rates(
    model: LensModel, layers: Collection[int], text: str | Sequence[str] = "demo"
) -> FiringRates:
    """How often each neuron is among the strongest tenth of its layer, by (layer, expert).

    Strong is |a_j| |W_out[j]|, at each token of the text's first 32 lines.

    Args:
        model: A TransformerBridge or HookedTransformer.
        layers: Whose neurons.
        text: Lines, or a source as for `neuron_page`.
    """
    lines = read_prose(text) if isinstance(text, str) else list(text)
    lengths: dict[tuple[int, Any], Tensor] = {}
    for tap in find_taps(model, "W_out", sorted(layers)):
        if isinstance(tap, ExpertTap):
            sites = [Neuron(tap.layer, 0, at).site for at in range(len(tap.experts.down_proj))]
        else:
            sites = [tap.site]
        for site in sites:
            rows = wide(parameter_of(tap, site)[1].detach())
            lengths[site.layer, site.expert] = rows.norm(dim=1).cpu()
    counts = {store: torch.zeros(len(length)) for store, length in lengths.items()}
    seen = 0
    for batch, weights in activations(model, lines[:32], sorted(layers)):
        seen += batch.n_rows
        for (layer, expert), length in lengths.items():
            try:
                a = weights.store(Neuron(layer, 0, expert))[batch.mask.cpu()]
            except ValueError:
                continue  # no token of the batch passed this expert
            strength = a.abs() * length
            k = max(1, round(STRONGEST * len(length)))
            least = strength.topk(k, dim=1).values[:, -1:].clamp_min(1e-30)
            counts[layer, expert] += (strength >= least).sum(0)
    return {store: counted / max(1, seen) for store, counted in counts.items()}


def alike(
    chosen: Sequence[Neuron],
    rates: FiringRates,
    generator: torch.Generator,
    closest: int | None = 10,
) -> list[Neuron]:
    """For each neuron another of its store, drawn among those that fire about as often."""
    taken = set(chosen)
    out = []
    for one in chosen:
        rate = rates[one.layer, one.expert]
        order = (rate - rate[one.index]).abs().argsort(stable=True)
        if closest is None:
            order = torch.randperm(len(rate), generator=generator)
        free: list[Neuron] = []
        for index in order.tolist():
            other = one._replace(index=index)
            free += [] if other in taken else [other]
            if len(free) == (closest or 1):
                break
        if not free:
            continue  # the whole store is taken
        other = free[int(torch.randint(len(free), (1,), generator=generator))]
        taken.add(other)
        out.append(other)
    return out or list(chosen)


def _log_probs(model: LensModel, texts: Sequence[str]) -> Float[Tensor, "text d_vocab"]:
    batch = make_batch(model, list(texts))
    logits = run(model, batch.tokens).logits
    return wide(last_logits(logits, batch)).log_softmax(-1).cpu()
