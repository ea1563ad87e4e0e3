"""ROME: one fact as one key and one value in one W_out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from bwlens.changes.change import WeightChange
from bwlens.data.given import Edits, as_edits
from bwlens.edit._where import layer_for
from bwlens.edit.keys import Position
from bwlens.edit.known import open_edits
from bwlens.edit.statistics import Statistics, statistics_for
from bwlens.edit.value import ValueSearch, ValueSettings
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site, resolve_layer

_DEPTH = 17 / 47  # Layer 17 of 0 to 47 in the paper's GPT-2 xl.


@one_thread_at_a_time
def rome(
    model: LensModel,
    edits: Edits,
    *,
    layer: int | None = None,
    steps: int = 20,
    lr: float = 0.5,
    kl_factor: float = 0.0625,
    weight_decay: float = 0.5,
    clamp: float = 4.0,
    prefixes: Sequence[str] | None = None,
    position: Position = "subject",
    keys: Literal["mean", "plain", "mixed"] = "mean",
    statistics: Statistics | str | os.PathLike[str] | None = None,
    prepend_bos: bool | None = None,
) -> WeightChange:
    """Rank-One Model Editing: store the value v* under the key k* in one W_out.

    `W' = W + outer(u, v* - k* W)`, `u = C^-1 k* / (k*^T C^-1 k*)`: of all changes with
    `k* W' = v*` the one that is smallest on the text's keys, `tr(D^T C D)`.

    - k* is the mean of what enters W_out at the subject's last token, over the prompt by itself
      and behind each of the prefixes (but see `keys`).
    - v* is W_out's mean output there (its bias left out) plus a shift found by Adam: the target's
      mean NLL over these prompts, plus the KL divergence from the original model after
      "{subject} is a", plus weight decay, the shift's norm clamped (`ValueSettings`).

    Several edits are made one after the other, each on the model with those before it. Edits known
    already are left out, which the `note` says. The defaults are those of GPT-2 xl; the demo model
    takes nine facts in ten at `layer=3, position="last"`, two in five at `layer=0`.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        edits: One edit, or several to make in turn.
        layer: Which W_out; None takes what `where` measured for this model or, where it did not,
            17/47 of the depth (17 of GPT-2 xl's 48, 2 of 8).
        steps: Of Adam; these five are explained in `ValueSettings`.
        lr: See there.
        kl_factor: See there.
        weight_decay: See there.
        clamp: See there; in norms of W_out's output at the plain prompt.
        prefixes: Texts before the prompt. None draws twenty from the model, the same always; ()
            takes the prompt alone.
        position: Where the key stands: the "subject"'s last token, or the prompt's "last".
        keys: Which key k* is, and at which the value is reached. "mean" over the prompt by itself
            and behind the prefixes for both, as in the paper's equations and in r-ROME; the
            "plain" prompt's for both (p-ROME); "mixed" as in the authors' code, which whitens the
            mean and divides by the plain prompt's: `u = C^-1 k_mean / (k_plain^T C^-1 k_mean)`.
            With "mean" the plain prompt's output moves by somewhat less than the shift (SmolLM2:
            by .7 to .96 of it).
        statistics: Of W_out's keys (`key_statistics`), or their file. None takes the demo model's.
        prepend_bos: None is the model's own default.

    Returns:
        The change, a row an edit. `details` hold the losses before each step and after the last.

    Raises:
        ValueError: A malformed argument, statistics missing or of another model, or a loss that is
            not finite.
        NotImplementedError: A mixture of experts, or a model out of scope.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, equations
        2-4. Gupta et al., "Rebuilding ROME", EMNLP 2024, on what the keys' mixture does to edits
        in turn.

    Example:
        >>> edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
        >>> change = rome(model, edit, layer=3, position="last")  # doctest: +SKIP
    """
    listed = as_edits(edits)
    if keys not in ("mean", "plain", "mixed"):
        raise ValueError(f"keys must be 'mean', 'plain' or 'mixed', found {keys!r}")
    settings = ValueSettings(steps, lr, kl_factor, weight_decay, clamp)
    search = ValueSearch(settings, prefixes, position, prepend_bos)
    default = layer_for(model, position, int(_DEPTH * (len(model.blocks) - 1)))
    site = Site("W_out", default if layer is None else resolve_layer(model, layer))
    whitener = statistics_for(model, [site], statistics)[site]
    listed, note = open_edits(model, listed, prepend_bos)
    before = search.before(model) if listed else ()
    change, losses = WeightChange(), []
    for edit in listed:
        with change.applied(model):
            (value,) = replace(search, prefixes=before).values(model, [edit], site)
        losses.append(value.losses)
        whitened = whitener.whitened((value.plain_key if keys == "plain" else value.key)[None])
        reached = value.key if keys == "mean" else value.plain_key
        u = whitened / (whitened @ reached.double())
        rows = LowRankMatrix(u.to(value.delta), value.delta[None])
        change = change + WeightChange({site: rows})
    details = {
        "method": "rome",
        "layer": site.layer,
        "keys": keys,
        "losses": losses,
        "prefixes": before,
    }
    return WeightChange(change.parts, note, details)
