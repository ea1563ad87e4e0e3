"""Many prompts at once, beside one at a time."""

from __future__ import annotations

from typing import Any

import torch

import bwlens
from benchmarks.measure import Note, Row, race, timed
from benchmarks.model import TARGET, random_tokens, text
from benchmarks.setting import Setting

N_PROMPTS = 32
SHORTEST, LONGEST = 5, 15


def batch(setting: Setting) -> list[Row | Note]:
    """`bwlens.capture` of 32 prompts of 5 to 15 tokens, W_in and W_out in all layers."""
    generator = torch.Generator().manual_seed(setting.seed)
    n = setting.n_prompts(N_PROMPTS)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (n,), generator=generator).tolist()
    prompts = [
        text(random_tokens(setting.shape, length, seed)) for seed, length in enumerate(lengths)
    ]

    def ours() -> Any:
        return bwlens.capture(setting.model, prompts, TARGET, prepend_bos=False)

    def reference() -> Any:
        return [
            bwlens.capture(setting.model, prompt, TARGET, prepend_bos=False) for prompt in prompts
        ]

    return [
        race(
            f"{n} prompts at once / one by one, throughput",
            timed(ours),
            timed(reference),
            setting.repeats,
            2.0,
            throughput=True,
        ),
        Note(
            f"batch: prompts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all,"
            f" {n * max(lengths)} when padded"
        ),
    ]
