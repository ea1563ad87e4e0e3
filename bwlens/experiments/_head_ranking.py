"""Does a ranking of heads find those that a task needs? Only the top of it is kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bwlens.attention.ablating import losses_without
from bwlens.attention.patching import without_heads
from bwlens.attention.scores import HeadScores, head_scores
from bwlens.experiments.judged import by_rank, check_names, check_split, lines, means
from bwlens.gradient.objectives import NLL
from bwlens.model.identity import fingerprint
from bwlens.model.passes import device_of, run
from bwlens.model.prompts import Batch, make_batch
from bwlens.runs.parts import Part, in_parts

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RANKINGS = (
    "reversed", "warm", "forward", "ablation", "mean ablation", "reversed order", "random", "index",
)  # fmt: skip
"""Orders of heads, the most needed first.

- `reversed`: ||R||_F, the mean over the prompts that rank; `reversed order` is from its end.
- `warm`: the same through a warmer softmax.
- `forward`: ||A||_F.
- `ablation`: how much the loss rises without the head, one at a time (one pass of each prompt for
  each head: the mean over the prompts that rank); `mean ablation`: with its mean in its place.
- `random`: by chance, an order of its own for each seed.
- `index`: from the first layer's first head on.
"""

Place = tuple[int, int]


@dataclass(frozen=True, eq=False)
class HeadRanking:
    """How a task goes with the top of each ranking of heads.

    Attributes:
        rows: `ranking`, `kept` (share of heads), `prompt`, `rank` of the target's first token
            (0: the answer), and `top1`, `top2`, `top3`.
        orders: Each ranking's heads, the first kept first.
        seconds: CPU seconds that each ranking took to make (on another device, seconds by the
            clock); orders of one score share its pass.
    """

    rows: pd.DataFrame
    orders: dict[str, list[Place]]
    seconds: dict[str, float]

    def summary(self, top: int = 1) -> pd.DataFrame:
        """Accuracy with its 95 % bootstrap interval over prompts, by ranking and share kept."""
        return means(self.rows, ["ranking", "kept"], f"top{top}")

    def area(self, top: int = 1) -> pd.DataFrame:
        """The mean accuracy over the shares kept, one figure each, with its interval."""
        found = means(self.rows, ["ranking"], f"top{top}").drop(columns="n")
        return found.assign(seconds=[self.seconds.get(name) for name in found["ranking"]])

    def plot(self, top: int = 1) -> Figure:
        """Accuracy over the share of heads kept, a line for each ranking."""
        figure, ax = lines(self.summary(top), RANKINGS, "ranking", "kept")
        ax.set_xlabel("share of heads kept")
        ax.set_ylabel(f"top-{top} accuracy")
        ax.set_ylim(-0.02, 1.02)
        return figure


def head_ranking(
    model: Any,
    prompts: Sequence[Any],
    targets: Sequence[Any],
    *,
    n_ranking: int,
    rankings: Sequence[str] = RANKINGS,
    kept: Sequence[float] = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
    temperature: float = 4.0,
    seeds: int = 3,
    batch_size: int = 64,
    prepend_bos: bool | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> HeadRanking:
    """Keep the top of each ranking of heads and see whether the task is still done.

    The first `n_ranking` prompts rank the heads, the others judge: none does both. A head that is
    not kept hands nothing to W_O. The cost of each ranking is measured with it.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        prompts: Texts or token ids.
        targets: Each prompt's target; its first token is judged.
        n_ranking: How many of the prompts rank.
        rankings: Names out of `RANKINGS`.
        kept: Shares of the heads that are kept, 0 to 1.
        temperature: Of the warm score.
        seeds: How many random orders.
        batch_size: Prompts, or prompts without a head, that pass at once.
        prepend_bos: As for `capture`.
        out: A folder to keep each ranking in, so that what was stopped is carried on.
        progress: Show a bar.

    Raises:
        ValueError: An unknown ranking, a share outside 0 to 1, too few prompts, a folder that
            holds a run of other settings.

    Source: Katz and Wolf, "Reversed Attention", NAACL 2025, section on heads.
    """
    import pandas as pd

    check_names("rankings", rankings, RANKINGS)
    if bad := [share for share in kept if not 0 <= share <= 1]:
        raise ValueError(f"kept is {bad[0]}; expected shares of the heads, 0 to 1")
    check_split(len(prompts), len(targets), n_ranking, "n_ranking", "ranks")
    batch = make_batch(model, list(prompts), list(targets), prepend_bos=prepend_bos)
    first = [ids[0] for ids in batch.targets]
    rows_of = [batch.tokens[i, : int(batch.prompt_lengths[i])].tolist() for i in range(len(batch))]
    rank, judge = range(n_ranking), range(n_ranking, len(batch))
    ranked = make_batch(model, [rows_of[i] for i in rank], [[first[i]] for i in rank])
    judged = make_batch(model, [rows_of[i] for i in judge], [[first[i]] for i in judge])
    named = [
        (ranking, name)
        for ranking in rankings
        for name in (
            [f"random {seed}" for seed in range(seeds)] if ranking == "random" else [ranking]
        )
    ]
    scores: dict[str, HeadScores] = {}
    clock = process_time if device_of(model).type == "cpu" else perf_counter

    def scored(ranking: str) -> HeadScores:
        """By the warm score's pass, or by one that all others share."""
        kind = "warm" if ranking == "warm" else "reversed"
        if kind not in scores:
            scores[kind] = head_scores(
                model, ranked.tokens, NLL([list(ids) for ids in ranked.targets]),
                temperature=temperature if kind == "warm" else None, batch_size=batch_size,
                attention_mask=ranked.mask,
            )  # fmt: skip
        return scores[kind]

    def measured(part: int) -> Part:
        ranking, name = named[part]
        start = clock()
        if ranking in ("ablation", "mean ablation"):
            instead = "mean" if ranking == "mean ablation" else "zero"
            losses = losses_without(model, ranked, instead=instead, batch_size=batch_size)
            order = sorted(losses, key=lambda place: -losses[place])
        else:
            order = _order(name, scored(ranking))
        seconds = 0.0 if ranking in ("random", "index") else clock() - start
        heads = pd.DataFrame(order, columns=["layer", "head"])
        heads = heads.assign(name=name, ranking=ranking, seconds=seconds)
        return Part({"rows": _judged(model, ranking, order, judged, kept), "heads": heads})

    settings = {
        **{"model": fingerprint(model), "prompts": rows_of, "targets": first},
        **{"n_ranking": n_ranking, "rankings": [name for _, name in named]},
        **{"kept": list(kept), "temperature": temperature},
    }
    tables = in_parts(measured, [1] * len(named), settings, out, progress=progress, label="Heads")
    heads: Any = tables["heads"].astype({"name": str, "ranking": str})
    orders = {
        name: list(zip(own["layer"].tolist(), own["head"].tolist(), strict=True))
        for name, own in heads.groupby("name", sort=False)
    }
    rows = tables["rows"].astype({"ranking": str})
    return HeadRanking(rows, orders, heads.groupby("ranking")["seconds"].first().to_dict())


def in_context(
    relations: Sequence[dict[str, Any]], *, n_prompts: int, shots: int = 3, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Prompts of some examples of a relation and then a subject alone, and what follows.

    Args:
        relations: As the LRE data has them: `prompt_templates`, and `samples` of `subject` and
            `object`.
        n_prompts: How many, in turns from each relation.
        shots: Examples before each.
        seed: Which.
    """
    rng = np.random.default_rng(seed)
    prompts, targets = [], []
    for at in range(n_prompts):
        relation = relations[at % len(relations)]
        template = relation["prompt_templates"][0]
        picked = rng.choice(len(relation["samples"]), shots + 1, replace=False)
        facts = [relation["samples"][i] for i in picked]
        lines = [f"{template.format(f['subject'])} {f['object']}." for f in facts[:-1]]
        prompts.append(" ".join([*lines, template.format(facts[-1]["subject"])]))
        targets.append(f" {facts[-1]['object']}")
    return prompts, targets


def induction(
    n_vocab: int, *, n_prompts: int, length: int = 8, seed: int = 0, lowest: int = 100
) -> tuple[list[list[int]], list[list[int]]]:
    """Random tokens, then the same again but for the last, which is the target."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(lowest, n_vocab, (n_prompts, length)).tolist()
    return [row + row[:-1] for row in rows], [[row[-1]] for row in rows]


def _order(name: str, scores: HeadScores) -> list[Place]:
    """Every head, the first to be kept first."""
    every = [(layer, head) for layer in scores.layers for head in scores.heads]
    if name.startswith("random"):
        chance = np.random.default_rng(int(name.split()[1])).permutation(len(every))
        return [every[i] for i in chance]
    if name == "index":
        return every
    if name == "reversed order":
        return scores.order("reversed")[::-1]
    kind: Any = name if name in ("warm", "forward") else "reversed"
    return scores.order(kind)


def _judged(
    model: Any, ranking: str, order: list[Place], judged: Batch, kept: Sequence[float]
) -> pd.DataFrame:
    """The target's rank for each prompt with the top of the order."""
    import pandas as pd

    rows: list[pd.DataFrame] = []
    targets = torch.tensor([ids[0] for ids in judged.targets], device=judged.tokens.device)
    for share in kept:
        with without_heads(model, order[round(share * len(order)) :]):
            logits = run(model, judged.tokens, positions=judged.last[:, None]).logits[:, 0]
        goal = logits.gather(1, targets[:, None].to(logits.device))
        ranks = (logits > goal).sum(1).tolist()
        rows.append(by_rank(ranks).assign(ranking=ranking, kept=share))
    return pd.concat(rows, ignore_index=True)
