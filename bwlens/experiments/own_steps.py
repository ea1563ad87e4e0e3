"""Every prompt of a batch under a weight change of its own, in one forward pass.

A change of W adds x dW to z = x W. Given as a function of x, it is added where z passes, prompt by
prompt: the weights stay as they are, and a batch under as many different edits costs one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.gradient.low_rank import LowRankGradient
from bwlens.model.passes import in_eval_mode
from bwlens.model.prompts import Batch
from bwlens.model.sites import Point, Site, Tap, plain_taps

Change = Callable[[Tensor], Tensor]
"""x [batch, pos, d_in] to what is added to z [batch, pos, d_out]."""

Step = float | Float[Tensor, " batch"]
"""How much of a change is added, to all prompts or to each."""


@dataclass(frozen=True, eq=False)
class Stepped:
    """A forward pass under changes.

    Attributes:
        logits: [batch, pos, d_vocab], float32 at least.
        x: What entered each matrix that was watched, at the prompts' last tokens [batch, d_in].
        z: What left it, its change included [batch, d_out]; both float32 at least.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    x: dict[Site, Float[Tensor, "batch d_in"]]
    z: dict[Site, Float[Tensor, "batch d_out"]]

    def last_logits(self, batch: Batch) -> Float[Tensor, "batch d_vocab"]:
        """The logits after each prompt's last token."""
        rows = torch.arange(len(batch), device=self.logits.device)
        return self.logits[rows, batch.last.to(self.logits.device)]


def dense_taps(
    model: Any, matrices: Sequence[str], layers: Sequence[int] | None
) -> dict[Site, Tap]:
    """The taps of some matrices, none of them an expert's.

    Raises:
        NotImplementedError: A layer is a mixture of experts: a step on one layer changes which
            tokens the experts of others are sent, and each token has its own matrices.
        ValueError: No such matrix or layer.
    """
    why = (
        "a step of one prompt alone can be followed through dense MLPs only: name layers that have"
        " one, if there are any"
    )
    return {tap.site: tap for tap in plain_taps(model, matrices, layers, why)}


def stepped(
    model: Any,
    batch: Batch,
    changes: Mapping[Site, Change],
    watched: Mapping[Site, Tap] | None = None,
) -> Stepped:
    """One forward pass in which each prompt's weights are changed for that prompt alone.

    Args:
        model: A TransformerBridge or HookedTransformer.
        batch: The prompts.
        changes: What is added to z for each matrix, as a function of its x.
        watched: Taps whose x and z are kept, those of the changes among them.

    Raises:
        NotImplementedError: A matrix' x or z passed no hook point in the model's present mode.

    Example:
        >>> taps = dense_taps(model, ["W_out"], [3])  # doctest: +SKIP
        >>> change = low_rank(*padded(grads["W_out", 3], batch), -0.1)  # doctest: +SKIP
        >>> stepped(model, batch, {Site("W_out", 3): change}, taps).logits  # doctest: +SKIP
    """
    watched = watched or {}
    missing = [site for site in changes if site not in watched]
    taps = {**watched, **_taps_of(model, missing)}
    passes = [_Passing(tap, changes.get(site), batch) for site, tap in taps.items()]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(in_eval_mode(model))
        for passing in passes:
            passing.enter(stack)
        logits = model(batch.tokens, return_type="logits", padding_side="right")
    for passing in passes:
        passing.check()
    return Stepped(
        _precise(logits),
        {p.tap.site: p.last_x for p in passes if p.tap.site in watched},
        {p.tap.site: p.last_z for p in passes if p.tap.site in watched},
    )


def padded(gradient: LowRankGradient, batch: Batch) -> tuple[Tensor, Tensor]:
    """A captured gradient's x [batch, pos, d_in] and delta [batch, pos, d_out], 0 at padding.

    They are where the batch's tokens are, whichever device the layer is on.
    """
    assert gradient.prompt is not None
    assert gradient.pos is not None
    whole = []
    for rows in (gradient.x, gradient.delta):
        full = rows.new_zeros(*batch.tokens.shape, rows.shape[1])
        full[gradient.prompt, gradient.pos] = rows
        whole.append(full.to(batch.tokens.device))
    return whole[0], whole[1]


def low_rank(
    x: Float[Tensor, "batch r d_in"], delta: Float[Tensor, "batch r d_out"], step: Step
) -> Change:
    """The change dW_b = step_b x_b^T delta_b, never formed: (x x_b^T) delta_b."""
    scaled = _times(delta, step)
    return lambda entering: (entering @ x.to(entering).mT) @ scaled.to(entering)


def whole(matrix: Float[Tensor, "batch d_in d_out"], step: Step) -> Change:
    """The change dW_b = step_b M_b with a matrix for each prompt."""
    return lambda entering: _times(entering @ matrix.to(entering), step)


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _times(tensor: Tensor, step: Step) -> Tensor:
    return tensor * (step[:, None, None].to(tensor) if isinstance(step, Tensor) else step)


def _taps_of(model: Any, sites: Sequence[Site]) -> dict[Site, Tap]:
    found = {}
    for site in sites:
        found |= dense_taps(model, [site.matrix], [site.layer])
    return found


class _Passing:
    """One matrix in one pass: notes its x, adds its change to its z, notes the sum."""

    def __init__(self, tap: Tap, change: Change | None, batch: Batch) -> None:
        self.tap, self._change = tap, change
        self._shape, self._last = batch.tokens.shape, batch.last
        self._seen: dict[Point, Tensor] = {}
        self._through: list[Point] = []
        self.last_x = self.last_z = torch.empty(0)

    def enter(self, stack: ExitStack) -> None:
        for point in self.tap.x:
            # A module's input must be known before what is inside it runs.
            hook = self._note(point)
            if point.side == "input":
                handle = point.module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = point.module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        for point in self.tap.z:
            hook = self._add(point)
            stack.callback(point.module.register_forward_hook(hook, with_kwargs=True).remove)

    def check(self) -> None:
        times = max((self._through.count(point) for point in self._through), default=0)
        if times != 1:
            raise NotImplementedError(
                f"{self.tap.site} ran {times} times where bwlens can reach it; expected once."
                f" Reload the model raw (bwlens.load_model)"
            )

    def _note(self, point: Point) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any = None) -> None:
            self._seen[point] = point.take(args, kwargs, output)

        return hook

    def _add(self, point: Point) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            entering = next((self._seen[p] for p in self.tap.x if p in self._seen), None)
            if entering is None:
                raise NotImplementedError(
                    f"x of {self.tap.site} passed no hook point before its z in the model's present"
                    f" mode; reload the model raw (bwlens.load_model)"
                )
            rows = torch.arange(self._shape[0], device=entering.device)
            last = self._last.to(entering.device)
            x = entering.reshape(*self._shape, -1)
            leaving = output[0] if isinstance(output, tuple) else output
            # W_O's z passes the attention module, too: what was added is there already.
            if self._change is not None and point in (self._through or [point])[:1]:
                leaving = leaving + self._change(x).to(leaving).view_as(leaving)
            self._through.append(point)
            leaves = leaving.reshape(*self._shape, -1)
            self.last_x, self.last_z = (
                _precise(passed[rows, last]).to(self._last.device) for passed in (x, leaves)
            )
            return (leaving, *output[1:]) if isinstance(output, tuple) else leaving

        return hook
