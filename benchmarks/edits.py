"""`subject_shift` beside `rome`: one fact, the same layer, the same prefixes and statistics."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import bwlens
from benchmarks.measure import Note, Row, race, timed
from benchmarks.setting import Setting
from bwlens.data.prose import read_prose
from bwlens.edit._subject_shift import PREFIXES

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


def _probability(model: Any, change: Any) -> float:
    target = model.to_tokens(FACT.target_new, prepend_bos=False)[0, 0]
    with change.applied(model), torch.no_grad():
        logits = model(model.to_tokens(FACT.text), return_type="logits")
    return float(logits[0, -1].softmax(-1)[target])
