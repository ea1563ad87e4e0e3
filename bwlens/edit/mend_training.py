"""How MEND's editors are trained: their edits' effect, differentiated through the edited pass."""

from __future__ import annotations

import hashlib
import json
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bwlens.edit.editor import Editors, nonzero
from bwlens.edit.mend_passes import Passes, Prompt, divergence, nll
from bwlens.runs.parts import progress_bar
from bwlens.runs.tensors import read_tensors, write_tensors

_ROWS_OF = 300  # Examples whose rows give the mean and the deviation.
TEXT_TOKENS = 16  # Of a text, a beginning of at most so many tokens is asked about.
_LEAST = 4
_RATES = tuple(4.0**k for k in range(-5, 5))
_LARGEST = 100.0  # Gradients are clipped to this norm, as in the authors' code.
_FORM = "MendTraining"


@dataclass(frozen=True)
class Example:
    """A record's prompts: the edit, the same in other words, and what is to stay."""

    edit: Prompt
    paraphrases: tuple[Prompt, ...]
    neighbours: tuple[Prompt, ...]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All of them."""
        return self.edit, *self.paraphrases, *self.neighbours


@dataclass(frozen=True)
class Plan:
    """How to train, see `Mend.fit`."""

    steps: int
    lr: float
    edits_per_step: int
    edit_weight: float
    neighbours: float
    check_every: int
    patience: int
    seed: int


class Training:
    """Editors in training.

    Args:
        passes: Of the model, with what is below the edits kept.
        editors: At their start; what is trained.
        examples: To train on.
        held_out: To stop by.
        texts: Whose next words are to stay.
        plan: How long, how fast.
        folder: Where to keep the state; one found there is carried on.

    Attributes:
        history: Step, and losses on the held-out examples there: `loss`, `nll`, `kl`.
    """

    def __init__(
        self,
        passes: Passes,
        editors: Editors,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        texts: Sequence[Prompt],
        plan: Plan,
        folder: Path | None = None,
    ) -> None:
        self._passes, self._editors, self._plan = passes, editors, plan
        self._examples, self._held_out, self._texts = examples, held_out, texts
        self._path = folder and folder / "training.safetensors"
        self.history: list[dict[str, float | int]] = []
        rates = [p for name, p in editors.named_parameters() if name.endswith("log_rate")]
        others = [p for name, p in editors.named_parameters() if not name.endswith("log_rate")]
        groups = [{"params": others}, {"params": rates, "lr": 10 * plan.lr}]
        self._adam = torch.optim.Adam(groups, lr=plan.lr)
        self._best: dict[str, Tensor] = {}

    def run(self, progress: bool) -> None:
        """Train to the last step, or until the held-out loss has not fallen for a while."""
        if not (self._path and self._path.exists()):
            self._begin()
        else:
            self._carry_on(self._path)
        plan, done = self._plan, int(self.history[-1]["step"])
        with progress_bar("Training MEND", plan.steps, done, progress) as advance:
            for step in range(done, plan.steps):
                if self._stalled() or not self._step(step):
                    break
                advance(1)
                if (step + 1) % plan.check_every == 0 or step + 1 == plan.steps:
                    self._check(step + 1)
        self._editors.load_state_dict(self._best)

    def _begin(self) -> None:
        """Normalise, and start at the step size at which plain gradient steps do best."""
        n, rows = self._plan.edits_per_step, {}
        for start in range(0, min(len(self._examples), _ROWS_OF), n):
            factors = self._passes.gradients([e.edit for e in self._examples[start : start + n]])
            for site, (x, delta) in factors.items():
                there = nonzero(x, delta)
                rows.setdefault(site, []).append((x[there].cpu(), delta[there].cpu()))
        self._editors.normalise(rows)
        losses: dict[float, float] = {}
        for rate in _RATES:
            self._editors.start_at(rate)
            losses[rate] = self._on(self._examples[: 2 * n])["loss"]
        self._editors.start_at(
            min(_RATES, key=lambda rate: (not math.isfinite(losses[rate]), losses[rate]))
        )
        self._check(0)

    def _step(self, step: int) -> bool:
        """One step of Adam; False, and a warning, where the loss is no longer finite."""
        draw = random.Random(f"{self._plan.seed}|{step}")
        examples = draw.sample(self._examples, self._plan.edits_per_step)
        edit_loss, kl = self._losses(examples, draw)
        loss = self._plan.edit_weight * edit_loss + kl
        if not torch.isfinite(loss):
            warnings.warn(
                f"the training loss is {loss.item()} at step {step}, so training ends and the best"
                f" so far is kept; take a smaller lr than {self._plan.lr:g}",
                stacklevel=4,
            )
            return False
        parameters = list(self._editors.parameters())
        for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = slope
        torch.nn.utils.clip_grad_norm_(parameters, _LARGEST)
        self._adam.step()
        self._adam.zero_grad()
        return True

    def _losses(self, examples: Sequence[Example], draw: random.Random) -> tuple[Tensor, Tensor]:
        """NLL of the paraphrases, and KL(before || after) of next words that are to stay."""
        edits = self._editors(self._passes.gradients([example.edit for example in examples]))
        owners = range(len(examples))
        said = [draw.choice(example.paraphrases) for example in examples]
        kept = [self._to_stay(example, draw) for example in examples]
        with torch.no_grad():
            before = self._passes.logits(kept)[:, 0]
        logits = self._passes.logits([*said, *kept], edits, [*owners, *owners])
        kl = divergence(before=before, after=logits[len(said) :, 0])
        return nll(logits[: len(said)], said).mean(), kl.mean()

    def _to_stay(self, example: Example, draw: random.Random) -> Prompt:
        """A beginning of a text, or now and then a neighbour's prompt."""
        if draw.random() < self._plan.neighbours and example.neighbours:
            return draw.choice(example.neighbours)
        text = draw.choice(self._texts)
        most = len(text.ids)
        return text.cut(draw.randint(min(_LEAST, most), most))

    @torch.no_grad()
    def _on(self, examples: Sequence[Example]) -> dict[str, float | int]:
        """The mean losses on some examples, drawn alike each time."""
        n, sums = self._plan.edits_per_step, torch.zeros(2)
        for start in range(0, len(examples), n):
            several = examples[start : start + n]
            draw = random.Random(f"{self._plan.seed}|{start}|held out")
            sums += len(several) * torch.stack(self._losses(several, draw)).cpu()
        edit_loss, kl = (sums / len(examples)).tolist()
        return {"loss": self._plan.edit_weight * edit_loss + kl, "nll": edit_loss, "kl": kl}

    def _check(self, step: int) -> None:
        """Measure, note what is best, and write down where the training is."""
        self.history.append({"step": step, **self._on(self._held_out)})
        if self.history[-1] is self._best_check():
            self._best = {k: v.clone() for k, v in self._editors.state_dict().items()}
        if self._path is None:
            return
        tensors = {f"now.{name}": value for name, value in self._editors.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        for i, state in self._adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        write_tensors(self._path, tensors, _FORM, {"history": json.dumps(self.history)})

    def _carry_on(self, path: Path) -> None:
        tensors, about = read_tensors(path, _FORM, "Mend.fit")
        self.history = json.loads(about["history"])
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "adam": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self._editors.load_state_dict(parts["now"])
        self._best = parts["best"]
        state: dict[int, dict[str, Any]] = {}
        for key, value in parts["adam"].items():
            i, _, name = key.partition(".")
            state.setdefault(int(i), {})[name] = value
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": state, "param_groups": groups})

    def _best_check(self) -> dict[str, float | int]:
        return min(self.history, key=lambda one: one["loss"])

    def _stalled(self) -> bool:
        return self.history[-1]["step"] - self._best_check()["step"] >= (
            self._plan.patience * self._plan.check_every
        )


def digest(*parts: Sequence[Example | Prompt]) -> str:
    """Sixteen hexadecimal digits that tell what is trained on."""
    return hashlib.sha256(repr(tuple(map(list, parts))).encode()).hexdigest()[:16]
