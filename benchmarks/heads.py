"""R of every head beside the bare passes, and scores of many prompts beside a loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import bwlens
from benchmarks.batch import LONGEST, SHORTEST
from benchmarks.capture import loss_of
from benchmarks.measure import Note, Row, race, timed
from benchmarks.model import TARGET
from benchmarks.setting import Setting
from bwlens.model.attention import shown_scores

N_PROMPTS = 100


def heads(setting: Setting) -> list[Row | Note]:
    """`reversed_attention` of all heads, on the real model; `head_scores` of 100 short prompts."""
    model, n = setting.real, setting.n_prompts(N_PROMPTS)
    generator = torch.Generator().manual_seed(setting.seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (n,), generator=generator).tolist()

    def drawn(length: int) -> torch.Tensor:
        return torch.randint(TARGET + 1, model.cfg.d_vocab, (length,), generator=generator)

    tokens, rows = drawn(setting.shape.n_tokens), [drawn(k).tolist() for k in lengths]

    def bare() -> Any:
        streams: list[Any] = []
        embed = model.embed.register_forward_hook(lambda m, args, out: streams.append(out))
        with shown_scores(model):
            loss = loss_of(model, tokens)
        embed.remove()
        return torch.autograd.grad(loss, streams)

    def loop() -> Any:
        return [bwlens.head_scores(model, row, TARGET) for row in rows]

    ours = partial(bwlens.reversed_attention, model, tokens, TARGET)
    lens = partial(bwlens.backward_lens, model, tokens, TARGET)
    at_once = partial(bwlens.head_scores, model, rows, TARGET)
    few = max(1, setting.repeats // 2)
    many = f"{n} prompts' head scores at once / one by one, throughput"
    return [
        race("R of all heads / bare passes", timed(ours), timed(bare), setting.repeats, 1.3),
        race(
            "lens with attention / without", timed(partial(lens, attention=True)), timed(lens),
            setting.repeats, 1.1,
        ),
        race(many, timed(at_once), timed(loop), few, 5.0, throughput=True),
        Note(f"heads: {setting.real_name}; the bare passes are the same bridge's, eager attention"),
    ]  # fmt: skip
