"""Which reading when: how far each reading's words are what a step on a layer does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from bwlens.data.given import Edits, as_edits, as_list
from bwlens.data.records import Record
from bwlens.experiments.base import Experiment, Reading, Result, check_effects
from bwlens.experiments.columns import frame
from bwlens.experiments.running import run
from bwlens.gradient.objectives import NLL
from bwlens.model.prompts import Edit, make_batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site
from bwlens.reading.effect import EffectOf, tempered
from bwlens.reading.trust import agreement, controls, delta_scores, other_deltas, true_effects
from bwlens.runs.intervals import RESAMPLES, summarize

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

READINGS = ("plain", "cosine", "dual", "dual^0.05", "effect", "effect^0.1", "effect^0.2")
"""Readings; `^t` weighs their scores by p^t, p the model's own probability before the step."""

_WHOSE = ("", "_random", "_other")
_VALUES = ("r", "r_plausible", "promoted", "suppressed", "in_ten", "place")
_MOST_OBJECTS = 50


@dataclass(frozen=True)
class ReadingFidelity(Experiment):
    """Each reading of W_out's delta at the prompt's last token, held against the measured effect.

    Rows: `item`, `reading`, `layer`; `r` and `r_plausible`, `promoted` and `suppressed` as in
    `bwlens.reading.trust`; `place`, the target's from the promoted end (1 the most), and `in_ten`,
    whether it is among the ten. Ending in `_random` and `_other`: the same of a random vector and
    of another prompt's delta, as long as delta (the next prompt of the batch whose target differs).
    `in_ten_object` and `place_object`: of another word that answers the same relation. A reading
    says something of a step only where it beats these.

    The summary also has `median_place`, with its interval.
    """

    readings: tuple[str, ...] = READINGS
    objects: tuple[tuple[str, ...], ...] = ()
    """Words that answer the same relation, relation by relation; `given` reads them off data."""

    name: ClassVar[str] = "reading_fidelity"
    title: ClassVar[str] = "Which reading says what a step does"
    source: ClassVar[str] = "Figures of its own"
    caption: ClassVar[str] = (
        "Solid: the target among the ten words promoted most, and the correlation with the measured"
        " effect over the 1,000 likeliest words. A reading says something only where it stands"
        " above its controls: a random vector, another prompt's delta, another word of the same"
        " relation. An effect agrees with itself."
    )
    published: ClassVar[str] = "nothing: the paper takes the plain reading at its word."
    in_paper: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...] | None] = ("W_out",)

    def __post_init__(self) -> None:
        for name in self.readings:
            kind, _, temper = name.partition("^")
            if kind not in ("plain", "cosine", "dual", "effect") or not _is_share(temper or "0"):
                raise ValueError(
                    f"no reading {name!r}; there are plain, cosine, dual and effect, each also"
                    f" tempered as in 'effect^0.1'"
                )

    def wanted(self, model: Any) -> tuple[str, ...]:
        """W_out; refused where it is a mixture's, whose effects are not read."""
        check_effects(self.name, model, ["W_out"])
        return super().wanted(model)

    def given(self, data: Any) -> ReadingFidelity:
        """This, with the words that answer each relation, as far as the data name them."""
        return self if self.objects else replace(self, objects=_objects(data))

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch."""
        grads = reading.grads
        layers = [site.layer for site in reading.sites(["W_out"])]
        columns = []
        for item, edit in enumerate(reading.edits):
            one, pos = grads.for_prompt(item), int(grads.batch.last[item])
            other = self._other(reading, item, layers)
            if other is None:
                other = other_deltas(reading.model, one, "W_out", layers)
            task = EffectOf(reading.model, one, NLL(edit.target_new))
            cells = [(Site("W_out", layer), pos) for layer in layers]
            deltas = torch.stack([one[site].delta[pos].to(task.device) for site, _ in cells])
            noise, other = controls(deltas, other, seed=int(one.batch.tokens.sum()))
            own, _ = true_effects(task, cells, list(deltas))
            rows = torch.cat([deltas, noise, other])
            effects = [own, *(task.along(cells, list(part))[0] for part in (noise, other))]
            words = [one.batch.targets[0][0], self._object(reading, edit)]
            for name, scores in self._scores(reading.model, rows, torch.cat(effects), task):
                values = dict(_values(scores, own, task.probabilities, words))
                columns.append({"item": item, "reading": name, "layer": layers, **values})
        return frame(columns)

    def _scores(
        self, model: Any, rows: Tensor, effects: Tensor, task: EffectOf
    ) -> Iterator[tuple[str, Tensor]]:
        """Each reading's scores of all the vectors, those without temper worked out once."""
        kept = {"effect": effects}
        for name in self.readings:
            kind, _, temper = name.partition("^")
            if kind not in kept:
                kept[kind] = delta_scores(model, rows, kind).to(effects)
            yield name, tempered(kept[kind], task.probabilities, float(temper or 0))

    def _other(self, reading: Reading, item: int, layers: Sequence[int]) -> Tensor | None:
        """The last token's deltas of the next prompt of the batch with another target."""
        batch = reading.grads.batch
        for step in range(1, len(batch)):
            at = (item + step) % len(batch)
            if batch.targets[at][0] != batch.targets[item][0]:
                one, pos = reading.grads.for_prompt(at), int(batch.last[at])
                rows = [one["W_out", layer].delta[pos] for layer in layers]
                return torch.stack([row.to(rows[0].device) for row in rows])
        return None

    def _object(self, reading: Reading, edit: Edit) -> int:
        """The first token of another word of the relation; -1 where none is known."""
        for group in self.objects:
            if edit.target_new not in group or (edit.target_true or group[0]) not in group:
                continue
            at = group.index(edit.target_new)
            own = _first(reading, edit, edit.target_new)
            for word in (*group[at + 1 :], *group[:at]):
                first = _first(reading, edit, word)
                if word != edit.target_true and first not in (own, -1):
                    return first
        return -1

    def summarize(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Means over prompts by reading and layer, and the target's median place."""
        import pandas as pd

        values = [c for c in rows if c not in ("item", "reading", "layer") and "place" not in c]
        means = summarize(rows, ["reading", "layer"], values)
        medians = []
        places = [c for c in rows if "place" in c]
        for at, group in rows.groupby(["reading", "layer"], sort=False, observed=True):
            name, layer = cast("tuple[str, int]", at)
            for place in places:
                held = group[place].dropna().to_numpy()
                if len(held):
                    drawn = np.random.default_rng(0).choice(held, (RESAMPLES, len(held)))
                    low, high = np.quantile(np.median(drawn, 1), (0.025, 0.975))
                    medians.append(
                        (name, layer, f"median_{place}", np.median(held), low, high, len(held))
                    )
        return pd.concat([means, pd.DataFrame(medians, columns=means.columns)], ignore_index=True)

    def draw(self, summary: pd.DataFrame) -> Figure:
        """The target's share among the ten and the correlation, their controls beside them."""
        from bwlens.show.drawing import panels

        quantities = {
            "in_ten": "target among the ten promoted",
            "in_ten_random": "the same, a random vector",
            "in_ten_other": "another prompt's \u03b4",
            "in_ten_object": "another word of the relation",
            "r_plausible": "r with the effect, likely words",
            "r_plausible_random": "r, a random vector",
            "r_plausible_other": "r, another prompt's \u03b4",
            "r": "r with the effect, all words",
        }
        there = [name for name in quantities if name in set(summary["quantity"])]
        figure, _ = panels(
            summary, [quantities[name] for name in there],
            [summary[summary["quantity"] == name] for name in there],
            "reading", self.readings, "share, or r", share_y=True,
        )  # fmt: skip
        return figure


def _values(
    scores: Tensor, effects: Tensor, probabilities: Tensor, words: Sequence[int]
) -> Iterator[tuple[str, Any]]:
    """The columns of one prompt and reading, of scores [whose * layer, d_vocab]."""
    target, another = words
    for whose, part in zip(_WHOSE, scores.chunk(len(_WHOSE)), strict=True):
        agrees = agreement(part, effects, probabilities)
        place = _places(part, target)
        ten = (place <= 10).float().masked_fill(place.isnan(), float("nan"))
        for name, value in zip(_VALUES, (*agrees, ten, place), strict=True):
            yield name + whose, value.cpu().numpy()
    there = scores.chunk(len(_WHOSE))[0]
    place = _places(there, another) if another >= 0 else there[:, 0] * float("nan")
    yield "place_object", place.cpu().numpy()
    yield "in_ten_object", (place <= 10).float().masked_fill(place.isnan(), np.nan).cpu().numpy()


def _places(scores: Tensor, word: int) -> Tensor:
    """The word's place from the promoted end, 1 the most promoted; nan where nothing is read."""
    higher = (scores > scores[:, [word]]).sum(1) + 1.0
    return higher.masked_fill(scores.isnan().any(1), float("nan"))


def _first(reading: Reading, edit: Edit, word: str) -> int:
    """The first token of a word as the prompt goes on with it; -1 where the tokenizer has none."""
    try:
        batch = make_batch(reading.model, edit.text, word, prepend_bos=reading.prepend_bos)
    except ValueError:
        return -1
    return batch.targets[0][0]


def _objects(data: Any) -> tuple[tuple[str, ...], ...]:
    """Words that answer the same relation (the same template, where no relation is named)."""
    groups: dict[str, set[str]] = {}
    for one in as_list(data):
        edit = as_edits(one)[0]
        relation = (one.relation if isinstance(one, Record) else None) or edit.prompt
        words = (edit.target_new, edit.target_true)
        groups.setdefault(relation, set()).update(word for word in words if word)
    # The same ones whatever the order of the data, and no more than a folder's settings can hold.
    return tuple(tuple(sorted(groups[relation])[:_MOST_OBJECTS]) for relation in sorted(groups))


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def reading_fidelity(
    model: LensModel,
    records: Edits,
    *,
    readings: str | Sequence[str] = READINGS,
    layers: Layers = None,
    **options: Any,
) -> Result:
    """How far each reading's words are what a step on a layer does, with controls.

    W_out, the prompt's last token; three replays of every layer a prompt. The settings are those of
    `ReadingFidelity` (records' relations give the control of another word), the options `run`'s.

    Raises:
        ValueError: No such reading.
        UntrueGradientError: The loss does not fall as delta says.

    Example:
        >>> result = reading_fidelity(model, read_records("demo"))  # doctest: +SKIP
        >>> result.figure()  # doctest: +SKIP
    """
    names = (readings,) if isinstance(readings, str) else tuple(readings)
    task = ReadingFidelity.of(model, layers, readings=names).given(records)
    return run(task, model, records, **options)
