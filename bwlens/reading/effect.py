"""What a descent step on one cell does to the prediction, measured.

A step on the weight gradient's cell (one row x_i of a matrix' input with its delta_i) changes what
leaves the matrix at that position by a multiple of -delta_i. So we add c * (-delta / ||delta||)
there and take the central difference of the logits that the loss reads: of several positions, at
the first from the cell's own on, which is the target's first token, for cells of the prompt, and
the very next word, where the loss reads every position. With c = nats / ||delta||
the loss falls by `nats` to first order, whatever the cell, so that cells, layers and matrices
compare: an effect is in nats of a word's logit for each nat by which the loss falls.

No reading is presumed: it holds for every matrix of any architecture. The change of the loss is
measured with it (`fall`, 1 where the gradient is right), and so is a second, larger step, which
must have the same effect (`agreement`, the correlation over the vocabulary).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from bwlens.gradient.capturing import Gradients
from bwlens.gradient.objectives import Objective
from bwlens.model.places import Point, Tap
from bwlens.model.replay import Replay
from bwlens.model.sites import Site, find_taps

NATS = 0.02
"""By how much the step is to lower the loss, to first order."""

_STEPS = (1.0, -1.0, 2.0, -2.0)
AGREES = 0.98
"""Least correlation of two step sizes' effects for a cell to count as measured."""
WRONG = 0.05
"""Share by which the loss may fall otherwise than predicted."""
_TRIES = (1.0, 0.2, 5.0, 0.04, 25.0)
"""Where a step is too large to be linear or drowns in rounding, others are tried in this order."""


@dataclass(frozen=True, eq=False)
class Effects:
    """What steps on the cells of one matrix do to the words that follow.

    Attributes:
        scores: Change of each word's log-probability at the position read, in nats for each nat by
            which the loss falls [cell, d_vocab].
        fall: By how much the loss fell, over what was predicted [cell]; 1 where the gradient is
            right and the step small.
        agreement: Correlation of the effects of two step sizes over the vocabulary [cell].
        nats: The predicted fall of the smaller step [cell].
    """

    scores: Float[Tensor, "cell d_vocab"]
    fall: Float[Tensor, " cell"]
    agreement: Float[Tensor, " cell"]
    nats: Float[Tensor, " cell"]

    @property
    def measured(self) -> Tensor:
        """Cells whose two step sizes agree, and whose loss falls as predicted [cell]."""
        return (self.agreement >= AGREES) & ((self.fall - 1).abs() <= WRONG)


def tempered(
    scores: Float[Tensor, "*lead d_vocab"],
    probabilities: Float[Tensor, "*#lead d_vocab"],
    temper: float,
) -> Float[Tensor, "*lead d_vocab"]:
    """`p^temper * d log p`: the change of `p^temper / temper`, a power of each word's probability.

    0 compares changes of log-probabilities, where words that nobody would say lead; 1 compares
    changes of probabilities, where only the few likeliest words count.

    >>> tempered(torch.tensor([[1.0, 2.0]]), torch.tensor([0.25, 0.01]), 0.5)
    tensor([[0.5000, 0.2000]])
    """
    return scores if temper == 0 else scores * probabilities.pow(temper)


class EffectOf:
    """Measures cells of one prompt's gradients.

    Args:
        model: The model.
        grads: The captured gradients of one prompt, of the matrices to be read.
        objective: The loss they are gradients of.
        every: The prompt's pass, all positions, if it was run already.
        max_memory: Bytes that a batch of replays may take, by a rough estimate.

    Raises:
        ValueError: Several prompts, or a loss that reads no logits.
    """

    def __init__(
        self,
        model: Any,
        grads: Gradients,
        objective: Objective,
        every: Replay | None = None,
        max_memory: int = 2**29,
    ) -> None:
        if len(grads.batch) != 1:
            raise ValueError(f"effects are read of one prompt, found {len(grads.batch)}")
        self._model, self._grads, self._objective = model, grads, objective
        self._tokens = grads.batch.tokens[0]
        if every is None:
            every = Replay(model, self._tokens, range(len(self._tokens)))
        self._whole = every.logits.detach().clone()[None].requires_grad_()
        loss = objective(self._whole, grads.batch).sum()
        slope: Any = torch.autograd.grad(loss, self._whole, allow_unused=True)[0]
        self._whole = self._whole.detach()
        reads = [] if slope is None else slope[0].abs().amax(-1).nonzero().flatten().tolist()
        if not reads:
            raise ValueError(
                "the loss reads no logits of this prompt, so a step has no effect on words that"
                " could be read; use reading='plain'"
            )
        self._reads = reads
        self._replay = every.reading(reads)
        self._log_p = self._replay.logits.log_softmax(-1)
        self._max_memory = max_memory
        self._taps: dict[str, dict[Site, Tap]] = {}

    @property
    def probabilities(self) -> Float[Tensor, " d_vocab"]:
        """The model's own before any step, at the first position that the loss reads."""
        return self.probabilities_at(0)

    def probabilities_at(self, pos: int) -> Float[Tensor, " d_vocab"]:
        """The model's own before any step, where a cell at this position has its effect."""
        return self._log_p[self._heard(pos)].exp()

    def _heard(self, pos: int) -> int:
        """Which of the positions read has a cell's effect: the first that it can reach."""
        later = [at for at, read in enumerate(self._reads) if read >= pos]
        return later[0] if later else len(self._reads) - 1

    @property
    def device(self) -> torch.device:
        """Where effects are."""
        return self._log_p.device

    def of(
        self,
        cells: Sequence[tuple[Site, int]],
        nats: float = NATS,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Effects:
        """The effects of some cells, each a site and a position.

        Cells without a gradient have nan everywhere.
        """
        n, width = len(cells), self._log_p.shape[-1]
        scores = self._log_p.new_full((n, width), float("nan"))
        fall, agreement = (self._log_p.new_full((n,), float("nan")) for _ in range(2))
        sizes = self._log_p.new_full((n,), nats)
        unsettled = [i for i, (site, pos) in enumerate(cells) if self._row(site, pos).any()]
        advance(n - len(unsettled))
        for factor in _TRIES:
            left = []
            for batch in self._batches(cells, unsettled):
                tried = torch.full_like(sizes[batch], nats * factor)
                effect, fell, agrees = self._measure([cells[i] for i in batch], tried)
                error = (fell - 1).abs().nan_to_num(float("inf"))
                better = error < (fall[batch] - 1).abs().nan_to_num(float("inf"))
                for i, row in zip(batch, range(len(batch)), strict=True):
                    if better[row]:
                        scores[i], fall[i], agreement[i] = effect[row], fell[row], agrees[row]
                        sizes[i] = nats * factor
                        if error[row] > WRONG or agrees[row] < AGREES:
                            left.append(i)
                    elif not (fall[i] - 1).abs() <= WRONG or agreement[i] < AGREES:
                        left.append(i)
            advance(len(unsettled) - len(left))
            unsettled = left
        advance(len(unsettled))
        return Effects(scores, fall, agreement, sizes)

    def along(
        self,
        cells: Sequence[tuple[Site, int]],
        deltas: Sequence[Tensor],
        nats: float = NATS / 10,
    ) -> tuple[Float[Tensor, "cell d_vocab"], Float[Tensor, " cell"]]:
        """Effects of steps along -delta with any vectors for delta, and each step's `fall`.

        A quarter of `of`'s passes: one small step, against none. nan where a vector is zero.
        """
        scores = self._log_p.new_full((len(cells), self._log_p.shape[-1]), float("nan"))
        fall = scores.new_full((len(cells),), float("nan"))
        there = [i for i, delta in enumerate(deltas) if delta.any()]
        for batch in self._batches(cells, there, 1):
            sizes = scores.new_full((len(batch),), nats)
            rows, here = [deltas[i] for i in batch], [cells[i] for i in batch]
            logits, before = self._stepped(here, rows, sizes, (1.0,))
            after, heard = self._log_probs(here, logits)
            scores[batch] = (after[:, 0] - before.log_softmax(-1)[heard]) / nats
            loss = self._losses(before[None, None]).double() - self._losses(logits).double()
            fall[batch] = (loss[:, 0] / nats).to(fall)
        return scores, fall

    def _batches(
        self, cells: Sequence[tuple[Site, int]], chosen: Sequence[int], steps: int = len(_STEPS)
    ) -> list[list[int]]:
        """Cells of like layers together or of one position: a replay starts at the lowest of both.

        Whichever order has fewer layers of fewer tokens to run.
        """
        n_layers, n_pos = len(self._model.blocks), len(self._tokens)

        def start(cell: int) -> tuple[int, int]:
            site, pos = cells[cell]
            return site.layer, self._since(pos)

        def cost(batch: Sequence[int]) -> int:
            layer, pos = (min(lowest) for lowest in zip(*map(start, batch), strict=True))
            return len(batch) * (n_layers - layer) * (n_pos - pos)

        order = sorted(chosen, key=lambda i: (start(i), cells[i][0].matrix))
        positions = sorted({start(i)[1] for i in chosen})
        plans: list[list[list[int]]] = []
        for groups in ([order], [[i for i in order if start(i)[1] == pos] for pos in positions]):
            plan: list[list[int]] = []
            for group in groups:
                n_run = n_pos - min((start(i)[1] for i in group), default=0)
                size = min(_AT_ONCE, max(1, self._max_memory // (steps * self._row_bytes(n_run))))
                plan += [group[at : at + size] for at in range(0, len(group), size)]
            plans.append(plan)
        return min(plans, key=lambda plan: sum(map(cost, plan)))

    def _since(self, pos: int) -> int:
        """From which position on a replay of a cell must run."""
        return pos if self._replay.takes_earlier else 0

    def _row_bytes(self, n_run: int) -> int:
        """What one prompt of a replay takes, roughly, that runs its last so many positions."""
        cfg, n_pos = self._model.cfg, len(self._tokens)
        wide = 12 * cfg.d_model + 3 * (getattr(cfg, "d_mlp", None) or 4 * cfg.d_model)
        pattern = getattr(cfg, "n_heads", 1) * n_pos
        earlier, logits = 2 * cfg.d_model * n_pos, 3 * len(self._reads) * cfg.d_vocab
        return 4 * (n_run * (wide + pattern) + earlier + logits)

    def _row(self, site: Site, pos: int) -> Float[Tensor, " d_out"]:
        return self._grads[site].delta[pos]

    def _measure(
        self, cells: Sequence[tuple[Site, int]], nats: Float[Tensor, " cell"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = [self._row(site, pos) for site, pos in cells]
        logits, _ = self._stepped(cells, rows, nats, _STEPS)
        losses = self._losses(logits).double()
        log_p, _ = self._log_probs(cells, logits)
        small = (log_p[:, 0] - log_p[:, 1]) / (2 * nats[:, None])
        large = (log_p[:, 2] - log_p[:, 3]) / (4 * nats[:, None])
        fall = (losses[:, 1] - losses[:, 0]) / (2 * nats.double())
        # The error of a central difference is quadratic in the step: taken out by the two sizes.
        return (4 * small - large) / 3, fall.to(nats), correlation(small, large)

    def _log_probs(
        self,
        cells: Sequence[tuple[Site, int]],
        logits: Float[Tensor, "cell step position d_vocab"],
    ) -> tuple[Float[Tensor, "cell step d_vocab"], list[int]]:
        """Each cell's where it has its effect, and which position that is."""
        heard = [self._heard(pos) for _, pos in cells]
        return logits[range(len(cells)), :, heard].log_softmax(-1), heard

    def _stepped(
        self,
        cells: Sequence[tuple[Site, int]],
        deltas: Sequence[Tensor],
        nats: Float[Tensor, " cell"],
        sizes: Sequence[float],
    ) -> tuple[Float[Tensor, "cell step position d_vocab"], Float[Tensor, "position d_vocab"]]:
        """The logits after each of the steps on each cell, and without any."""
        steps = torch.tensor(sizes, device=nats.device, dtype=nats.dtype)
        n_rows, n_pos = len(cells) * len(sizes), len(self._tokens)
        additions: dict[tuple[Point, ...], Tensor] = {}
        for i, ((site, pos), delta) in enumerate(zip(cells, deltas, strict=True)):
            tap = self._tap(site)
            delta = delta.to(nats)
            down = -delta / delta.norm().square()
            width = len(delta) * (2 if tap.gated_heads else 1)
            rows = additions.get(tap.z)
            if rows is None:
                rows = additions.setdefault(tap.z, nats.new_zeros(n_rows, n_pos, width))
            here = slice(i * len(sizes), (i + 1) * len(sizes))
            columns = tap.columns(width)
            rows[here, pos, columns] = (steps * nats[i])[:, None] * down
        lowest = min(site.layer for site, _ in cells)
        logits, before = self._replay(additions, lowest, min(pos for _, pos in cells))
        return rearrange(logits, "(cell step) ... -> cell step ...", step=len(sizes)), before

    def _losses(self, logits: Float[Tensor, "cell step position d_vocab"]) -> Tensor:
        """The loss of each row; only what it reads differs from the logits before."""
        whole, before = self._whole, self._whole[0, self._reads].clone()
        losses = []
        for row in rearrange(logits, "cell step ... -> (cell step) ..."):
            whole[0, self._reads] = row.to(whole)
            losses.append(self._objective(whole, self._grads.batch)[0])
        whole[0, self._reads] = before
        return rearrange(torch.stack(losses), "(cell step) -> cell step", step=logits.shape[1])

    def _tap(self, site: Site) -> Tap:
        if site.matrix not in self._taps:
            layers = sorted({each.layer for each in self._grads if each.matrix == site.matrix})
            self._taps[site.matrix] = {
                tap.site: tap
                for tap in find_taps(self._model, [site.matrix], layers)
                if isinstance(tap, Tap) and tap.routing is None
            }
        if site in self._taps[site.matrix]:
            return self._taps[site.matrix][site]
        raise NotImplementedError(
            f"the effect of a step on {site} is not read: an expert has a matrix of its own for"
            f" some tokens; ask for W_O, or for layers that are no mixture"
        )


_AT_ONCE = 16


def correlation(one: Float[Tensor, "n v"], other: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """Pearson's, row by row; 0 where a row is constant."""
    one, other = (rows - rows.mean(-1, keepdim=True) for rows in (one, other))
    lengths = one.norm(dim=-1) * other.norm(dim=-1)
    return torch.linalg.vecdot(one, other) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
