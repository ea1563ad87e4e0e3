"""What is left of a model when one block hands on its feed-forward product alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.data.given import Edits
from bwlens.experiments.base import Experiment, Reading, Result, frame, run
from bwlens.knowledge.branches import Branch, Streams, mlp_branches
from bwlens.model.prompts import Batch, make_batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

CONDITIONS = (
    "as it is", "product alone", "product, stream's norm", "random, stream's norm",
    "stream alone", "mean product",
)  # fmt: skip
"""What the block hands on: s + y; y; y |s| / |y|; noise of that norm; s; s + the batch's mean y."""


@dataclass(frozen=True)
class ResidualRemoval(Experiment):
    """The residual connection round one block's feed-forward part taken away, and five controls.

    With s the stream that passes by the part and y what the part adds to it, the block hands on one
    of `CONDITIONS`, at every position; the blocks above run on that. Rows: `item`, `layer`,
    `condition`; `loss`, the mean NLL of the true answer's tokens (of the new answer where no true
    one is known); `top_1`, whether its first token is the likeliest; `kl`, from the model's own
    distribution after the prompt, in nats. The norm is what decides: a stream of another length
    weighs otherwise beside what later blocks add, and the last block's is normed away.

    Source: after "the residual connection makes every layer a store"; not in the paper.
    """

    seed: int = 0
    """Of the random vectors."""

    name: ClassVar[str] = "residual_removal"
    title: ClassVar[str] = "A block without its residual"
    source: ClassVar[str] = "not in the paper"
    caption: ClassVar[str] = "What is left when one block hands on its product alone, and controls."
    in_paper: ClassVar[bool] = False
    published: ClassVar[str] = "Nothing: the claim was made without the controls."
    by: ClassVar[tuple[str, ...]] = ("layer", "condition")
    values: ClassVar[tuple[str, ...]] = ("loss", "top_1", "kl")

    def wanted(self, model: Any) -> tuple[str, ...]:
        """No gradients, but a feed-forward part.

        Raises:
            ValueError: No block has one.
        """
        if not self._with_a_part(model, None):
            raise ValueError(f"{self.name}: no block of this model has a feed-forward part")
        return super().wanted(model)

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch."""
        edits = reading.edits
        batch = make_batch(
            reading.model,
            [edit.text for edit in edits],
            [edit.target_true or edit.target_new for edit in edits],
            prepend_bos=reading.prepend_bos,
        )
        layers = None if reading.layers is None else list(reading.layers)
        branches = mlp_branches(reading.model, self._with_a_part(reading.model, layers))
        streams = Streams(reading.model, batch.tokens, branches)
        own = streams.passed.logits.float()
        columns = []
        for branch in branches:
            out = streams.out(branch.layer)
            given = self._given(streams, branch, batch)
            for condition, stream in zip(CONDITIONS, (None, *given), strict=True):
                one = own if stream is None else streams.after(branch.layer, stream.to(out))
                loss, top_1, kl = _judged(one, own, batch)
                columns.append(
                    {
                        "item": np.arange(len(edits)),
                        "layer": branch.layer,
                        "condition": condition,
                        "loss": loss,
                        "top_1": top_1,
                        "kl": kl,
                    }
                )
        return frame(columns)

    @staticmethod
    def _with_a_part(model: Any, layers: list[int] | None) -> list[int]:
        """Those of the layers that have a feed-forward part."""
        there = {branch.layer for branch in mlp_branches(model)}
        return sorted(there if layers is None else there & set(layers))

    def _given(self, streams: Streams, branch: Branch, batch: Batch) -> list[Tensor]:
        """What the block hands on under each condition but the first [batch, pos, d_model]."""
        out = streams.out(branch.layer)
        nothing = torch.zeros_like(streams.product(branch)).reshape(*out.shape[:2], -1)
        stream = streams.replaced(branch, nothing)
        added = out - stream
        length = stream.float().norm(dim=-1, keepdim=True)
        draw = torch.Generator().manual_seed(self.seed + branch.layer)
        noise = torch.randn(out.shape, generator=draw).to(out.device)
        unit, noise = (
            v / v.norm(dim=-1, keepdim=True).clamp_min(1e-30) for v in (added.float(), noise)
        )
        mean = added[batch.mask].mean(0)
        return [added, unit * length, noise * length, stream, stream + mean]

    def draw(self, summary: pd.DataFrame) -> Figure:
        """A panel each for loss, top-1 and KL; a line for each condition."""
        from bwlens.show.drawing import panels

        names = {"loss": "loss (nats)", "top_1": "says the answer", "kl": "KL from its own (nats)"}
        titles = [names[quantity] for quantity in self.values]
        rows = [summary[summary["quantity"] == quantity] for quantity in self.values]
        return panels(summary, titles, rows, "condition", CONDITIONS, "mean", size=(2.6, 2.2))[0]


def _judged(
    logits: Float[Tensor, "batch pos d_vocab"],
    own: Float[Tensor, "batch pos d_vocab"],
    batch: Batch,
) -> tuple[Any, Any, Any]:
    """Loss of each answer, whether its first token is the likeliest, KL from the model's own."""
    log_p = logits.log_softmax(-1)
    losses, top_1, kl = [], [], []
    for row, answer in enumerate(batch.targets):
        last = int(batch.last[row])
        positions = list(range(last, last + len(answer)))
        losses.append(-float(log_p[row, positions, list(answer)].mean()))
        top_1.append(float(log_p[row, last].argmax() == answer[0]))
        before = own[row, last].log_softmax(-1)
        kl.append(float((before.exp() * (before - log_p[row, last])).sum()))
    return np.array(losses), np.array(top_1), np.array(kl)


def residual_removal(
    model: LensModel, records: Edits, *, layers: Layers = None, seed: int = 0, **options: Any
) -> Result:
    """What one block's feed-forward product says without the stream, beside controls.

    The settings are those of `ResidualRemoval`, the options `run`'s.

    Raises:
        ValueError: No such layer, or a model without feed-forward parts.

    Example:
        >>> result = residual_removal(model, read_records("demo")[:20])  # doctest: +SKIP
        >>> result.figure()  # doctest: +SKIP
    """
    return run(ResidualRemoval.of(model, layers, seed=seed), model, records, **options)


def prose_edits(lines: Sequence[str], least: int = 8) -> list[Any]:
    """Prose as questions: each line cut before a word amid it, which is the answer.

    Lines of fewer than `least` words are left out.
    """
    from bwlens.model.prompts import Edit

    out = []
    for line in lines:
        words = line.replace("{", "(").replace("}", ")").split()
        if len(words) >= least:
            cut = least - 1 + (len(words) - least) // 2
            rest = " ".join(words[1:cut])
            out.append(Edit("{} " + rest, words[0], f" {words[cut]}"))
    return out
