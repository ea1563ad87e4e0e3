"""The value that ROME and MEMIT write: a shift at one token, found by Adam.

Also the prefixes behind which both read keys and values, drawn from the model itself.
"""

from __future__ import annotations

import math
import numbers
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.edit.aims import Aims
from bwlens.edit.given import count, texts_of
from bwlens.edit.keys import Contexts, Position, check_position, contexts_of
from bwlens.model.passes import device_of, prompts_at_once, run
from bwlens.model.prompts import Edit, padded
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site
from bwlens.model.tokens import text_to_ids
from bwlens.runs.parts import progress_bar

LARGEST_STEP = 1e30
"""Steps of Adam stay below; its arithmetic overflows float32 somewhat above."""

_LENGTHS = (5,) * 10 + (10,) * 10  # ROME's: ten prefixes of five tokens, ten of ten.
_AMONG = 5  # Each token is drawn from the model's five most probable.
_PREFIXES: WeakKeyDictionary[Any, dict[Any, tuple[str, ...]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ValueSettings:
    """How a value is searched, in the words of ROME's published settings.

    The loss is `mean NLL(target) + kl_factor * KL(new || original, "{subject} is a")
    + weight_decay * ||delta|| / ||size||^2`, and after each step of Adam `||delta||` is kept
    within `clamp * ||size||`; it ends after `steps` or, before a step, below `stop_loss`.
    """

    steps: int = 20
    lr: float = 0.5
    kl_factor: float = 0.0625
    weight_decay: float = 0.5
    clamp: float = 4.0
    stop_loss: float = 0.05

    def __post_init__(self) -> None:
        for name in ("kl_factor", "weight_decay"):
            _real(getattr(self, name), name)
        lr, clamp = _real(self.lr, "lr"), _real(self.clamp, "clamp")
        if count(self.steps, "steps") and not (0 < lr < LARGEST_STEP and clamp > 0):
            raise ValueError(
                f"expected at least one step, 0 < lr < {LARGEST_STEP:g} and clamp > 0, found"
                f" steps={self.steps}, lr={self.lr}, clamp={self.clamp}"
            )


def _real(value: Any, name: str) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected a number")
    return float(value)


@dataclass(frozen=True, eq=False)
class Value:
    """A key and what is to be added to the output there.

    Attributes:
        key: k*, the mean key over the contexts [d_in].
        plain_key: The key at the prompt by itself [d_in].
        delta: What is added to the output at the key's token [d_model].
        losses: The loss before each step, and after the last.
    """

    key: Float[Tensor, " d_in"]
    plain_key: Float[Tensor, " d_in"]
    delta: Float[Tensor, " d_model"]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class ValueSearch:
    """How ROME and MEMIT look for what to write: settings, contexts and the key's place.

    `prefixes` of None draws twenty from the model, see `prefixes_of`.

    Raises:
        ValueError: A malformed setting.
    """

    settings: ValueSettings
    prefixes: Sequence[str] | None
    position: Position
    prepend_bos: bool | None

    def __post_init__(self) -> None:
        check_position(self.position)
        if self.prefixes is not None:
            object.__setattr__(self, "prefixes", texts_of(self.prefixes, "prefixes"))

    def before(self, model: LensModel) -> tuple[str, ...]:
        """The prefixes."""
        return prefixes_of(model, self.prefixes, self.prepend_bos)

    def contexts(self, model: LensModel, edits: Sequence[Edit], targets: bool = False) -> Contexts:
        """Each prompt by itself and behind the prefixes."""
        before = self.before(model)
        return contexts_of(model, edits, before, self.position, self.prepend_bos, targets)

    def values(
        self, model: LensModel, edits: Sequence[Edit], site: Site, *, of_stream: bool = False
    ) -> list[Value]:
        """For each edit the shift of W_out's output at its key that makes its target probable.

        Each is searched on the model as it is, whichever others pass it in the same batch. `size`
        is W_out's output at the plain prompt (ROME), or with `of_stream` the stream after the
        block.

        Raises:
            ValueError: A subject is not in its prompt, or a loss is no longer finite.
        """
        values: list[Value] = []
        size = max(1, prompts_at_once(model) // (len(self.before(model)) + 2))
        with progress_bar("Values", len(edits), shown=len(edits) > size) as advance:
            for start in range(0, len(edits), size):
                several = edits[start : start + size]
                aims = Aims(model, self._with_essence(model, several), site)
                sizes = (aims.stream if of_stream else aims.outputs)[:, 0].norm(dim=-1)
                solved = _solved(aims, self.settings, sizes.clamp(min=1e-9))
                keys, plain = aims.keys[:, :-1].mean(1), aims.keys[:, 0]
                values += [Value(*one) for one in zip(keys, plain, *solved, strict=True)]
                advance(len(several))
        return values

    def _with_essence(self, model: LensModel, edits: Sequence[Edit]) -> Contexts:
        """Each prompt behind the prefixes and, last, "{subject} is a", whose target is not read."""
        essences = [Edit("{} is a", edit.subject, edit.target_new) for edit in edits]
        first = self.contexts(model, edits, targets=True)
        last = contexts_of(model, essences, (), self.position, self.prepend_bos, targets=False)
        targets = [*first.batch.targets, *first.batch.targets[:: first.n]]
        lengths = torch.cat([first.batch.prompt_lengths, last.batch.prompt_lengths])
        positions = [*first.positions, *last.positions]
        tokens = [*first.batch.tokens.tolist(), *last.batch.tokens.tolist()]
        order = [
            row
            for i in range(len(edits))
            for row in (*range(i * first.n, (i + 1) * first.n), len(edits) * first.n + i)
        ]
        rows = [[*tokens[i][: int(lengths[i])], *targets[i][:-1]] for i in order]
        batch = replace(
            padded(model, rows),
            prompt_lengths=lengths[order],
            targets=tuple(targets[i] for i in order),
        )
        return Contexts(batch, tuple(positions[i] for i in order), first.n + 1)


def prefixes_of(
    model: LensModel, prefixes: Sequence[str] | None, prepend_bos: bool | None = None
) -> tuple[str, ...]:
    """The prefixes given, or twenty drawn from the model, once for each model object.

    Ten of five tokens and ten of ten continue the BOS token (or " The" where there is none), every
    token drawn from the five most probable by a generator of fixed seed; "." ends each.
    """
    if prefixes is not None:
        return tuple(prefixes)
    kept = _PREFIXES.setdefault(model, {})
    if prepend_bos not in kept:
        kept[prepend_bos] = _sampled(model)
    return kept[prepend_bos]


def _sampled(model: LensModel) -> tuple[str, ...]:
    begin = getattr(model.tokenizer, "bos_token_id", None)
    start = text_to_ids(model, " The", False) if begin is None else [begin]
    rng = random.Random(0)
    tokens = torch.tensor([start] * len(_LENGTHS), device=device_of(model))
    for _ in range(max(_LENGTHS)):
        logits = run(model, tokens).logits[:, -1].float()
        top = logits.topk(min(_AMONG, logits.shape[-1]))
        weights = top.values.softmax(-1).tolist()
        drawn = [rng.choices(range(len(w)), w)[0] for w in weights]
        chosen = top.indices[range(len(drawn)), drawn]
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    skip = 0 if begin is None else len(start)
    ends = [len(start) + n for n in _LENGTHS]
    rows = [row[skip:end] for row, end in zip(tokens.tolist(), ends, strict=True)]
    texts = [model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return tuple(f"{text.strip()}." for text in texts if text.strip())


def _solved(
    aims: Aims, settings: ValueSettings, sizes: Float[Tensor, " edit"]
) -> tuple[Float[Tensor, "edit d_out"], list[tuple[float, ...]]]:
    """Adam from no shift at all; the last of each edit's contexts is its essence."""
    losses: list[list[float]] = [[] for _ in sizes]
    found = torch.zeros_like(aims.outputs[:, 0])
    delta = found.clone().requires_grad_()
    adam = torch.optim.Adam([delta], lr=settings.lr)
    going = list(range(len(losses)))
    original: Tensor | None = None
    for step in range(settings.steps + 1):
        with torch.enable_grad():
            words = aims.words(delta)
            new = words[:, -1, 0]
            original = new.detach() if original is None else original
            mask = aims.mask[:, :-1].to(words.device)
            log_p = torch.where(mask, aims.of_target(words)[:, :-1], 0.0)
            nll = -(log_p.sum(2) / mask.sum(2)).mean(1)
            kl = (new.exp() * (new - original)).sum(1)
            decay = delta.norm(dim=1) / sizes**2
            loss = nll + settings.kl_factor * kl + settings.weight_decay * decay
        for i in going:
            losses[i].append(float(loss[i].detach()))
            if not math.isfinite(losses[i][-1]):
                raise ValueError(
                    f"the loss is {losses[i][-1]} after {step} steps of lr={settings.lr}; take a"
                    f" smaller lr, or a model in float32"
                )
        # An edit that is done is kept as it is now; the others go on.
        found[going] = delta.detach()[going]
        going = [i for i in going if losses[i][-1] >= settings.stop_loss]
        if step == settings.steps or not going:
            break
        (delta.grad,) = torch.autograd.grad(loss[going].sum(), [delta])
        adam.step()
        with torch.no_grad():
            norms = delta.norm(dim=1)
            if not torch.isfinite(norms).all():
                raise ValueError(
                    f"the shift has grown out of all bounds after {step + 1} steps of"
                    f" lr={settings.lr}; take a smaller lr"
                )
            delta.mul_((settings.clamp * sizes / norms.clamp(min=1e-9)).clamp(max=1)[:, None])
    return found, [tuple(of_edit) for of_edit in losses]
