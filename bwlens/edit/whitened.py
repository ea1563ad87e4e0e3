"""Whitened shift: an edit in closed form, from one forward pass.

The forward pass shift writes under the key as it is, most of which is what every token brings. Here
it is averaged over a few contexts and whitened by statistics of text, the step solved for, and the
place is where attention hands over what it read of the subject: W_O.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from bwlens.changes.change import WeightChange
from bwlens.data.given import Edits, as_edits
from bwlens.edit._memit import normal_rows
from bwlens.edit.direction import before_norm, in_its_dtype, token_directions
from bwlens.edit.given import first_only_note, number, texts_of
from bwlens.edit.keys import Contexts, KeyPass, contexts_of, passed_by
from bwlens.edit.known import known_note
from bwlens.edit.statistics import Statistics, statistics_for
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.head import Head, head_of
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.prompts import Edit
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, resolve_layers

PREFIXES = ("People say that", "Once upon a time, there was.")
"""Contexts that say nothing of any subject, tuned on the demo model's even records."""

_SHARE = 0.25  # Of the layers, from the top: 6 and 7 of 8.


@one_thread_at_a_time
def whitened_shift(
    model: LensModel,
    edits: Edits,
    *,
    layers: Layers = None,
    matrix: str = "W_O",
    margin: float = 8.0,
    tokens: Literal["first", "all"] = "all",
    prefixes: Sequence[str] = PREFIXES,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    prepend_bos: bool | None = None,
) -> WeightChange:
    """Write the new answer over the old one, under a whitened key, in one forward pass.

    In each layer l, `W_l += sum_i outer(u_li, v_i)`, one row an edit, with

    - `u_l = C_l^-1 k_l / (k_l^T C_l^-1 k_l)`: k_l is what enters W_l at the prompt's last token,
      its mean over the prompt by itself and behind the prefixes, C_l its second moment over text.
      Of all u with `u . k_l = 1` this one answers least to the text's tokens. Several edits are
      solved for together, `u_i . k_j = [i = j]`.
    - `v = step * d`, `d = P(g * (W_U[:, new] - W_U[:, old])) / s`: the gradient of the logit
      difference new - old at the final norm, with the norm's scale s (mean over the contexts)
      held fixed; g is its gain, P takes the mean off where the norm does.
    - `step = (gap + margin) / (n_layers * ||d||^2)`: by the direct path to the vocabulary, the
      difference then becomes `margin`; gap is the present difference old - new, its mean over the
      contexts.

    One forward pass of `1 + len(prefixes)` prompts. Later layers' own answer and the final norm's
    change of scale are left out, which the margin has to cover.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        edits: One edit or several. The old answer is `target_true` or, without it, what the model
            says.
        layers: Which layers; None takes the top quarter (6 and 7 of 8).
        matrix: "W_O", or "W_out" for the MLP's (on the demo model worse: more neighbours change).
        margin: What the logit difference shall be, in nats; more carries over to more paraphrases
            and to more neighbours.
        tokens: Of a target of several tokens write "all", each with a key of its own where it is
            predicted, the target teacher forced, over what the model says there; or the "first"
            alone, which a warning and the change's note say.
        prefixes: Contexts to average over; () takes the prompt alone, which loses paraphrases.
        statistics: Of the matrix' keys in these layers (`key_statistics(..., matrix="W_O")`), or
            their file. None takes the demo model's.
        prepend_bos: None is the model's own default.

    Returns:
        The change. `details` hold gaps and steps, of every token in turn; `note` the edits left
        out as known already.

    Raises:
        ValueError: A malformed argument, a new and old answer that begin with the same token,
            statistics missing or of another model.
        NotImplementedError: A mixture of experts with `matrix="W_out"`, or a model out of scope.

    Source: this project. Parts: Backward Lens, section 6 (the shift); ROME, equation 2 (the key).

    Example:
        >>> edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
        >>> change = whitened_shift(model, edit)  # doctest: +SKIP
    """
    listed = as_edits(edits)
    if matrix not in ("W_O", "W_out"):
        raise ValueError(f"matrix must write to the stream, 'W_O' or 'W_out', found {matrix!r}")
    if tokens not in ("first", "all"):
        raise ValueError(f"tokens must be 'first' or 'all', found {tokens!r}")
    margin = number(margin, "margin", "a finite number of nats")
    prefixes = texts_of(prefixes, "prefixes")
    n_layers = len(model.blocks)
    top = range(n_layers - max(1, round(_SHARE * n_layers)), n_layers)
    chosen = resolve_layers(model, top if layers is None else layers)
    sites = [Site(matrix, layer) for layer in chosen]
    whiteners = statistics_for(model, sites, statistics)
    contexts = contexts_of(model, listed, prefixes, "last", prepend_bos)
    passed = passed_by(model, contexts.batch, [matrix], chosen)
    answers = _Answers.of(model, listed, contexts, passed, tokens)
    kept = [i for i, known in enumerate(answers.known) if not known]
    steps = (answers.gap + margin) / (len(sites) * answers.rows.square().sum(-1))
    values = (steps[:, None] * answers.rows)[kept] / _residual_scale(model)
    parts, centred = {}, head_of(model).centred
    for site in sites if kept else ():
        keys = contexts.at(passed.x[site], answers.places).mean(1)[kept]
        sizes = contexts.at(passed.z[site], answers.places).mean(1)[kept]
        delta = _written(passed.norms.get(site), values, sizes, centred)
        x = normal_rows(whiteners[site], keys, weight=0.0)
        parts[site] = LowRankMatrix(x.to(delta), delta.to(x.device))
    details = {
        "method": "whitened_shift",
        "layers": chosen,
        "matrix": matrix,
        "tokens": tokens,
        "gap": answers.gap.tolist(),
        "step": steps.tolist(),
        "forward_passes": 1,
        "prompts": len(contexts.batch),
    }
    several = [len(contexts.batch.targets[i * contexts.n]) > 1 for i in range(len(listed))]
    whole = answers.whole(len(listed))
    cut = [tokens == "first" and more and not w for more, w in zip(several, whole, strict=True)]
    notes = [known_note(listed, whole), first_only_note(listed, cut)]
    return WeightChange(parts, "; ".join(filter(None, notes)), details)


@dataclass(frozen=True, eq=False)
class _Answers:
    """What is written over what, token by token: the first of each target, and those after it.

    Attributes:
        places: Of each token the edit, and its place in the target.
        known: Which of them the model says already.
        gap: How far each is behind the old answer.
        rows: The direction in which the difference grows.
    """

    places: list[tuple[int, int]]
    known: list[bool]
    gap: Float[Tensor, " tokens"]
    rows: Float[Tensor, "tokens d_model"]

    def whole(self, n_edits: int) -> list[bool]:
        """Which edits have nothing left to be written."""
        left = {edit for (edit, _), known in zip(self.places, self.known, strict=True) if not known}
        return [edit not in left for edit in range(n_edits)]

    @staticmethod
    def of(
        model: LensModel, edits: list[Edit], contexts: Contexts, passed: KeyPass, tokens: str
    ) -> _Answers:
        head = head_of(model)
        targets = [contexts.batch.targets[i * contexts.n] for i in range(len(edits))]
        written = [ids[:1] if tokens == "first" else ids for ids in targets]
        places = [(i, k) for i, ids in enumerate(written) for k in range(len(ids))]
        new = [written[i][k] for i, k in places]
        answers = contexts.at(passed.logits, places)[:, 0].argmax(-1).tolist()
        old = [
            answer if k else _old(model, edits[i], answer)
            for (i, k), answer in zip(places, answers, strict=True)
        ]
        known = [answer == target for answer, target in zip(answers, new, strict=True)]
        for (i, _), known_, a, b in zip(places, known, new, old, strict=True):
            if a == b and not known_:
                raise ValueError(
                    f"{edits[i].target_new!r} and {edits[i].target_true!r} begin with the same"
                    f" token, so writing the first token of the one over that of the other changes"
                    f" nothing"
                )
        if passed.final is None:
            raise NotImplementedError("this model has no final norm to take the stream before")
        stream = contexts.at(passed.final, places)
        read = head.scale * head.W_U.to(stream)
        normed = head.norm(stream.flatten(0, 1)[:, None].to(head.W_U.dtype))[:, 0].to(stream)
        difference = read[:, old].T - read[:, new].T
        gap = (normed.unflatten(0, (-1, contexts.n)) * difference[:, None]).sum(-1).mean(1)
        if head.b_U is not None:
            gap = gap + head.scale * (head.b_U[old] - head.b_U[new]).to(gap)
        rows = token_directions(model, new, "folded") - token_directions(model, old, "folded")
        return _Answers(
            places, known, gap.detach(), head.scale * rows / _scale(head, stream)[:, None]
        )


def _old(model: LensModel, edit: Edit, answer: int) -> int:
    """The first token of the old answer: the one given, or the model's own."""
    if edit.target_true is None:
        return answer
    from bwlens.model.prompts import make_batch

    return make_batch(model, edit.text, edit.target_true).targets[0][0]


def _scale(head: Head, stream: Float[Tensor, "edits n d"]) -> Float[Tensor, " edits"]:
    """What the final norm divides by, its mean over the contexts."""
    if head.centred:
        stream = stream - stream.mean(-1, keepdim=True)
    return (stream.square().mean(-1) + head.eps).sqrt().mean(1)


def _residual_scale(model: LensModel) -> float:
    """What a sublayer's output is multiplied with on its way into the stream (Granite)."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return float(getattr(config, "residual_multiplier", None) or 1.0)


def _written(
    norm: nn.Module | None,
    values: Float[Tensor, "n d"],
    outputs: Float[Tensor, "n d"],
    centred: bool,
) -> Float[Tensor, "n d"]:
    """What to write for the stream to move by the values, where a norm may come in between.

    A norm after the sublayer divides by its output's size, taken as it was, and multiplies by its
    gain; both are undone.
    """
    if norm is None:
        return values
    outputs = outputs - outputs.mean(-1, keepdim=True) if centred else outputs
    size = outputs.square().mean(-1, keepdim=True).sqrt()
    return size * before_norm(in_its_dtype(norm), values)
