"""Fine-tuning on an edit with Adam, plain or within a bound: the baseline of editing papers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.data.given import Edits, as_edits
from bwlens.edit.given import chosen_matrices, count, number
from bwlens.edit.gradient import edit_gradients
from bwlens.edit.known import open_edits
from bwlens.edit.value import LARGEST_STEP
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, resolve_layers
from bwlens.model.weights import Weight, weight_of


@one_thread_at_a_time
def fine_tune(
    model: LensModel,
    edits: Edits,
    *,
    layers: Layers,
    matrices: str | Sequence[str] = ("W_out",),
    lr: float = 5e-4,
    steps: int = 25,
    stop_loss: float = 1e-2,
    bound: float | None = None,
    prepend_bos: bool | None = None,
) -> WeightChange:
    """Adam on whole matrices until the edits' loss is small: FT, and FT+L with a bound.

    The loss is the edits' mean, each the mean NLL of its target's tokens, teacher forced; Adam with
    its usual settings changes float32 copies of the matrices. With `bound` every entry is kept near
    where it began. Edits known already are left out, which the `note` says.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        edits: One edit, or several whose mean loss is descended.
        layers: Which layers; the papers take one (Backward Lens, Table 1: 0 and 35 of 48).
        matrices: Which weights; ROME's and MEMIT's baselines train W_out alone.
        lr: Adam's step size.
        steps: At most this many.
        stop_loss: No step is taken below this loss, in nats.
        bound: Largest change of an entry, as a share of the matrix' root mean square; None for no
            bound. ROME's FT+L takes 5e-4 of GPT-2 xl; that is .0026 of SmolLM2's, where it does
            nothing.
        prepend_bos: None is the model's own default.

    Returns:
        The change, of full rank: the matrices' difference beside an identity. `details` hold the
        losses before each step and after the last.

    Raises:
        ValueError: A malformed argument, or a loss or weights no longer finite.
        NotImplementedError: A model out of scope, named in the message.

    Source: Backward Lens, Table 1; Meng et al., "Locating and Editing Factual Associations in GPT"
        (ROME), NeurIPS 2022, appendix E.1.

    Example:
        >>> edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
        >>> fine_tune(model, edit, layers=5)  # doctest: +SKIP
        WeightChange(W_out of layer 5; 192 rows, norm 1.236)
    """
    listed = as_edits(edits)
    lr, steps = number(lr, "lr"), count(steps, "steps")
    if not 0 < lr < LARGEST_STEP:
        raise ValueError(f"expected lr > 0 below {LARGEST_STEP:g}, found lr={lr}")
    stop_loss = number(stop_loss, "stop_loss")
    if bound is not None and not number(bound, "bound") > 0:
        raise ValueError(f"bound is {bound}; expected a share > 0, or None for no bound")
    chosen = resolve_layers(model, layers)
    matrices = chosen_matrices(model, matrices, chosen)
    listed, known = open_edits(model, listed, prepend_bos)
    trained = _Trained(model, lr, bound)
    losses: list[float] = []
    try:
        for step in range(steps + 1 if listed else 0):
            grads = edit_gradients(model, listed, matrices, chosen, prepend_bos)
            losses.append(float(grads.losses.mean()))
            if losses[-1] < stop_loss or step == steps:
                break
            trained.step({site: part.dense() / len(listed) for site, part in grads.items()})
    finally:
        trained.put_back()
    details = {"method": "fine_tune", "lr": lr, "bound": bound, "losses": losses}
    parts = {site: _factors(change) for site, change in trained.changes().items()}
    small = "the loss is below stop_loss already, nothing trained" if listed and not parts else ""
    return WeightChange(parts, "; ".join(filter(None, (known, small))), details)


class _Trained:
    """Copies of matrices that Adam changes, shown in the model while it does.

    A matrix is taken up when it first has a gradient: experts that no token was sent to stay out.
    """

    def __init__(self, model: LensModel, lr: float, bound: float | None) -> None:
        self._model, self._lr, self._bound = model, lr, bound
        self._weights: dict[Site, Weight] = {}
        self._before: dict[Site, Tensor] = {}
        self._now: dict[Site, Tensor] = {}
        self._adam: torch.optim.Adam | None = None

    def step(self, gradients: dict[Site, Tensor]) -> None:
        """One step of Adam; matrices without a gradient stay as they are."""
        for site in gradients:
            if site not in self._weights:
                self._take_up(site)
        for site, values in self._now.items():
            gradient = gradients.get(site)
            values.grad = None if gradient is None else gradient.to(values)
        if self._adam is not None:
            self._adam.step()
        for site, values in self._now.items():
            values.grad = None
            if self._bound is not None:
                start = self._before[site].to(values)
                most = self._bound * start.square().mean().sqrt()
                values.clamp_(start - most, start + most)
            self._weights[site].write(values)

    def _take_up(self, site: Site) -> None:
        weight = weight_of(self._model, site)
        before = weight.read()
        values = before.to(torch.promote_types(before.dtype, torch.float32), copy=True)
        self._weights[site], self._before[site], self._now[site] = weight, before, values
        if self._adam is None:
            self._adam = torch.optim.Adam([values], lr=self._lr)
        else:
            self._adam.add_param_group({"params": [values]})

    def put_back(self) -> None:
        """The model's own weights again, bit for bit."""
        for site, weight in self._weights.items():
            weight.write(self._before[site])

    def changes(self) -> dict[Site, Tensor]:
        """What training added to each matrix."""
        return {site: now - self._before[site].to(now) for site, now in self._now.items()}


def _factors(change: Tensor) -> LowRankMatrix:
    """A dense change as factors, an identity on its narrower side."""
    d_in, d_out = change.shape
    if d_in <= d_out:
        return LowRankMatrix(torch.eye(d_in).to(change), change)
    return LowRankMatrix(change.T.contiguous(), torch.eye(d_out).to(change))
