"""`subject_shift` beside `rome`, and the search for values beside the plain one."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch

import bwlens
from benchmarks.measure import Note, Row, race, timed
from benchmarks.setting import Setting
from bwlens.data.prose import read_prose
from bwlens.edit._subject_shift import PREFIXES
from bwlens.edit.aims import Aims
from bwlens.edit.keys import shift_of
from bwlens.edit.value import Value, ValueSearch, ValueSettings
from bwlens.model.passes import run

FACT = bwlens.Edit("{} is in the city of", "The Eiffel Tower", " Rome", " Paris")


def edits(setting: Setting) -> list[Row | Note]:
    """Both with their own numbers of steps; of each, the target's probability afterwards."""
    model = setting.real
    layer = round(5 / 29 * (len(model.blocks) - 1))
    statistics = bwlens.edit.key_statistics(
        model,
        read_prose("demo"),
        layers=layer,
        cache=False,
        max_tokens=1000 if setting.quick else 20_000,
    )
    options: dict[str, Any] = {"layer": layer, "prefixes": PREFIXES, "statistics": statistics}
    if setting.quick:
        options["steps"] = 1
    shift, rome = (
        partial(method, model, FACT, **options)
        for method in (bwlens.edit.subject_shift, bwlens.edit.rome)
    )
    said = ", ".join(
        f"{change.details['method']} {_probability(model, change):.3f}"
        for change in (shift(), rome())
    )
    return [
        race("subject shift / ROME", timed(shift), timed(rome), setting.repeats, 0.2),
        Note(
            f"edits: {setting.real_name}, W_out of layer {layer}, {len(PREFIXES)} prefixes; the"
            f" target's probability afterwards: {said}"
        ),
    ]


def searches(setting: Setting) -> list[Row | Note]:
    """ROME's values of several facts: in batches, one by one, and by passes of everything."""
    model, n = setting.real, setting.n_prompts(16)
    site = bwlens.Site("W_out", round(5 / 29 * (len(model.blocks) - 1)))
    search = ValueSearch(ValueSettings(1 if setting.quick else 5), PREFIXES, "subject", None)
    places = [("The {} is in the city of", name) for name in ("Louvre", "Colosseum", "Prado")]
    people = [("{} was born in", name) for name in ("Albert Einstein", "Marie Curie", "Plato")]
    several = [bwlens.Edit(*one, " Rome") for one in [*places, *people]]
    facts = (several * n)[:n]

    def together() -> list[Value]:
        return search.values(model, facts, site)

    def one_by_one() -> list[Value]:
        return [value for fact in facts for value in search.values(model, [fact], site)]

    def plain() -> list[Value]:
        with patch("bwlens.edit.value.Aims", _PlainAims):
            return one_by_one()

    pairs = zip(together(), plain(), strict=True)
    apart = max(float((a.delta - b.delta).norm() / b.delta.norm()) for a, b in pairs)
    fast = timed(together)
    return [
        race("values together / one by one", fast, timed(one_by_one), setting.repeats, 0.8),
        race("values together / plain passes", fast, timed(plain), setting.repeats, 0.25),
        Note(f"values: {n} facts, {setting.real_name}, {site}; they differ by {apart:.1g} at most"),
    ]


class _PlainAims(Aims):
    """Each pass runs the whole model and unembeds every position."""

    def words(self, shifts: Any) -> Any:
        contexts, batch = self._contexts, self._contexts.batch
        added = shift_of(self._tap, batch, contexts.rows, shifts.repeat_interleave(contexts.n, 0))
        passed = run(self._model, batch.tokens, additions=[added], graph=True)
        words = passed.logits.log_softmax(-1)
        return contexts.by_edit(words[torch.arange(len(batch))[:, None], self._positions])


def _probability(model: Any, change: Any) -> float:
    target = model.to_tokens(FACT.target_new, prepend_bos=False)[0, 0]
    with change.applied(model), torch.no_grad():
        logits = model(model.to_tokens(FACT.text), return_type="logits")
    return float(logits[0, -1].softmax(-1)[target])
