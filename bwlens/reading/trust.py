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
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bwlens.gradient.capturing import Gradients, capture
from bwlens.gradient.objectives import NLL
from bwlens.gradient.probe import UntrueGradientError
from bwlens.model.passes import all_modules
from bwlens.model.prompts import Batch, make_batch
from bwlens.model.replay import Replay
from bwlens.model.sites import Site
from bwlens.reading.effect import AGREES, WRONG, EffectOf, correlation, tempered
from bwlens.reading.scoring import all_scores
from bwlens.reading.standardised import head_by
from bwlens.reading.transported import transported

if TYPE_CHECKING:
    import pandas as pd

PLAUSIBLE = 1000
SAMPLE = 4096
"""Least number of words over which a control is judged where all of them are meant."""
TOP = 20
FLOOR = 0.3
"""Least r over plausible words for a layer's words to count: above 95 % of the controls' r.

Twelve CounterFact prompts on SmolLM2, kept for tuning, all layers but the last, plain, dual and
cosine: .14 to .20 for random vectors, .23 to .26 for other prompts' deltas.
"""
_GOOD = 0.5
_OTHERS = (
    ("The capital of France is", " Rome"),
    ("Her father works as a", " doctor"),
    ("In the morning she went to the", " bank"),
)

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
        random_vocabulary: `vocabulary` of it, over every so-manieth word [layer].
        other: `plausible` of another prompt's delta [layer]: at the last token of "The capital of
            France is", towards " Rome" (of another, where that is asked).
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
        where = {"layer": self.layers, "position": self.position}
        return pd.DataFrame({**where, **columns, "verdict": verdicts})

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
    model: Any,
    deltas: Float[Tensor, "cell d_model"],
    reading: str,
    bias: bool = True,
    tokens: Tensor | None = None,
) -> Scores:
    """Every word's score by a reading of delta ("effect" excepted), the most promoted highest.

    With `tokens` (ids), those words' alone.
    """
    head = head_by(model, reading, bias)
    # A step subtracts: delta's least is promoted most.
    return -all_scores(head, deltas, reading == "normalised", tokens)


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
    noise, others = (
        torch.nn.functional.normalize(rows, dim=1) for rows in (noise, others.to(deltas))
    )
    return noise * lengths, others * lengths


def other_deltas(
    model: Any, grads: Gradients, matrix: str, layers: Sequence[int]
) -> Float[Tensor, "layer d_model"]:
    """The deltas of another prompt and target, at its last token: see `Trust.other`.

    Kept as long as the model's parameters are not written to.
    """
    tokens, targets = grads.batch.tokens[0].tolist(), {ids[0] for ids in grads.batch.targets}
    batches = [make_batch(model, prompt, target) for prompt, target in _other_prompts(model)]

    def alike(batch: Batch) -> int:
        own = batch.tokens[0, : int(batch.last[0]) + 1].tolist()
        return 2 * (batch.targets[0][0] in targets) + (own == tokens[: len(own)])

    one = min(batches, key=alike)
    parameters = chain.from_iterable(m.parameters(recurse=False) for m in all_modules(model))
    state = tuple((p.data_ptr(), p._version) for p in parameters)
    before, kept = _kept.get(model, (None, {}))
    if before != state:
        kept = {}
        _kept[model] = state, kept
    key = (matrix, tuple(layers), one.targets[0])
    if key not in kept:
        last = int(one.last[0])
        found = capture(model, one.tokens[0, : last + 1], NLL([one.targets[0][0]]), matrix, layers)
        rows = (found[matrix, layer].delta[last] for layer in layers)
        kept[key] = torch.stack([row.to(found.next_logits.device) for row in rows])
    return kept[key]


_kept: WeakKeyDictionary[Any, tuple[Any, dict[Any, Tensor]]] = WeakKeyDictionary()


def _other_prompts(model: Any) -> list[tuple[Any, Any]]:
    """Prompts and targets that have nothing to do with most; ids where there are no such words."""
    try:
        make_batch(model, *_OTHERS[0])
    except (ValueError, AttributeError):
        n = int(model.cfg.d_vocab)
        ids = torch.tensor([int(part * n) for part in (0.11, 0.31, 0.53, 0.71)])
        return [(ids, [int(part * n)]) for part in (0.83, 0.17, 0.43)]
    return list(_OTHERS)


def measure_trust(
    model: Any,
    grads: Gradients,
    objective: Any,
    matrix: str,
    layers: Sequence[int],
    positions: Sequence[int],
    *,
    readings: Sequence[str] = ("plain",),
    temper: float = 0.0,
    bias: bool = True,
    jacobian: Any = None,
    every: Replay | None = None,
) -> dict[str, dict[int, Trust]]:
    """The trust of readings of one matrix' delta, by reading and position of one prompt.

    Costs one replay from each cell's layer and position on (two more where a reading is the effect
    itself, for its controls), and once a model a forward and backward pass of the other prompt.

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
    task = EffectOf(model, grads, objective, every)
    # Blocks may be of several kinds: where one has no such matrix, nothing is measured (nan).
    rows = torch.tensor([at for at, n in enumerate(layers) if Site(matrix, n) in grads])
    wanted, layers = tuple(layers), [layers[at] for at in rows.tolist()]
    others = other_deltas(model, grads, matrix, layers)
    judged: dict[str, dict[int, Trust]] = {reading: {} for reading in readings}
    for position in positions:
        cells = [(Site(matrix, layer), position) for layer in layers]
        deltas = torch.stack([grads[site].delta[position].to(task.device) for site, _ in cells])
        effects, fall = true_effects(task, cells, list(deltas))
        beside = torch.cat(controls(deltas, others))
        likely = task.probabilities_at(position)
        # A control is judged by the likely words, and by every so-manieth of the vocabulary.
        n_likely, apart = min(PLAUSIBLE, len(likely)), max(1, len(likely) // SAMPLE)
        sample = torch.arange(0, len(likely), apart, device=likely.device)
        some = torch.cat([likely.topk(n_likely).indices, sample])
        true = effects[:, some].repeat(2, 1)
        for reading in readings:
            if reading == "effect":
                stepped = task.along(cells * 2, list(beside))[0]
                own = tempered(effects, likely, temper)
                chance = tempered(stepped, likely, temper)[:, some]
            else:
                own, chance = deltas, beside
                if reading == "transported":
                    own = transported(jacobian, layers, own)
                    chance = transported(jacobian, [*layers, *layers], chance)
                own = delta_scores(model, own, reading, bias).to(effects)
                chance = delta_scores(model, chance, reading, bias, some).to(effects)
            plausible = correlation(chance[:, :n_likely], true[:, :n_likely]).chunk(2)
            vocabulary = correlation(chance[:, n_likely:], true[:, n_likely:]).chunk(2)
            parts = [*agreement(own, effects, likely), fall]
            parts += chain(*zip(plausible, vocabulary, strict=True))
            judged[reading][position] = Trust(
                f"effect, temper {temper}" if temper and reading == "effect" else reading,
                matrix,
                position,
                wanted,
                *(
                    part.new_full((len(wanted),), torch.nan, device="cpu").index_copy(
                        0, rows, part.cpu()
                    )
                    for part in parts
                ),
            )
    return judged
