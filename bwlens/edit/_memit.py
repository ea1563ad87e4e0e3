"""MEMIT: many facts at once, their residual spread over several W_out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.data.given import Edits, as_edits
from bwlens.edit.given import number
from bwlens.edit.keys import Position
from bwlens.edit.known import open_edits
from bwlens.edit.spread import range_of, spread
from bwlens.edit.statistics import KeyStatistics, Statistics, statistics_for
from bwlens.edit.value import ValueSearch, ValueSettings
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site

_WEIGHT, _WIDTH = 20_000, 6_400  # lambda there, and the width of its keys.


@one_thread_at_a_time
def memit(
    model: LensModel,
    edits: Edits,
    *,
    layers: Layers = None,
    weight: float | None = None,
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
    """Mass-Editing Memory in a Transformer: all edits at once, over a range of layers.

    For each edit a target `z = h + shift` of the stream after the last layer L of the range, at
    the subject's last token, is found by Adam as in ROME. Then, from the lowest layer l up, with
    the layers below already changed: K [edits, d_in] are the keys (means over the prefixes), R
    [edits, d_model] what is still missing of z, divided by the L - l + 1 layers left, and

        W_l += D,  D = (weight * C + K^T K)^-1 K^T R

    the minimiser of `||K D - R||^2 + weight * tr(D^T C D)`. Edits known already are left out, which
    the `note` says.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        edits: One edit or several; those in one call are made together.
        layers: The range; None takes 13/47 to 17/47 of the depth (13-17 of GPT-2 xl, 1-2 of 8).
        weight: lambda, how much the text's keys count against the edits', in tokens. None takes
            the paper's 20,000 for keys 6,400 wide in proportion to their width, as a typical
            key's `k^T C^-1 k` is its width.
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
        The change, a row for each edit and layer. `details` hold the losses of each edit and the
        mean norm of what was missing before each layer and, last, of what still is.

    Raises:
        ValueError: A malformed argument, statistics missing or of another model, or a loss that is
            not finite.
        NotImplementedError: A mixture of experts, or a model out of scope.

    Source: Meng et al., "Mass-Editing Memory in a Transformer", ICLR 2023, section 4. Where a norm
        follows the MLP (Gemma 2, OLMo 2) the spreading is only approximate.

    Example:
        >>> edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
        >>> change = memit(model, [edit], layers=[3, 4, 5], position="last")  # doctest: +SKIP
    """
    listed = as_edits(edits)
    settings = ValueSettings(steps, lr, kl_factor, weight_decay, clamp)
    search = ValueSearch(settings, prefixes, position, prepend_bos)
    if weight is not None and not number(weight, "weight") > 0:
        raise ValueError(f"weight is {weight}; expected a number of tokens > 0")
    sites = range_of(model, layers)
    whiteners = statistics_for(model, sites, statistics)
    listed, note = open_edits(model, listed, prepend_bos)
    details: dict[str, Any] = {"method": "memit", "layers": [site.layer for site in sites]}
    if not listed:
        return WeightChange(note=note, details=details)

    def rows(site: Site, keys: Tensor) -> Tensor:
        tokens = _WEIGHT * keys.shape[1] / _WIDTH if weight is None else weight
        return normal_rows(whiteners[site], keys, tokens)

    search = replace(search, prefixes=search.before(model))
    values = search.values(model, listed, sites[-1], of_stream=True)
    shifts = torch.stack([value.delta for value in values])
    change, spreading = spread(model, listed, sites, search, shifts, rows)
    details |= {"losses": [value.losses for value in values], **spreading}
    return WeightChange(change.parts, note, details)


def normal_rows(
    statistics: KeyStatistics, keys: Float[Tensor, "edits d_in"], weight: float
) -> Float[Tensor, "edits d_in"]:
    """Rows X with `X^T = (weight * C + K^T K)^-1 K^T`, out of a system as large as the edits.

    By the push-through identity `X = (weight * 1 + K C^-1 K^T)^-1 K C^-1`. With `weight` 0 and
    independent keys, `X K^T = 1`: each row answers to its own key alone.
    """
    whitened = statistics.whitened(keys)
    gram = whitened @ keys.double().T
    gram = (gram + gram.T) / 2 + weight * torch.eye(len(keys)).to(gram)
    return torch.linalg.solve(gram, whitened)
