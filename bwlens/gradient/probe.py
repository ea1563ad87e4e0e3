"""Measured on a short prompt: is z = x W, and does a step along -delta do what ||delta|| says?"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bwlens.model.flows import Flow, as_rows
from bwlens.model.losses import forward
from bwlens.model.probing import losses_after_steps, probe_batch, probe_loss, undisturbed
from bwlens.model.prompts import Batch
from bwlens.model.sites import ExpertTap, Site, Tap
from bwlens.model.weights import parameter_of


class UntrueGradientError(NotImplementedError):
    """What bwlens would say of this model is not so; the message has the figures."""


class Probe:
    """One pass of a short prompt through a model without its user's hooks: x, z and delta."""

    def __init__(
        self, model: Any, taps: Sequence[Tap | ExpertTap], batch: Batch | None = None
    ) -> None:
        self.model, self.batch = model, probe_batch(model) if batch is None else batch
        with undisturbed(model):
            self.run = forward(model, self.batch, probe_loss, taps)
        self.flows = self.run.passed.flows
        self.tap_of = {site: flow.tap for flow in self.flows for site, _ in flow.parts}
        self._flow_of = {site: (flow, part) for flow in self.flows for site, part in flow.parts}
        self._deltas: dict[int, Tensor] = {}

    @property
    def sites(self) -> list[Site]:
        """The sites that tokens passed, in order."""
        return list(self._flow_of)

    def flow_of(self, site: Site) -> tuple[Flow, Any]:
        """What passed a site, and which columns of z are its own."""
        return self._flow_of[site]

    def lowest(self) -> Site | None:
        """The lowest site where a step can be taken: an expert's could turn the layer's routing."""
        plain = [site for site in self._flow_of if not isinstance(site.expert, int)]
        return min(plain, key=lambda site: site.layer, default=None)

    def gradients_of(self, tensors: list[Tensor]) -> list[Tensor | None]:
        """dL/dtensor of each; None where the loss does not hang on it."""
        deltas = cast(  # torch's own type leaves out the None
            "tuple[Tensor | None, ...]",
            torch.autograd.grad(self.run.total, tensors, retain_graph=True, allow_unused=True),
        )
        scale = self.run.scale
        return [d if d is None or scale == 1 else d.float() / scale for d in deltas]

    def deltas(self, *sites: Site) -> dict[Site, Tensor]:
        """dL/dz of some sites or of all, over all columns of z: [n, d_out], float32 at least."""
        wanted = sites or tuple(self._flow_of)
        flows = {id(flow): flow for flow, _ in (self._flow_of[site] for site in wanted)}
        fresh = [flow for key, flow in flows.items() if key not in self._deltas]
        if fresh:
            deltas = self.gradients_of([flow.z for flow in fresh])
            for flow, delta in zip(fresh, deltas, strict=True):
                delta = torch.zeros_like(flow.z) if delta is None else delta
                wide = torch.promote_types(delta.dtype, torch.float32)
                self._deltas[id(flow)] = as_rows(delta.detach()).to(wide)
        return {site: self._deltas[id(self._flow_of[site][0])] for site in wanted}

    def step(self, site: Site) -> StepFigures:
        """What a small step along -delta does to the loss, beside what ||delta|| says."""
        flow, tap = self._flow_of[site][0], self.tap_of[site]
        assert isinstance(tap, Tap)
        if not flow.z.requires_grad:
            raise UntrueGradientError(
                f"{site} has no gradient: {_kind(tap, site)} computes off the autograd graph"
                f" (quantised for inference?), so neither it nor what lies below can be read; load"
                f" the model in float32, bfloat16 or float16"
            )
        rows = self.deltas(site)[site]
        logits = self.run.logits.detach()
        rounding = torch.finfo(logits.dtype).eps * float(logits.float().abs().max())
        length = float(rows.norm())
        longest = 0.1 * float(as_rows(flow.z.detach()).to(rows).norm())
        largest = min(_NATS / max(length, 1e-30), longest)
        # Far above what the logits are rounded to, or it says nothing.
        sizes = [largest / part for part in _PARTS if largest / part * length > 20 * rounding]
        if len(sizes) < len(_PARTS):
            return StepFigures(site, length)
        for point in (p for p in tap.z if p in self.run.passed.seen):
            ratios: list[float] = []
            for size in sizes:
                up, down = losses_after_steps(
                    self.model, point, -rows / length, [size, -size], self.batch.tokens
                ).tolist()
                ratios.append((down - up) / (2 * size * length))
                if abs(ratios[-1] - 1) <= _RIGHT:
                    break  # the other sizes are for what is not right at once
            if any(ratios):  # a point that only shows its tensor changes nothing
                noise = rounding / sizes[len(ratios) - 1] / length
                return StepFigures(site, length, tuple(ratios), noise)
        return StepFigures(site, length)


_RIGHT = 0.02
"""How far from 1 a ratio may be: what is cubic in the step."""
_NATS = 0.02
"""How much a step at a site is to change the probe's loss."""
_PARTS = (1, 4, 16)
"""The largest step is divided by these: a kink (ReLU, a router) matters less in each."""


@dataclass(frozen=True)
class StepFigures:
    """How the loss changes along -delta at a site: measured, over what ||delta|| says.

    `ratios` are central differences, the largest step first, ending with one that is right; empty
    where none could be taken. `noise` is what the logits' rounding may do to the last.
    """

    site: Site
    length: float
    ratios: tuple[float, ...] = ()
    noise: float = 0.0

    @property
    def ratio(self) -> float | None:
        """The ratio closest to 1 if it is right; else what all sizes agree on, or None.

        A step across a kink (a ReLU, a router's choice) is right in a smaller size.
        """
        if not self.ratios:
            return None
        best = min(self.ratios, key=lambda ratio: abs(ratio - 1))
        if abs(best - 1) <= _RIGHT + 2 * self.noise:
            return best
        spread = max(self.ratios) - min(self.ratios)
        agree = spread <= 0.1 * abs(best) + 4 * self.noise
        return best if agree and abs(best - 1) > 0.1 + spread else None

    @property
    def fault(self) -> str | None:
        """What is wrong, with figures."""
        ratio = self.ratio
        if ratio is None or abs(ratio - 1) <= 0.1:
            return None
        return (
            f"a small step along -delta at {self.site} changes the loss by {ratio:+.3f} times what"
            f" ||delta|| = {self.length:.3g} says (expected +1.000): autograd's delta is not the"
            f" derivative of what the model computes above it (roundings that gradients pass"
            f" through unseen, as in quantisation-aware training, or hooks that change gradients);"
            f" load or convert the model without them"
        )


@dataclass(frozen=True)
class LinearFigures:
    """How far z is from x times the weight, as a share of how much z varies over tokens."""

    site: Site
    kind: str
    error: float | None
    tolerance: float
    packed: bool = False
    ratio: float = 1.0
    adapter: bool = False

    @property
    def fault(self) -> str | None:
        """What is wrong, with figures."""
        if self.adapter:
            return (
                f"{self.site}: {self.kind} adds an adapter to the weight below it, and a gradient"
                f" of which of them is meant is not clear; merge it first (PEFT:"
                f" model = model.merge_and_unload(), then boot the bridge from that)"
            )
        if self.error is None or self.error <= self.tolerance:
            return None
        if self.packed:
            return (
                f"{self.site}: {self.kind} keeps its weight packed and is not linear in what enters"
                f" it: z is off by {self.error:.2%}, where rounding is {self.tolerance:.2%} (it"
                f" rounds activations in passing?), so x^T delta is not its gradient; load the"
                f" model in float32, bfloat16 or float16"
            )
        return (
            f"{self.site}: what leaves {self.kind} is not x times its weight: z is off by"
            f" {self.error:.2%} of its variation, where rounding is {self.tolerance:.2%}, and"
            f" {self.ratio:.3g} times as long (the layer quantises, rescales or adapts its weight"
            f" in passing), so x^T delta is not the weight's gradient; load or convert the model to"
            f" plain linear layers"
        )


@torch.no_grad()
def linearity(
    tap: Tap | ExpertTap, site: Site, flow: Flow, columns: slice | Tensor
) -> LinearFigures:
    """Compare z with x times the stored weight; where that is packed, with mixtures of answers.

    Differences over tokens are compared, as a bias may be added.
    """
    x, z = as_rows(flow.x.detach()), as_rows(flow.z.detach())[:, columns]
    wide = torch.promote_types(z.dtype, torch.float32)
    kind, adapter = _kind(tap, site), hasattr(_linear(tap, site), "base_layer")
    if adapter or len(x) < 2:
        return LinearFigures(site, kind, None, 0.0, adapter=adapter)
    tolerance = _tolerance(z.to(wide), z.dtype)
    if tolerance > 0.1:  # z hardly varies beside its length: rounding hides all
        return LinearFigures(site, kind, None, tolerance)
    try:
        parameter, live = parameter_of(tap, site)
        if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            raise NotImplementedError
    except NotImplementedError:
        error = _affinity_error(tap, flow, wide)
        return LinearFigures(site, kind, error, tolerance, packed=True)
    if parameter.is_meta:
        return LinearFigures(site, kind, None, tolerance)
    weight = live.detach().reshape(x.shape[1], -1).to(wide)
    if weight.shape[1] != z.shape[1]:
        return LinearFigures(site, kind, None, tolerance)
    said = _centred(x.to(weight.device, wide)) @ weight
    is_so = _centred(z.to(weight.device, wide))
    length = is_so.norm().clamp_min(1e-30)
    ratio = float(length / said.norm().clamp_min(1e-30))
    return LinearFigures(site, kind, float((said - is_so).norm() / length), tolerance, ratio=ratio)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0, keepdim=True)


def _tolerance(z: Tensor, dtype: torch.dtype) -> float:
    """What rounding z to its dtype may do, as a share of its variation over tokens."""
    length = _centred(z).norm().clamp_min(1e-30)
    return max(1e-3, 0.5 * torch.finfo(dtype).eps * float(z.norm() / length))


def _affinity_error(tap: Tap | ExpertTap, flow: Flow, wide: torch.dtype) -> float | None:
    """How far a layer's answer to mixtures of tokens is from the mixtures of its answers."""
    layer = tap.holder if isinstance(tap, Tap) else None
    if layer is None or not callable(getattr(layer, "forward", None)):
        return None
    x = as_rows(flow.x.detach())
    mixing = torch.rand(len(x), len(x), generator=torch.Generator().manual_seed(0)).to(
        x.device, wide
    )
    mixing = mixing / mixing.sum(1, keepdim=True)
    together, apart = layer((mixing @ x.to(wide)).to(x.dtype)[None]), layer(x[None])
    if not isinstance(together, Tensor) or not isinstance(apart, Tensor):
        return None
    said, is_so = mixing @ apart[0].to(wide), together[0].to(wide)
    return float((said - is_so).norm() / _centred(apart[0].to(wide)).norm().clamp_min(1e-30))


def holder_of(tap: Tap | ExpertTap) -> nn.Module:
    """The module that keeps the weights of a tap."""
    return tap.experts if isinstance(tap, ExpertTap) else tap.holder


def _linear(tap: Tap | ExpertTap, site: Site | None = None) -> nn.Module:
    holder = holder_of(tap)
    inner: dict[str, nn.Module | None] = vars(holder)["_modules"]
    return inner.get(site.matrix if site else "") or holder


def _kind(tap: Tap | ExpertTap, site: Site | None = None) -> str:
    return type(_linear(tap, site)).__name__
