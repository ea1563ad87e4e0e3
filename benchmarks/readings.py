"""The readings beside the paper's, and beside bare passes, on a real model where there is one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import bwlens
from benchmarks.measure import Note, Row, race, timed
from benchmarks.setting import Setting

PROMPT, TARGET = "The Eiffel Tower is in the city of", " Rome"


def readings(setting: Setting) -> list[Row | Note]:
    """`dual` beside `plain`, `effect` beside forward and backward passes, `trust` beside none."""
    model, repeats = setting.real, setting.repeats
    lens = partial(bwlens.backward_lens, model, PROMPT, TARGET)
    effect = partial(lens, reading="effect", matrices="W_out")
    tokens = model.to_tokens(PROMPT)
    target = model.to_tokens(TARGET, prepend_bos=False)[0, :1]

    def passes() -> Any:
        loss = torch.nn.functional.cross_entropy(model(tokens, return_type="logits")[:, -1], target)
        loss.backward()
        model.zero_grad()

    rows = [
        ("lens, dual / plain", lambda: lens(reading="dual"), lens, 1.3),
        ("lens, cosine / plain", lambda: lens(reading="cosine"), lens, 1.3),
        ("lens, trust measured / not", lambda: lens(trust=True), lens, 1.5),
        (
            "effect of W_out at the last token / forward and backward pass",
            lambda: effect(positions="last"),
            passes,
            10.0,
        ),
        ("effect of W_out at every token / forward and backward pass", effect, passes, 60.0),
    ]
    return [
        *(race(what, timed(ours), timed(other), repeats, most) for what, ours, other, most in rows),
        Note(
            f"readings: {setting.real_name}, {len(model.blocks)} layers, {tokens.shape[1]} tokens;"
            f" the passes read nothing"
        ),
    ]
