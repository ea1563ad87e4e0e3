"""How far the words of a reading say what a step does: its correlation with the measured effect.

A reading gives each word a score; a step on that cell, taken, gives each word a change of its
log-probability (`bwlens.reading.effect`). Trust is how well the two agree, layer by layer:

- `vocabulary`, `plausible`: Pearson's r over all words, and over the 1,000 that the model holds
  most likely at the position that the loss reads, where a prediction is decided;
- `promoted`, `suppressed`: the share of the 20 words that the reading promotes (suppresses) most
  that are among the 20 whose log-probability the step raises (lowers) most.

Two controls say what agreement means nothing: the reading of a random vector as long as delta, and
of another prompt's delta, each against the same effect. With it goes a check of the gradient
itself: the loss must fall by what ||delta|| says.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bwlens.gradient.capturing import Gradients, capture
from bwlens.gradient.objectives import NLL
from bwlens.gradient.probe import UntrueGradientError
from bwlens.model.sites import Site
from bwlens.reading.effect import AGREES, WRONG, EffectOf, correlation, tempered
from bwlens.reading.readouts import all_scores
from bwlens.reading.standardised import head_by
from bwlens.reading.transported import transported

if TYPE_CHECKING:
    import pandas as pd

PLAUSIBLE = 1000
TOP = 20
FLOOR = 0.3
"""Least r over plausible words for a layer's words to count: above 95 % of the controls' r.

Twelve CounterFact prompts on SmolLM2, kept for tuning, all layers but the last, plain, dual and
cosine: .14 to .20 for random vectors, .23 to .26 for other prompts' deltas.
"""
_GOOD = 0.5

Scores = Float[Tensor, "cell d_vocab"]


class Agreement(NamedTuple):
    """How well scores agree with effects, each [cell]; nan where either has none."""

    vocabulary: Tensor
    plausible: Tensor
    promoted: Tensor
    suppressed: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Trust:
    """How far a reading can be trusted, by layer; made by `backward_lens(..., trust=True)`.

    Attributes:
        reading: The reading that is judged.
        matrix: Of which matrix' delta.
        position: At which token.
        layers: The layers.
        vocabulary: Correlation with the measured effect over the vocabulary [layer].
        plausible: The same over the `PLAUSIBLE` likeliest words [layer].
        promoted: Share of the reading's 20 most promoted among the effect's [layer].
        suppressed: The same of the most suppressed [layer].
        fall: By how much the loss fell, over what was predicted [layer]; 1 where all is right.
        random: `plausible` of a random vector of delta's length [layer].
        random_vocabulary: `vocabulary` of it [layer].
        other: `plausible` of another prompt's delta [layer]: the same tokens backwards but for the
            first, towards the hundredth likeliest word.
        other_vocabulary: `vocabulary` of it [layer].

    nan: no gradient there, or no step size at which the effect can be measured.
    """

    reading: str
    matrix: str
    position: int
    layers: tuple[int, ...]
    vocabulary: Float[Tensor, " layer"]
    plausible: Float[Tensor, " layer"]
    promoted: Float[Tensor, " layer"]
    suppressed: Float[Tensor, " layer"]
    fall: Float[Tensor, " layer"]
    random: Float[Tensor, " layer"]
    random_vocabulary: Float[Tensor, " layer"]
    other: Float[Tensor, " layer"]
    other_vocabulary: Float[Tensor, " layer"]

    @property
    def believable(self) -> Bool[Tensor, " layer"]:
        """Layers whose r over plausible words reaches `FLOOR`, and exceeds both controls' [layer].

        False where nothing could be measured.
        """
        controls = torch.stack([self.random, self.other]).nan_to_num(-1.0).amax(0)
        return (self.plausible >= FLOOR) & (self.plausible > controls)

    def verdict(self, at: int) -> str:
        """The layer at a place of `layers`, in a word: "good", "some", "none" or "unknown"."""
        r = float(self.plausible[at])
        if r != r:
            return "unknown"
        return "none" if not self.believable[at] else "good" if r >= _GOOD else "some"

    def sentence(self, at: int) -> str:
        """The layer at a place of `layers`, in a sentence."""
        verdict, r = self.verdict(at), float(self.plausible[at])
        if verdict == "unknown":
            return f"Layer {self.layers[at]}: no effect of a step could be measured here."
        by_chance = r <= max(float(self.random[at]), float(self.other[at]))
        controls = f"a random vector {self.random[at]:.2f}, another prompt's {self.other[at]:.2f}"
        said = {
            "good": "the words say what the step does",
            "some": "the words say something of what the step does",
            "none": "the words say no more of what the step does than chance"
            if by_chance
            else "the words say little of what the step does",
        }[verdict]
        if self.reading.startswith("effect"):
            said = "measured, not read"
        return (
            f"Layer {self.layers[at]}: {said}; r = {r:.2f} with the measured effect over"
            f" likely words ({controls}), {self.vocabulary[at]:.2f} over all."
        )

    def to_frame(self) -> pd.DataFrame:
        """A row for each layer."""
        import pandas as pd

        names = [name for name, kind in self.__annotations__.items() if "Tensor" in str(kind)]
        columns = {name: getattr(self, name).tolist() for name in names}
        verdicts = [self.verdict(at) for at in range(len(self.layers))]
        return pd.DataFrame({"layer": self.layers, **columns, "verdict": verdicts})

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        table = self.to_frame().to_string(index=False, float_format="%.2f")
        where = f"{self.matrix} at position {self.position}, {self.reading} reading"
        return (
            f"{where}: correlation with the measured effect of a step\n{table}\n"
            f"none: r over likely words is below {FLOOR} or a control's"
        )


def agreement(scores: Scores, effects: Scores, probabilities: Tensor) -> Agreement:
    """How well scores (the most promoted highest) agree with effects, cell by cell."""
    likely = probabilities.topk(min(PLAUSIBLE, scores.shape[1])).indices
    blank = (scores.isnan() | effects.isnan()).any(1)
    every, some = correlation(scores, effects), correlation(scores[:, likely], effects[:, likely])
    overlaps = []
    for sign in (1, -1):
        one, other = ((sign * rows).nan_to_num().topk(TOP).indices for rows in (scores, effects))
        overlaps.append((one[:, :, None] == other[:, None]).any(2).float().mean(1))
    return Agreement(*(part.masked_fill(blank, float("nan")) for part in (every, some, *overlaps)))


def delta_scores(
    model: Any, deltas: Float[Tensor, "cell d_model"], reading: str, bias: bool = True
) -> Scores:
    """Every word's score by a reading of delta ("effect" excepted), the most promoted highest."""
    head = head_by(model, reading, bias)
    # A step subtracts: delta's least is promoted most.
    return -all_scores(head, deltas, normalize=reading == "normalised")


def true_effects(
    task: EffectOf, cells: Sequence[tuple[Site, int]], deltas: Sequence[Tensor]
) -> tuple[Scores, Float[Tensor, " cell"]]:
    """Measured effects of the cells' own deltas, and the loss' fall over what was predicted.

    Cells whose loss falls otherwise than predicted are tried with other step sizes; nan where none
    will do.

    Raises:
        UntrueGradientError: Steps of two sizes agree on what they do, and the loss does not fall by
            what ||delta|| says: this delta is not the gradient.
    """
    effects, fall = task.along(cells, deltas)
    off = [
        i
        for i, fell in enumerate(fall.tolist())
        if deltas[i].any() and not abs(fell - 1) <= WRONG  # also where it is nan
    ]
    if off:
        again = task.of([cells[i] for i in off])
        wrong = (again.agreement >= AGREES) & ((again.fall - 1).abs() > WRONG)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise UntrueGradientError(
                f"a step on {cells[off[at]][0]} at position {cells[off[at]][1]} was to lower the"
                f" loss by {float(again.nats[at]):.2g} nats and lowers it by"
                f" {float(again.fall[at]):.3f} of that ({int(wrong.sum())} of {len(cells)} cells"
                f" like it): delta is not the gradient there. bwlens.check(model) shows all figures"
            )
        drowned = ~again.measured
        effects[off] = again.scores.masked_fill(drowned[:, None], float("nan"))
        fall[off] = again.fall
    return effects, fall


def controls(
    deltas: Float[Tensor, "cell d_model"], others: Float[Tensor, "cell d_model"], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random vectors and other deltas, both as long as the deltas they stand beside."""
    noise = torch.randn(deltas.shape, generator=torch.Generator().manual_seed(seed)).to(deltas)
    lengths = deltas.norm(dim=1, keepdim=True)
    noise, others = (torch.nn.functional.normalize(rows, dim=1) for rows in (noise, others))
    return noise * lengths, others * lengths


def other_deltas(
    model: Any, grads: Gradients, matrix: str, layers: Sequence[int], position: int
) -> Float[Tensor, "layer d_model"]:
    """The deltas of another prompt and target: see `Trust.other`."""
    n_prompt = int(grads.batch.prompt_lengths[0])
    tokens = grads.batch.tokens[0, :n_prompt]
    backwards = torch.cat([tokens[:1], tokens[1:].flip(0)])
    order = grads.next_logits[0].argsort(descending=True).tolist()
    used = [ids[:1] for ids in grads.batch.targets]
    words = [i for i in order[: 2 * min(100, len(order) // 2)] if (i,) not in used]
    target = words[len(words) // 2]
    found = capture(model, backwards, NLL([target]), [matrix], layers)
    pos = min(position, n_prompt - 1)
    return torch.stack([found[matrix, layer].delta[pos].to(tokens.device) for layer in layers])


def measure_trust(
    model: Any,
    grads: Gradients,
    objective: Any,
    matrix: str,
    layers: Sequence[int],
    position: int,
    *,
    readings: Sequence[str] = ("plain",),
    temper: float = 0.0,
    bias: bool = True,
    jacobian: Any = None,
) -> dict[str, Trust]:
    """The trust of readings of one matrix' delta at one position of one prompt.

    Costs two replays from each cell's layer on (four more where a reading is the effect itself,
    for its controls) and one forward and backward pass of the other prompt.

    Raises:
        UntrueGradientError: Capture is wrong here; see `true_effects`.
        NotImplementedError: A mixture's expert, whose effect is not read.
        ValueError: A loss that reads no logits, or several prompts.
    """
    if any(site.matrix == matrix and site.expert is not None for site in grads):
        raise NotImplementedError(
            f"the trust of {matrix} is not measured: a token has a step of its own in each expert,"
            f" whose effects are not read; read W_O instead, which is no part of a mixture"
        )
    task = EffectOf(model, grads, objective)
    cells = [(Site(matrix, layer), position) for layer in layers]
    deltas = torch.stack([grads[site].delta[pos].to(task.device) for site, pos in cells])
    effects, fall = true_effects(task, cells, list(deltas))
    others = other_deltas(model, grads, matrix, layers, position).to(deltas)

    likely = task.probabilities_at(position)
    noise, others = controls(deltas, others)

    def scores(reading: str) -> list[Tensor]:
        """Of delta and of both controls."""
        if reading == "effect":
            stepped = (task.along(cells, list(rows))[0] for rows in (noise, others))
            return [tempered(rows, likely, temper) for rows in (effects, *stepped)]
        several = [deltas, noise, others]
        if reading == "transported":
            several = [transported(jacobian, layers, rows) for rows in several]
        return [delta_scores(model, rows, reading, bias).to(effects) for rows in several]

    judged = {}
    for reading in readings:
        own, random, other = (agreement(rows, effects, likely) for rows in scores(reading))
        judged[reading] = Trust(
            reading=f"{reading}, temper {temper}" if temper and reading == "effect" else reading,
            matrix=matrix,
            position=position,
            layers=tuple(layers),
            **{name: part.cpu() for name, part in own._asdict().items()},
            fall=fall.cpu(),
            random=random.plausible.cpu(),
            random_vocabulary=random.vocabulary.cpu(),
            other=other.plausible.cpu(),
            other_vocabulary=other.vocabulary.cpu(),
        )
    return judged
