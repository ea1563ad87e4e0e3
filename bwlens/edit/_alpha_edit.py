"""AlphaEdit: MEMIT's spreading, written only where the text's keys are all but absent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.data.given import Edits, as_edits
from bwlens.edit.given import number
from bwlens.edit.keys import Position
from bwlens.edit.known import open_edits
from bwlens.edit.spread import Places, range_of, spread
from bwlens.edit.statistics import KeyStatistics, Statistics, statistics_for
from bwlens.edit.value import ValueSearch, ValueSettings
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site

_SPANS: WeakKeyDictionary[KeyStatistics, tuple[Tensor, Tensor]] = WeakKeyDictionary()


@one_thread_at_a_time
def alpha_edit(
    model: LensModel,
    edits: Edits,
    *,
    previous: Edits | None = None,
    layers: Layers = None,
    threshold: float = 1.0,
    ridge: float = 0.1,
    steps: int = 20,
    lr: float = 0.5,
    kl_factor: float = 0.0625,
    weight_decay: float = 0.5,
    clamp: float = 0.75,
    prefixes: Sequence[str] | None = None,
    position: Position = "subject",
    statistics: Statistics | str | os.PathLike[str] | None = None,
    prepend_bos: bool | None = None,
) -> WeightChange:
    """Edit in the null space of the text's keys, over a range of layers.

    Values and their spreading are MEMIT's (`memit`). With P the projection on the eigenvectors of
    C, the second moment of the text's keys, whose eigenvalues are below the threshold; K [n, d_in]
    the edits' keys, K_p those of earlier edits, and R [n, d_model] what is missing in a layer:

        W += D,  D = (P (K^T K + K_p^T K_p) + lambda I)^-1 P K^T R

    so that a key k with `k P = 0` gives what it gave, `k D = 0`, and the earlier edits' keys as
    nearly as lambda allows. Edits known already are left out, which the `note` says.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        edits: One edit or several; those in one call are made together.
        previous: Edits that the model has had before, to be kept.
        layers: As for `memit`.
        threshold: Eigenvalues below this share of their mean belong to the null space.
        ridge: lambda, as a share of the mean `||k P||^2` of the edits' keys.
        steps: Of Adam; these five are explained in `ValueSettings`.
        lr: See there.
        kl_factor: See there.
        weight_decay: See there.
        clamp: See there; in norms of the stream h.
        prefixes: As for `rome`.
        position: Where the keys stand: the "subject"'s last token, or the prompts' "last".
        statistics: Of W_out's keys in these layers, or their file. None takes the demo model's.
        prepend_bos: None is the model's own default.

    Returns:
        The change, a row for each edit and layer. `details` as of `memit`, and the dimension of the
        null space in each layer.

    Raises:
        ValueError: A malformed argument, an empty null space, statistics missing or of another
            model, or a loss that is not finite.
        NotImplementedError: A mixture of experts, or a model out of scope.

    Source: Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
        ICLR 2025 (arXiv 2410.02355). There the threshold is 0.02 and lambda 1 or 10 in the units
        of the keys' squares, which differ between models: on SmolLM2 0.02 is 1.1 to 1.9 of the
        eigenvalues' mean. Its keys fill their whole width, so its null space is none in the
        strict sense: below the mean lie 80 % of the directions and 28 % of the text's squares.

    Example:
        >>> edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
        >>> change = alpha_edit(model, [edit], layers=[3, 4], position="last")  # doctest: +SKIP
    """
    listed = as_edits(edits)
    before = [] if previous is None else as_edits(previous)
    for name, value in (("threshold", threshold), ("ridge", ridge)):
        if not number(value, name) > 0:
            raise ValueError(f"{name} is {value}; expected a share > 0")
    settings = ValueSettings(steps, lr, kl_factor, weight_decay, clamp)
    search = ValueSearch(settings, prefixes, position, prepend_bos)
    sites = range_of(model, layers)
    whiteners = statistics_for(model, sites, statistics)
    spans = {site: null_space(whiteners[site], threshold) for site in sites}
    listed, note = open_edits(model, listed, prepend_bos)
    details: dict[str, Any] = {
        "method": "alpha_edit",
        "layers": [site.layer for site in sites],
        "dimensions": [span.shape[1] for span in spans.values()],
    }
    if not listed:
        return WeightChange(note=note, details=details)
    search = replace(search, prefixes=search.before(model))
    earlier = Places(model, before, search, sites[-1].layer) if before else None

    def rows(site: Site, keys: Tensor) -> Tensor:
        more = [] if earlier is None else [earlier.passed(site)[0]]
        return projected_rows(spans[site], torch.cat([keys, *more]), ridge, len(keys))

    values = search.values(model, listed, sites[-1], of_stream=True)
    shifts = torch.stack([value.delta for value in values])
    change, spreading = spread(model, listed, sites, search, shifts, rows)
    details |= {"losses": [value.losses for value in values], **spreading}
    return WeightChange(change.parts, note, details)


def null_space(statistics: KeyStatistics, threshold: float) -> Float64[Tensor, "d_in n"]:
    """Orthonormal columns U, `P = U U^T`: where the text's keys are below the threshold.

    Raises:
        ValueError: No eigenvalue is below it.
    """
    if statistics not in _SPANS:
        _SPANS[statistics] = torch.linalg.eigh(statistics.second_moment.double())
    sizes, vectors = _SPANS[statistics]
    span = vectors[:, sizes < threshold * sizes.mean()]
    if not span.shape[1]:
        raise ValueError(
            f"threshold is {threshold}, and no eigenvalue of {statistics.site}'s keys is below this"
            f" share of their mean: the least is at {float(sizes[0] / sizes.mean()):.2g}; raise it"
        )
    return span


def projected_rows(
    span: Float64[Tensor, "d_in n"], keys: Float[Tensor, "m d_in"], ridge: float, edits: int
) -> Float64[Tensor, "edits d_in"]:
    """Rows X with `X^T = (P K^T K + lambda I)^-1 P K^T`, of the first keys.

    The others write nothing. By the push-through identity `X = (K P K^T + lambda I)^-1 K P`, a
    system as large as the keys.
    """
    inside = keys.double() @ span.to(keys.device)
    gram = inside @ inside.T
    weight = ridge * gram.diagonal()[:edits].mean()
    solved = torch.linalg.solve(gram + weight * torch.eye(len(gram)).to(gram), inside)
    return (solved @ span.T.to(keys.device))[:edits]
