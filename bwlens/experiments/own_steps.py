"""Every prompt of a batch under a weight change of its own, in one forward pass.

A change of W adds x dW to z = x W. Given as a function of x, it is added where z passes, prompt by
prompt: the weights stay as they are, and a batch under as many different edits costs one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.gradient.low_rank import LowRankGradient
from bwlens.model.flows import as_rows
from bwlens.model.losses import last_logits
from bwlens.model.passes import Addition, run, wide
from bwlens.model.prompts import Batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, Tap, plain_taps

Change = Callable[[Tensor], Tensor]
"""x [batch, pos, d_in] to what is added to z [batch, pos, d_out]."""

Step = float | Float[Tensor, " batch"]
"""How much of a change is added, to all prompts or to each."""


@dataclass(frozen=True, eq=False)
class Stepped:
    """A forward pass under changes, float32 at least."""

    logits: Float[Tensor, "batch pos d_vocab"]
    x: dict[Site, Float[Tensor, "batch d_in"]]
    """What entered each matrix that was watched, at the prompts' last tokens."""
    z: dict[Site, Float[Tensor, "batch d_out"]]
    """What left it there, its change included."""

    def last_logits(self, batch: Batch) -> Float[Tensor, "batch d_vocab"]:
        """The logits after each prompt's last token."""
        return last_logits(self.logits, batch)


def dense_taps(model: LensModel, matrices: Sequence[str] | str, layers: Layers) -> dict[Site, Tap]:
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
    model: LensModel,
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
    taps = dict(watched)
    for site in changes:
        taps |= {} if site in taps else dense_taps(model, site.matrix, site.layer)
    shape = batch.tokens.shape
    additions = [
        Addition(taps[site].z, _by_position(change, shape), taps[site].x, str(site))
        for site, change in changes.items()
    ]
    passed = run(model, batch.tokens, taps=watched.values(), additions=additions)
    at_last = {
        flow.tap: tuple(
            wide(last_logits(as_rows(rows).unflatten(0, shape), batch)).to(batch.last.device)
            for rows in (flow.x, flow.z)
        )
        for flow in passed.flows
    }
    return Stepped(
        wide(passed.logits),
        {site: at_last[tap][0] for site, tap in watched.items()},
        {site: at_last[tap][1] for site, tap in watched.items()},
    )


def _by_position(change: Change, shape: torch.Size) -> Change:
    """The change of what passes, heads together: [batch, pos, d_in]."""
    return lambda x: change(x.reshape(*shape, -1))


def padded(gradient: LowRankGradient, batch: Batch) -> tuple[Tensor, Tensor]:
    """A captured gradient's x [batch, pos, d_in] and delta [batch, pos, d_out], 0 at padding.

    They are where the batch's tokens are, whichever device the layer is on.
    """
    assert gradient.prompt is not None
    assert gradient.pos is not None
    at = (gradient.prompt, gradient.pos)
    x, delta = (
        rows.new_zeros(*batch.tokens.shape, rows.shape[1]).index_put(at, rows)
        for rows in (gradient.x, gradient.delta)
    )
    return x.to(batch.tokens.device), delta.to(batch.tokens.device)


def low_rank(
    x: Float[Tensor, "batch r d_in"], delta: Float[Tensor, "batch r d_out"], step: Step
) -> Change:
    """The change dW_b = step_b x_b^T delta_b, never formed: (x x_b^T) delta_b."""
    scaled = _times(delta, step)
    return lambda entering: (entering @ x.to(entering).mT) @ scaled.to(entering)


def full_matrix(matrix: Float[Tensor, "batch d_in d_out"], step: Step) -> Change:
    """The change dW_b = step_b M_b with a matrix for each prompt."""
    return lambda entering: _times(entering @ matrix.to(entering), step)


def _times(tensor: Tensor, step: Step) -> Tensor:
    return tensor * (step[:, None, None].to(tensor) if isinstance(step, Tensor) else step)
