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
AT_ONCE = 32
"""As many as `head_scores` takes at once."""


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

    def bare_passes(size: int) -> Any:
        """Forward and backward passes of every prompt, those alike in length at once."""
        ordered, streams = sorted(rows, key=len), []
        for at in range(0, n, size):
            some = [torch.tensor(row) for row in ordered[at : at + size]]
            padded = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
            streams.clear()
            embed = model.embed.register_forward_hook(lambda m, args, out: streams.append(out))
            with shown_scores(model):
                logits = model(padded, return_type="logits")
            embed.remove()
            last = logits[torch.arange(len(some)), torch.tensor([len(row) - 1 for row in some])]
            loss = torch.nn.functional.cross_entropy(last, torch.full((len(some),), TARGET))
            torch.autograd.grad(loss, streams)

    def loop() -> Any:
        return [bwlens.head_scores(model, row, TARGET) for row in rows]

    ours = partial(bwlens.reversed_attention, model, tokens, TARGET)
    lens = partial(bwlens.backward_lens, model, tokens, TARGET)
    at_once = partial(bwlens.head_scores, model, rows, TARGET)
    few = max(1, setting.repeats // 2)
    many = f"{n} prompts' head scores at once / one by one, throughput"
    gain = race(
        "bare passes at once / one by one", timed(partial(bare_passes, AT_ONCE)),
        timed(partial(bare_passes, 1)), few, 1.0, throughput=True,
    )  # fmt: skip
    return [
        race("R of all heads / bare passes", timed(ours), timed(bare), setting.repeats, 1.3),
        race(
            "lens with attention / without", timed(partial(lens, attention=True)), timed(lens),
            setting.repeats, 1.1,
        ),
        race(many, timed(at_once), timed(loop), few, 5.0, throughput=True),
        Note(f"heads: {setting.real_name}; the bare passes are the same bridge's, eager attention"),
        Note(f"heads: bare passes of the same prompts gain {gain.ratio:.1f} from running together"),
    ]  # fmt: skip
