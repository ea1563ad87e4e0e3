"""The checks of numbers: head, gradients, steps, batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bwlens.checking.report import Finding
from bwlens.gradient.capturing import Gradients, capture
from bwlens.gradient.objectives import NLL
from bwlens.gradient.probe import Probe, UntrueGradientError, linearity
from bwlens.model.flows import as_rows
from bwlens.model.head import head_of, stream_of
from bwlens.model.probing import logits_and, undisturbed
from bwlens.model.prompts import Batch
from bwlens.model.sites import Point, Site, find_taps
from bwlens.model.weights import parameter_of
from bwlens.reading.readouts import readout

_BYTES = 256 * 2**20
"""Gradients of parameters held at a time."""

_NOTHING = "the model has no matrix that bwlens reads"


def head(model: Any, batch: Batch) -> Finding:
    """What `readout` makes of the last stream, against the model's own logits."""
    own_head = head_of(model)
    point = Point(model.blocks[-1], "output")
    logits, seen = logits_and(model, {point}, batch.tokens)
    own = logits.flatten(0, -2).to(own_head.W_U.device, torch.float64)
    stream = stream_of(seen[point])
    assert stream is not None
    read = readout(own_head, stream.flatten(0, -2), top_k=min(50, own.shape[1]))
    spread = (own - own.mean(1, keepdim=True)).square().mean(1).sqrt()
    rounding = torch.finfo(logits.dtype).eps * float((own.abs().amax(1) / spread).max())
    limit = max(1e-4, 4 * rounding)
    errors = [
        ((scores.double() - own.gather(1, ids)).abs().amax(1) / spread).max()
        for ids, scores in (
            (read.top_ids, read.top_scores),
            (read.bottom_ids, read.bottom_scores),
        )
    ]
    error = float(torch.stack(errors).max())
    parts = [f"scale {own_head.scale:g}"] if own_head.scale != 1 else []
    parts += [f"soft cap {own_head.soft_cap:g}"] if own_head.soft_cap is not None else []
    with_ = f", with {' and '.join(parts)}" if parts else ""
    return Finding.measured(
        "head",
        f"off by {error:.1e} of the logits' spread{with_}",
        error,
        limit,
        ok="words, ranks and scores are those of the model's own norm and unembedding",
        fails="readings of this model are not what it would say; do not trust words and ranks",
    )


def gradients(
    model: Any, batch: Batch, matrices: Sequence[str], layers: list[int]
) -> list[Finding]:
    """x^T delta against autograd's gradient of the parameter itself, matrix by matrix."""
    if not matrices:
        return [Finding.skipped("gradient", _NOTHING)]
    taps = find_taps(model, matrices, layers)
    parameters = {parameter for tap in taps for parameter in _parameters(tap) if _floats(parameter)}
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        probe = Probe(model, taps, batch)
        errors, notes = _against_autograd(probe, matrices)
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
    limit = max(1e-4, 3 * torch.finfo(probe.run.logits.dtype).eps)
    return [_of_gradient(m, errors.get(m, {}), notes.get(m), limit) for m in matrices]


def _parameters(tap: Any) -> list[Any]:
    if hasattr(tap, "weights"):
        return [getattr(tap.experts, name) for name in tap.weights]
    try:
        return [parameter_of(tap, tap.site)[0]]
    except NotImplementedError:
        return []


def _floats(parameter: Any) -> bool:
    return (
        isinstance(parameter, torch.nn.Parameter)
        and parameter.is_floating_point()
        and type(parameter.data) is Tensor
        and not parameter.is_meta
    )


def _against_autograd(
    probe: Probe, matrices: Sequence[str]
) -> tuple[dict[str, dict[Site, float]], dict[str, str]]:
    """Relative errors by matrix and site, and why others have none; a few parameters at a time."""
    errors: dict[str, dict[Site, float]] = {}
    notes: dict[str, str] = {}
    sites_of: dict[Any, list[Site]] = {}
    for site in probe.sites:
        if site.matrix not in matrices:
            continue
        try:
            parameter, _ = parameter_of(probe.tap_of[site], site)
            if not _floats(parameter):
                raise NotImplementedError(f"{site} is stored as {parameter.dtype}, packed")
        except NotImplementedError as error:
            notes.setdefault(site.matrix, str(error))
            continue
        sites_of.setdefault(parameter, []).append(site)
    deltas = probe.deltas()
    for group in _groups(list(sites_of)):
        for parameter, gradient in zip(group, probe.gradients_of(group), strict=True):
            for site in sites_of[parameter]:
                flow, columns = probe.flow_of(site)
                x = as_rows(flow.x.detach())
                delta = deltas[site][:, columns]
                wide = torch.promote_types(x.dtype, torch.float32)
                said = x.to(wide).T @ delta.to(x.device, wide)
                _, live = parameter_of(probe.tap_of[site], site)
                own = _as_live(gradient, parameter, live).to(said)
                scale = own.norm().clamp_min(1e-30)
                same = said.shape == own.reshape(len(said), -1).shape
                error = float((said - own.reshape(said.shape)).norm() / scale) if same else 1.0
                errors.setdefault(site.matrix, {})[site] = error
    return errors, notes


def _as_live(gradient: Tensor | None, parameter: Tensor, live: Tensor) -> Tensor:
    """The gradient of a parameter, looked at as the weight in it is."""
    if gradient is None:
        return torch.zeros_like(live)
    alike = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device
    ).copy_(gradient)
    offset = live.storage_offset() - parameter.storage_offset()
    return alike.as_strided(live.shape, live.stride(), offset)


def _groups(parameters: list[Tensor]) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    for parameter in parameters:
        if groups[-1] and sum(one.nbytes for one in (*groups[-1], parameter)) > _BYTES:
            groups.append([])
        groups[-1].append(parameter)
    return groups


def _of_gradient(matrix: str, errors: dict[Site, float], note: str | None, limit: float) -> Finding:
    name = f"gradient of {matrix}"
    if not errors:
        why = note or "no token of the prompt reaches it"
        return Finding.skipped(name, f"{why}; the step below says what can be said")
    worst = max(errors, key=lambda site: errors[site])
    error = errors[worst]
    figures = f"off by {error:.1e} at most, of {len(errors)} ({worst})"
    ok = "x^T delta is the gradient of the weight that the model holds"
    fails = (
        "x^T delta is not the gradient of the stored weight: the layer quantises, rescales, adapts"
        " or shares it; norms, ranks and edits of this matrix are wrong, load plain linear layers"
    )
    return Finding.measured(name, figures, error, limit, ok=ok, fails=fails)


def steps(model: Any, batch: Batch, matrices: Sequence[str], layers: list[int]) -> list[Finding]:
    """Small steps along -delta at three layers of each matrix; and z against x W there."""
    taps, faults = {}, {}
    for matrix in matrices:
        try:
            every = find_taps(model, [matrix], layers)
            some = {_layer(every[0]), _layer(every[len(every) // 2]), _layer(every[-1])}
            taps[matrix] = [tap for tap in every if _layer(tap) in some]
        except (NotImplementedError, ValueError) as error:
            faults[matrix] = Finding.skipped(f"step at {matrix}", str(error))
    try:
        probe = Probe(model, [tap for several in taps.values() for tap in several], batch)
        probes = dict.fromkeys(taps, probe)
    except (NotImplementedError, ValueError):  # one of them cannot be read: each by itself
        probes = {}
        for matrix, several in taps.items():
            try:
                probes[matrix] = Probe(model, several, batch)
            except (NotImplementedError, ValueError) as error:
                faults[matrix] = Finding.skipped(f"step at {matrix}", str(error))
    return [faults[m] if m in faults else _step(probes[m], m) for m in matrices]


def _step(probe: Probe, matrix: str) -> Finding:
    name = f"step at {matrix}"
    own = [site for site in probe.sites if site.matrix == matrix]
    sites = [site for site in own if not isinstance(site.expert, int)]
    straight = [linearity(probe.tap_of[site], site, *probe.flow_of(site)) for site in own]
    if fault := next((figures.fault for figures in straight if figures.fault), None):
        return Finding(name, "fails", "z is not x times the weight", fault)
    if not sites:
        why = "experts are checked by their gradients alone: a step may change the routing"
        return Finding.skipped(name, why)
    try:
        steps = [probe.step(site) for site in sites]
    except UntrueGradientError as error:
        return Finding(name, "fails", "no gradient", str(error))
    ratios = [step.ratio for step in steps]
    shown = ", ".join("?" if ratio is None else f"{ratio:+.4f}" for ratio in ratios)
    where = ", ".join(str(site.layer) for site in sites)
    figures = f"{shown} of what ||delta|| says (layers {where})"
    if fault := next((step.fault for step in steps if step.fault), None):
        return Finding(name, "fails", figures, fault)
    decided = [abs(ratio - 1) for ratio in ratios if ratio is not None]
    if not decided:
        why = (
            "rounding or kinks (ReLU, routing) hide what a small step does, or it does nothing"
            " here; a model in float32 would tell"
        )
        return Finding(name, "not checked", figures, why)
    meaning = "a step along -delta lowers the loss by what ||delta|| says"
    return Finding(name, "ok", figures, meaning, max(decided), 0.1)


def _layer(tap: Any) -> int:
    return tap.layer if hasattr(tap, "layer") else tap.site.layer


def batch_alone(model: Any, matrices: Sequence[str], layers: list[int]) -> Finding:
    """Three prompts of different lengths, padded, against each of them alone."""
    if not matrices:
        return Finding.skipped("batch", _NOTHING)
    d_vocab = int(model.unembed.W_U.shape[1])
    ids = [int(part * d_vocab) for part in (0.13, 0.29, 0.47, 0.61, 0.83)]
    rows = [ids, ids[1:3], ids[2:5]]
    answers = [[ids[0]], [ids[3]], [ids[1]]]
    tokens, mask = (torch.zeros(len(rows), len(ids), dtype=torch.long) for _ in range(2))
    for at, row in enumerate(rows):
        tokens[at, : len(row)], mask[at, : len(row)] = torch.tensor(row), 1
    some = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    there = [m for m in matrices if any(_has(model, m, layer) for layer in some)]
    with undisturbed(model):
        together = capture(model, tokens, NLL(answers), there, some, attention_mask=mask)
        alone = [
            capture(model, torch.tensor([row]), NLL([answer]), there, some)
            for row, answer in zip(rows, answers, strict=True)
        ]
    error = max(_apart(together.for_prompt(at), one) for at, one in enumerate(alone))
    return Finding.measured(
        "batch",
        f"x and delta off by {error:.1e} at most, prompts of 5, 2 and 3 tokens",
        error,
        max(1e-3, 20 * torch.finfo(model.unembed.W_U.dtype).eps),
        ok="prompts read together give what each gives alone",
        fails="prompts touch one another (padding, or experts of limited capacity); read them one"
        " by one",
    )


def _has(model: Any, matrix: str, layer: int) -> bool:
    try:
        return bool(find_taps(model, [matrix], layer))
    except (ValueError, NotImplementedError):
        return False


def _apart(one: Gradients, other: Gradients) -> float:
    """The largest relative difference of an x or a delta."""
    worst = 0.0
    for site in other:
        if site not in one or len(one[site].x) != len(other[site].x):
            return 1.0
        for name in ("x", "delta"):
            a, b = getattr(one[site], name).double(), getattr(other[site], name).double()
            worst = max(worst, float((a - b).norm() / b.norm().clamp_min(1e-30)))
    return worst
