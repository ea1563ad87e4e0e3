"""What is left of a model when one block hands on the product of one of its parts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.data.given import Edits
from bwlens.data.prose import read_prose
from bwlens.experiments.base import Experiment, Reading, Result
from bwlens.experiments.columns import frame
from bwlens.experiments.running import run
from bwlens.knowledge.branches import Branch, Parted, Streams, attention_branches, mlp_branches
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
"""What is handed on: s + y; y; y |s| / |y|; noise of that norm; s; s + the mean y of a text."""

PARTS: dict[str, Callable[..., list[Branch]]] = {
    "mlp": mlp_branches,
    "attention": attention_branches,
}

_LINES, _LONGEST = 16, 16
"""Of the text whose mean product is taken: its first lines, and their first tokens."""


@dataclass(frozen=True)
class ResidualRemoval(Experiment):
    """The residual connection round a block's feed-forward part or attention taken away; controls.

    With s the stream that passes by the part and y what the part adds to it, one of `CONDITIONS`
    is handed on in place of s + y, at every position; what follows runs on that: the blocks above,
    and after attention its own block's feed-forward part. Nothing depends on what else is in a
    batch: noise is drawn for each prompt, the mean is a given text's. Rows: `item`, `layer`,
    `condition`; `loss`, the mean NLL of the true answer's tokens (of the new answer where no true
    one is known); `top_1`, whether its first token is the likeliest; `kl`, from the model's own
    distribution after the prompt, in nats. The norm is what decides: a stream of another length
    weighs otherwise beside what is added later, and the last block's is normed away.

    Source: after "the residual connection makes every layer a store"; not in the paper.
    """

    seed: int = 0
    """Of the random vectors."""
    part: Literal["mlp", "attention"] = "mlp"
    """Round which part."""
    reference: str | tuple[str, ...] = "demo"
    """The text whose mean product is taken: lines, or a source as for perplexity."""

    name: ClassVar[str] = "residual_removal"
    title: ClassVar[str] = "A block without its residual"
    source: ClassVar[str] = "not in the paper"
    caption: ClassVar[str] = "What is left when one part hands on its product alone, and controls."
    in_paper: ClassVar[bool] = False
    published: ClassVar[str] = "Nothing: the claim was made without the controls."
    by: ClassVar[tuple[str, ...]] = ("layer", "condition")
    values: ClassVar[tuple[str, ...]] = ("loss", "top_1", "kl")

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part is {self.part!r}; expected one of {', '.join(PARTS)}")

    def wanted(self, model: Any) -> tuple[str, ...]:
        """No gradients, but the part.

        Raises:
            ValueError: No block has one, or the model's tokenizer reads nothing of `reference`.
        """
        if not self._branches(model, None):
            raise ValueError(f"{self.name}: no block of this model has the part {self.part!r}")
        try:
            self._text(model, None)
        except ValueError as error:
            raise ValueError(
                f"{self.name}: no mean product of reference={self.reference!r} ({error}); give"
                f" lines that this model's tokenizer reads"
            ) from error
        return super().wanted(model)

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch."""
        model, edits = reading.model, reading.edits
        batch = make_batch(
            model,
            [edit.text for edit in edits],
            [edit.target_true or edit.target_new for edit in edits],
            prepend_bos=reading.prepend_bos,
        )
        branches = self._branches(model, reading.layers)
        text = self._text(model, reading.prepend_bos)
        of_text = Streams(model, text.tokens, branches)
        streams = Streams(model, batch.tokens, branches)
        positions, answers = batch.answers()
        own = streams.passed.logits.float()
        own = own[torch.arange(len(batch), device=own.device)[:, None], positions.to(own.device)]
        columns = []
        for branch in branches:
            parted = streams.parted(branch)
            added = of_text.parted(branch).added
            mean = added[text.mask.to(added.device)].mean(0)
            given = self._given(parted, mean, batch, branch.layer)
            left = parted.handed_on(torch.cat(given).to(parted.stream))
            where = positions.repeat(len(given), 1)
            after = streams.after(branch.layer, left, positions=where).chunk(len(given))
            for condition, one in zip(CONDITIONS, (own, *after), strict=True):
                loss, top_1, kl = _judged(one, own, answers)
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

    def _branches(self, model: Any, layers: Sequence[int] | None) -> list[Branch]:
        """The part in those of the layers that have it."""
        there = PARTS[self.part](model)
        return [branch for branch in there if layers is None or branch.layer in layers]

    def _text(self, model: Any, prepend_bos: bool | None) -> Batch:
        """The text whose mean product is taken."""
        lines = read_prose(self.reference)[:_LINES]
        rows = [make_batch(model, line, prepend_bos=prepend_bos).tokens[0] for line in lines]
        return make_batch(model, [row[:_LONGEST].tolist() for row in rows])

    def _given(self, parted: Parted, mean: Tensor, batch: Batch, layer: int) -> list[Tensor]:
        """What is handed on under each condition but the first [batch, pos, d_model]."""
        stream, added = parted.stream, parted.added
        length = stream.float().norm(dim=-1, keepdim=True)
        noise = torch.zeros(stream.shape)
        for row, n in enumerate(batch.lengths.tolist()):
            ids = batch.tokens[row, :n].tolist()
            draw = torch.Generator().manual_seed(hash((self.seed, layer, *ids)) % 2**63)
            noise[row, :n] = torch.randn(n, stream.shape[-1], generator=draw)
        unit, noise = (
            v / v.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            for v in (added.float(), noise.to(stream.device))
        )
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
    model: LensModel,
    records: Edits,
    *,
    layers: Layers = None,
    seed: int = 0,
    part: Literal["mlp", "attention"] = "mlp",
    reference: str | tuple[str, ...] = "demo",
    **options: Any,
) -> Result:
    """What the product of one block's part says without the stream, beside controls.

    The settings are those of `ResidualRemoval`, the options `run`'s.

    Raises:
        ValueError: No such layer or part, or a model without it.
        NotImplementedError: A part whose product does not meet the stream as it is.

    Example:
        >>> result = residual_removal(model, read_records("demo")[:20])  # doctest: +SKIP
        >>> result.figure()  # doctest: +SKIP
    """
    task = ResidualRemoval.of(model, layers, seed=seed, part=part, reference=reference)
    return run(task, model, records, **options)


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
