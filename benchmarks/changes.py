"""A change and a data set in words: beside one lens, and beside one example after another."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import bwlens
from benchmarks.measure import Note, Row, peak_bytes, race, timed, weigh
from benchmarks.setting import Setting
from bwlens.changes.names import weights_there
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.gradient.objectives import SFT
from bwlens.reading.readouts import readout
from bwlens.reading.standardised import head_by

PROMPT, TARGET = "The Eiffel Tower is in the city of", " Rome"
SUBJECTS = ("Paris", "Rome", "a small town", "the old king", "my brother", "the sea", "a dog")
VERBS = ("is known for", "never lived in", "works near", "looks like", "was built by")
OBJECTS = ("the river", "a red house", "two friends", "the new school", "good bread", "music")


def read_some(model: Any, texts: list[str]) -> None:
    """Read a data set of one batch a part."""
    with tempfile.TemporaryDirectory() as folder:
        bwlens.read_dataset(model, texts, Path(folder), batch_size=8, part_size=16, progress=False)


def changes(setting: Setting) -> list[Row | Note]:
    """A rank-16 adapter on every matrix / one lens; a data set / a loop over its examples."""
    model, repeats = setting.real, min(setting.repeats, 3)
    generator = torch.Generator().manual_seed(0)
    adapter = bwlens.WeightChange(
        {
            site: LowRankMatrix(
                *(torch.randn(16, width, generator=generator) * 0.01 for width in weight.shape)
            )
            for site, weight in weights_there(model).items()
        }
    )
    texts = [f"{s} {v} {o}." for s in SUBJECTS for v in VERBS for o in OBJECTS]
    texts = texts[:: max(1, len(texts) // setting.n_prompts(48))]
    head = head_by(model, "dual", False)

    def whole() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return bwlens.read_dataset(model, texts, Path(folder), progress=False)

    def loop() -> None:
        for text in texts:
            grads = bwlens.capture(model, text, SFT(), "W_out")
            for gradient in grads.values():
                gradient.norm()
                sizes = gradient.x.norm(dim=1) * gradient.delta.norm(dim=1)
                at = int(sizes.argmax())
                readout(head, -gradient.delta[at : at + 1], 5, normalize=True)

    def lens() -> Any:
        return bwlens.backward_lens(model, PROMPT, TARGET)

    def change() -> Any:
        return bwlens.read_change(model, adapter)

    rows = [
        race(
            "rank-16 adapter on all matrices / one lens", timed(change), timed(lens), repeats, 10.0
        ),
        race("data set / a loop, examples a second", timed(whole), timed(loop), repeats, 3.0, True),
    ]
    sizes = (32, 256) if setting.quick else (64, 2000)
    few, many = (peak_bytes(lambda n=n: read_some(setting.demo, (texts * n)[:n])) for n in sizes)
    rows.append(weigh(f"memory, {sizes[1]:,} examples / {sizes[0]}", many, few, 1.1))
    said = f"changes: {setting.real_name}, {len(adapter)} matrices; {len(texts)} texts, W_out"
    return [*rows, Note(said)]
