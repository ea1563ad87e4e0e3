"""R of every head beside the bare passes, and scores of many prompts beside a loop."""

from __future__ import annotations

from typing import Any

import torch

import bwlens
from benchmarks.batch import LONGEST, SHORTEST
from benchmarks.capture import loss_of
from benchmarks.measure import Note, Row, race, timed
from benchmarks.model import TARGET, random_tokens
from benchmarks.setting import Setting

N_PROMPTS = 100


def heads(setting: Setting) -> list[Row | Note]:
    """`reversed_attention` of all heads; `head_scores` of 100 prompts of 5 to 15 tokens."""
    model, tokens = setting.model, setting.tokens
    n = setting.n_prompts(N_PROMPTS)
    generator = torch.Generator().manual_seed(setting.seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (n,), generator=generator).tolist()
    rows = [random_tokens(setting.shape, k, seed).tolist() for seed, k in enumerate(lengths)]

    def ours() -> Any:
        return bwlens.reversed_attention(model, tokens, TARGET)

    def bare() -> Any:
        streams: list[Any] = []
        embed = model.embed.register_forward_hook(lambda m, args, out: streams.append(out))
        loss = loss_of(model, tokens)
        embed.remove()
        return torch.autograd.grad(loss, streams)

    def at_once() -> Any:
        return bwlens.head_scores(model, rows, TARGET, batch_size=N_PROMPTS)

    def loop() -> Any:
        return [bwlens.head_scores(model, row, TARGET) for row in rows]

    what = f"{n} prompts' head scores at once / one by one, throughput"
    return [
        race("R of all heads / bare passes", timed(ours), timed(bare), setting.repeats, 1.3),
        race(what, timed(at_once), timed(loop), setting.repeats, 5.0, throughput=True),
        Note("heads: the bare passes are of the same bridge with eager attention"),
    ]
