"""Does what a loss asks of heads, put into their patterns, help with prompts it never saw?"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bwlens.attention.maps import ReversedAttention, reversed_attention
from bwlens.attention.patching import attention_patching, of_other_heads
from bwlens.experiments.judged import by_rank, check_names, check_split, lines, means
from bwlens.gradient.objectives import NLL
from bwlens.model.identity import fingerprint
from bwlens.model.passes import run, wide
from bwlens.model.prompts import make_batch
from bwlens.runs.parts import Part, in_parts

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KINDS = ("reversed", "forward", "other heads")
"""What is added: the mean of R; its controls, the mean of A, and R of other heads by chance."""


@dataclass(frozen=True, eq=False)
class PatchingAlphas:
    """How a task goes with alpha * a mean map added to every head's pattern.

    Attributes:
        rows: `kind`, `alpha`, `prompt`, `loss` and `rank` of the target's first token (0: the
            answer), and `top1`, `top2`, `top3`.
    """

    rows: pd.DataFrame

    def summary(self, value: str = "top1") -> pd.DataFrame:
        """The mean of a column with its 95 % bootstrap interval over prompts, by kind and alpha."""
        return means(self.rows, ["kind", "alpha"], value)

    def plot(self, value: str = "top1") -> Figure:
        """A line for each kind over alpha, on a scale that is logarithmic beyond 1."""
        figure, ax = lines(self.summary(value), KINDS, "kind", "alpha")
        ax.set_xscale("symlog", linthresh=1.0)
        ax.axvline(0.0, color="grey", lw=0.5)
        ax.set_xlabel("alpha (below 0: down the loss)")
        ax.set_ylabel(f"top-{value[3:]} accuracy" if value.startswith("top") else value)
        return figure


def patching_alphas(
    model: Any,
    prompts: Sequence[Any],
    targets: Sequence[Any],
    *,
    n_training: int,
    alphas: Sequence[float] = (3.0, 0.0, -1.0, -3.0, -10.0, -30.0, -60.0, -120.0),
    kinds: Sequence[str] = KINDS,
    batch_size: int = 64,
    seed: int = 0,
    prepend_bos: bool | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PatchingAlphas:
    """Add alpha times the mean R of training prompts to every head, and judge on the others.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        prompts: Texts or token ids, all of one length in tokens (`commonest_length`).
        targets: Each prompt's target; its first token is trained on and judged.
        n_training: How many of the prompts train; the others judge.
        alphas: What the mean map is multiplied by; 0 is the model as it is.
        kinds: Names out of `KINDS`.
        batch_size: Prompts that are judged at once.
        seed: Which head gets which other head's map.
        prepend_bos: As for `capture`.
        out: A folder to keep each part in, so that what was stopped is carried on.
        progress: Show a bar.

    Raises:
        ValueError: Prompts of several lengths, an unknown kind, too few prompts, a folder that
            holds a run of other settings.

    Source: Katz and Wolf, "Reversed Attention", NAACL 2025, section on attention patching.
    """
    check_names("kinds", kinds, KINDS)
    check_split(len(prompts), len(targets), n_training, "n_training", "trains")
    batch = make_batch(model, list(prompts), list(targets), prepend_bos=prepend_bos)
    lengths = batch.prompt_lengths.tolist()
    if len({*lengths}) > 1:
        raise ValueError(
            f"the prompts have {min(lengths)} to {max(lengths)} tokens; a mean map needs one"
            f" length: take those of the commonest (commonest_length)"
        )
    rows, first = batch.tokens[:, : lengths[0]], torch.tensor([ids[0] for ids in batch.targets])
    work = [(kind, float(alpha)) for kind in kinds for alpha in alphas]
    made: dict[str, ReversedAttention] = {}

    def maps_of(kind: str) -> ReversedAttention:
        if "reversed" not in made:
            goal = NLL([[int(i)] for i in first[:n_training]])
            made["reversed"] = reversed_attention(model, rows[:n_training], goal)
        if kind == "other heads" and kind not in made:
            made[kind] = of_other_heads(made["reversed"], seed)
        return made[kind if kind == "other heads" else "reversed"]

    def measured(part: int) -> Part:
        kind, alpha = work[part]
        scores: list[torch.Tensor] = []
        which: Any = "forward" if kind == "forward" else "reversed"
        with attention_patching(model, maps_of(kind), alpha, kind=which):
            for some in rows[n_training:].split(batch_size):
                last = torch.tensor([some.shape[1] - 1])
                scores.append(run(model, some, positions=last).logits[:, 0].cpu())
        log_probs = wide(torch.cat(scores)).log_softmax(-1)
        goal = log_probs.gather(1, first[n_training:, None])
        table = by_rank((log_probs > goal).sum(1).tolist()).assign(loss=-goal[:, 0].numpy())
        return Part({"rows": table.assign(kind=kind, alpha=alpha)})

    settings = {
        **{"model": fingerprint(model), "prompts": rows.tolist(), "targets": first.tolist()},
        **{"n_training": n_training, "work": [list(pair) for pair in work], "seed": seed},
    }
    tables = in_parts(measured, [1] * len(work), settings, out, progress=progress, label="Alphas")
    return PatchingAlphas(tables["rows"].astype({"kind": str}))


def commonest_length(
    model: Any, prompts: Sequence[str], targets: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The prompts, each once, of that length in tokens which most have, with their targets."""
    once = dict(zip(prompts, targets, strict=True))
    batch = make_batch(model, [*once], [*once.values()])
    lengths = batch.prompt_lengths.tolist()
    length = Counter(lengths).most_common(1)[0][0]
    kept = [pair for pair, n in zip(once.items(), lengths, strict=True) if n == length]
    return [prompt for prompt, _ in kept], [target for _, target in kept]
