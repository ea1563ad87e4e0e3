"""The passes that MEND's training takes: from the first edited block on, each prompt its own edit.

A training run meets each prompt many times, and no edit reaches the blocks below. What leaves those
for each prompt is computed once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bwlens.edit.editor import Factors
from bwlens.model.flows import as_rows
from bwlens.model.losses import forward
from bwlens.model.passes import Addition, prompts_at_once, run, wide
from bwlens.model.prompts import Batch, make_batch, padded
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Tap
from bwlens.runs.parts import progress_bar
from bwlens.runs.tensors import read_tensors, write_tensors

_IN_FILE = 1024


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, and what is asked after it.

    Attributes:
        ids: The prompt, and all but the last token of the target (teacher forcing).
        last: Where the prompt ends.
        target: The target's tokens; none where only the next word's distribution counts.
        kept: The ids under which what leaves the blocks below is kept; they begin with `ids`.
    """

    ids: tuple[int, ...]
    last: int
    target: tuple[int, ...]
    kept: tuple[int, ...]

    def cut(self, n: int) -> Prompt:
        """The first `n` tokens as a prompt."""
        return replace(self, ids=self.ids[:n], last=n - 1)


def prompts_of(
    model: LensModel, texts: Sequence[str], target: str | None, prepend_bos: bool | None
) -> list[Prompt]:
    """Texts as prompts, with one target for all or none.

    Raises:
        ValueError: A text or the target cannot be tokenised, or is too long.
    """
    if not texts:
        return []
    batch = make_batch(model, list(texts), target, prepend_bos=prepend_bos)
    targets = batch.targets or ((),) * len(texts)
    rows = zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
    ids = [tuple(row[:length]) for row, length in rows]
    return [
        Prompt(own, last, tuple(wanted), own)
        for own, last, wanted in zip(ids, batch.last.tolist(), targets, strict=True)
    ]


def beginnings(
    model: LensModel, texts: Sequence[str], most: int, prepend_bos: bool | None
) -> list[Prompt]:
    """The first tokens of each text, at most so many, as a prompt without a target."""
    prompts = prompts_of(model, [text[: 12 * most] for text in texts], None, prepend_bos)
    ids = [prompt.ids[:most] for prompt in prompts]
    return [Prompt(own, len(own) - 1, (), own) for own in ids]


class Passes:
    """Passes of one model from the first edited block on.

    Args:
        model: A TransformerBridge or HookedTransformer.
        taps: The weights to be edited.
    """

    def __init__(self, model: LensModel, taps: Sequence[Tap]) -> None:
        self._model, self._taps = model, list(taps)
        self._blocks = list(model.blocks[: min(tap.site.layer for tap in taps)])
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._left: Any = None

    def keep(self, prompts: Sequence[Prompt], folder: Path | None, progress: bool) -> None:
        """Compute what leaves the blocks below, or read it from the folder; once for each prompt.

        Where a model's upper blocks take more from below than that, nothing is kept, and passes
        run through all blocks.
        """
        listed = sorted({prompt.kept for prompt in prompts}, key=lambda ids: (len(ids), ids))
        if not self._blocks or not self._suffices(listed[-1]):
            return
        with progress_bar("Blocks below the edits", len(listed), shown=progress) as advance:
            for start in range(0, len(listed), _IN_FILE):
                chunk = listed[start : start + _IN_FILE]
                path = folder and folder / f"below-{start:07d}.safetensors"
                if path and path.exists():
                    rows = read_tensors(path, "MendBelow", "Mend.fit")[0]["rows"]
                    streams = rows.split([len(ids) for ids in chunk])
                    advance(len(chunk))
                else:
                    streams = []
                    at_once = prompts_at_once(self._model)
                    for at in range(0, len(chunk), at_once):
                        several = chunk[at : at + at_once]
                        left = self._below(several)
                        streams += [
                            row[: len(ids)].clone() for ids, row in zip(several, left, strict=True)
                        ]
                        advance(len(several))
                    if path:
                        write_tensors(path, {"rows": torch.cat(streams)}, "MendBelow")
                self._kept |= dict(zip(chunk, streams, strict=True))

    def _below(self, rows: Sequence[tuple[int, ...]]) -> Float[Tensor, "row pos d"]:
        tokens, last = padded(self._model, rows).tokens, self._blocks[-1]
        passed = run(self._model, tokens, positions=torch.tensor([0]), keeping=[last])
        self._left = passed.left[last]
        return _stream(self._left).cpu()

    def _suffices(self, ids: tuple[int, ...]) -> bool:
        """Whether a pass from there on gives the logits of a whole one."""
        whole = run(self._model, padded(self._model, [ids]).tokens).logits
        stream = self._below([ids])
        beside = self._left[1:] if isinstance(self._left, tuple) else ()
        if any(isinstance(part, Tensor) for part in beside):
            return False
        giving = self._giving(stream)
        again = run(self._model, padded(self._model, [ids]).tokens, giving=giving).logits
        return torch.allclose(wide(whole), wide(again), rtol=1e-3, atol=1e-3)

    def _giving(self, stream: Float[Tensor, "row pos d"]) -> dict[Any, Any]:
        """The blocks below do not run, and give this; autograd may begin there."""
        like = _stream(self._left)
        given = stream.to(like).requires_grad_()
        left = (given, *self._left[1:]) if isinstance(self._left, tuple) else given
        return dict.fromkeys(self._blocks, left)

    def _options(self, prompts: Sequence[Prompt]) -> tuple[Batch, dict[str, Any]]:
        """The prompts as a batch, with what `run` takes for it."""
        batch = padded(self._model, [prompt.ids for prompt in prompts])
        options: dict[str, Any] = {"positions": _positions(prompts)}
        if self._kept:
            streams = [self._kept[prompt.kept][: len(prompt.ids)] for prompt in prompts]
            stream = torch.nn.utils.rnn.pad_sequence(streams, batch_first=True)
            options["giving"] = self._giving(stream)
        return batch, options

    def gradients(self, edits: Sequence[Prompt]) -> Factors:
        """x and delta of each edit's own loss, its target's mean NLL: [edit, pos, d]; constants."""
        batch, options = self._options(edits)
        done = forward(self._model, batch, lambda z, _: nll(z, edits), self._taps, **options)
        flows = done.passed.flows
        deltas = done.gradients([flow.z for flow in flows], [flow.name for flow in flows])
        shape = batch.tokens.shape
        rows = [
            [wide(as_rows(side.detach())).unflatten(0, shape) for side in (flow.x, delta)]
            for flow, delta in zip(flows, deltas, strict=True)
        ]
        return {tap.site: (x, delta) for tap, (x, delta) in zip(self._taps, rows, strict=True)}

    def logits(
        self,
        prompts: Sequence[Prompt],
        edits: Factors | None = None,
        owners: Sequence[int] = (),
    ) -> Float[Tensor, "row token d_vocab"]:
        """The logits after each prompt and each of its target's tokens but the last.

        Args:
            prompts: The prompts, a row each.
            edits: x~ and delta~ [edit, pos, d] of each weight: W + x~^T delta~. Autograd follows to
                them; the edited weight itself is never formed.
            owners: Whose edit each row is under.
        """
        batch, options = self._options(prompts)
        shape, owner = batch.tokens.shape, torch.tensor(list(owners))

        def addition(tap: Tap) -> Addition:
            assert edits is not None
            x, delta = (side[owner.to(side.device)] for side in edits[tap.site])

            def added(entering: Tensor) -> Tensor:
                rows = wide(as_rows(entering)).unflatten(0, shape)
                return rows @ x.mT @ delta

            return Addition(tap.z, added, tap.x, str(tap.site))

        additions = [addition(tap) for tap in self._taps] if edits is not None else []
        graph = edits is not None and torch.is_grad_enabled()
        passed = run(self._model, batch.tokens, additions=additions, graph=graph, **options)
        return wide(passed.logits)


def nll(
    logits: Float[Tensor, "row token d_vocab"], prompts: Sequence[Prompt]
) -> Float[Tensor, " row"]:
    """The mean over each target's tokens of their negative log-probabilities, in nats."""
    n = logits.shape[1]
    ids = torch.tensor([_filled(prompt.target, n) for prompt in prompts], device=logits.device)
    lengths = torch.tensor([len(prompt.target) for prompt in prompts], device=logits.device)
    there = torch.arange(n, device=logits.device) < lengths[:, None]
    losses = torch.nn.functional.cross_entropy(logits.mT, ids, reduction="none")
    return (losses * there).sum(-1) / lengths


def divergence(
    *, before: Float[Tensor, "row d_vocab"], after: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    """KL(before || after) of next words, from their logits, in nats."""
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _positions(prompts: Sequence[Prompt]) -> Int[Tensor, "row token"]:
    """Where each token of the target is predicted; the last of these again to fill a row."""
    n = max(max(len(prompt.target), 1) for prompt in prompts)
    return torch.tensor([_filled(range(p.last, max(len(p.ids), 1)), n) for p in prompts])


def _filled(values: Sequence[int], n: int) -> list[int]:
    return [*values, *[values[-1]] * (n - len(values))]


def _stream(left: Any) -> Tensor:
    return left[0] if isinstance(left, tuple) else left
