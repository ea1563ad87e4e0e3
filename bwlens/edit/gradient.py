"""Gradient step: plain gradient descent on the edit's loss, kept as low-rank factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bwlens.changes.change import WeightChange
from bwlens.data.given import Edits, as_edits
from bwlens.edit.given import chosen_matrices, count, number
from bwlens.edit.known import open_edits
from bwlens.gradient.capturing import Gradients, capture
from bwlens.gradient.objectives import NLL
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.prompts import Edit
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, resolve_layers


@one_thread_at_a_time
def gradient_step(
    model: LensModel,
    edits: Edits,
    *,
    lr: float,
    matrices: str | Sequence[str] = ("W_out",),
    layers: Layers = None,
    steps: int = 1,
    prepend_bos: bool | None = None,
) -> WeightChange:
    """Steps of stochastic gradient descent on the targets' NLL, as low-rank updates.

    `W -= lr * x^T delta`, with the gradient of the edits' mean loss (each the mean NLL of its
    target's tokens, teacher forced), captured anew for each step. Edits known already are left out,
    which the `note` says.

    Args:
        model: A TransformerBridge or HookedTransformer.
        edits: One edit, or several whose mean loss is descended.
        lr: The step size; no momentum, no decay.
        matrices: Which weights, names out of `bwlens.MATRICES`.
        layers: Which layers; None for all.
        steps: How many steps.
        prepend_bos: None is the model's own default.

    Returns:
        The change, a row for each token, edit and step. `details` hold the loss before each step.

    Raises:
        ValueError: A malformed argument, or a loss or weights no longer finite.
        NotImplementedError: A model out of scope, named in the message.

    Source: Backward Lens, sections 4.1 and 5 (one plain step, no optimiser scaling).

    Example:
        >>> edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
        >>> gradient_step(model, edit, lr=0.1, layers=5)  # doctest: +SKIP
        WeightChange(W_out of layer 5; 5 rows, norm 0.02104)
    """
    listed = as_edits(edits)
    lr, steps = number(lr, "lr", "a finite lr"), count(steps, "steps")
    layers = resolve_layers(model, layers)
    matrices = chosen_matrices(model, matrices, layers)
    listed, note = open_edits(model, listed, prepend_bos)
    change, losses = WeightChange(), []
    for _ in range(steps if listed else 0):
        with change.applied(model):
            grads = edit_gradients(model, listed, matrices, layers, prepend_bos)
        losses.append(float(grads.losses.mean()))
        change = change + WeightChange(
            {site: gradient * (-lr / len(listed)) for site, gradient in grads.items()}
        )
    details = {"method": "gradient_step", "lr": lr, "losses": losses}
    return replace(change, note=note, details=details)


def edit_gradients(
    model: LensModel,
    edits: list[Edit],
    matrices: Sequence[str],
    layers: Layers,
    prepend_bos: bool | None,
) -> Gradients:
    """The gradient of the sum of the edits' losses, their targets' mean NLL."""
    targets = [edit.target_new for edit in edits]
    texts = [edit.text for edit in edits]
    return capture(model, texts, NLL(targets), matrices, layers, prepend_bos=prepend_bos)
