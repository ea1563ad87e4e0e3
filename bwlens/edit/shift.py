"""Forward pass shift: an edit with one forward pass and no gradient.

The gradient of the last W_out at the last token is, up to a factor, the target's embedding
(Backward Lens, section 5), so it can be written without computing it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.data.given import Edits, as_edits
from bwlens.edit.direction import (
    Direction,
    before_norm,
    check_direction,
    in_its_dtype,
    token_directions,
)
from bwlens.edit.given import first_only_note, number
from bwlens.edit.keys import Position, check_position, norm_after, norm_entries
from bwlens.edit.known import answered, known_note
from bwlens.edit.smallest import smallest_steps
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.flows import as_rows
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.passes import run, wide
from bwlens.model.prompts import Batch, Edit, make_batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site, find_taps, resolve_layer
from bwlens.model.tokens import subject_positions

_DEPTH = 35 / 47  # Layer 35 of 0 to 47 in the paper's GPT-2 xl.
_WITHIN = 1.05  # The chosen step is at most this much above one that fails.
_MOST = 24  # Doublings or halvings of the first guess before giving up.


@one_thread_at_a_time
def forward_pass_shift(
    model: LensModel,
    edits: Edits,
    *,
    layer: int | None = None,
    lr: float | None = None,
    margin: float = 1.0,
    position: Position = "last",
    tokens: Literal["first", "all"] | None = None,
    direction: Direction = "unembedding",
    prepend_bos: bool | None = None,
) -> WeightChange:
    """Write the target's direction into one W_out, at the key the prompt itself gives.

    `W_out[layer] += lr * sum_i outer(x_i, v_i)`, one row an edit: x_i is what enters W_out at the
    prompt's last token, v_i the target's vector (`token_directions`), divided by the gain of a norm
    that follows the MLP. There the MLP's output moves by `lr * ||x||^2 * v`. In a mixture, the
    experts that the token is sent to are written. Edits known already are left out.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        edits: One edit or several. Several are written together, so close keys add up.
        layer: Which W_out; None takes 35/47 of the depth (35 of GPT-2 xl's 48, 5 of 8).
        lr: The step (the paper's: 0.24). None finds for each edit the smallest one, within 5 %,
            that makes the target the argmax, in 6 to 12 passes mostly. Several edits are then tried
            together, and steps raised where they fail so.
        margin: What a step that was found is multiplied with: 1.2 carries over to far more
            paraphrases than 1, at the cost of some neighbours.
        position: Write at the key of the prompt's "last" token, or of the "subject"'s last.
        tokens: Of a target of several tokens write "all", each where it is predicted, the target
            teacher forced, or the "first" alone, as the paper, which a warning and the change's
            note say. None writes all at position "last" and the first at "subject".
        direction: Which vector stands for a token, see `token_directions`.
        prepend_bos: None is the model's own default.

    Returns:
        The change. `details` hold the layer, each edit's step and the number of forward passes;
        `note` the edits left out as known or as no step makes them work, and those that fail beside
        the others.

    Raises:
        ValueError: A malformed argument, or a step that is not finite.
        NotImplementedError: A model out of scope, named in the message.

    Source: Backward Lens, section 6 and Table 1.

    Example:
        >>> edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
        >>> change = forward_pass_shift(model, edit, layer=5, lr=0.2)  # doctest: +SKIP
        >>> with change.applied(model):  # doctest: +SKIP
        ...     model.to_string(model("Lionel Messi plays for")[0, -1].argmax())
        ' Paris'
    """
    listed = as_edits(edits)
    tokens = tokens or ("all" if position == "last" else "first")
    _check_settings(lr, position, tokens, direction)
    if not number(margin, "margin") >= 1:
        raise ValueError(f"margin is {margin}; expected 1 or more")
    layer = default_layer(model) if layer is None else resolve_layer(model, layer)
    batch, more = _batch(model, listed, tokens, prepend_bos)
    keys = _keys(model, listed, batch, position, prepend_bos)
    seen = _pass(model, batch, layer, keys)
    ids = [token for targets in batch.targets for token in targets]
    rows = before_norm(seen.norm, token_directions(model, ids, direction))
    plan = _Plan(batch, keys, seen.inputs, rows)
    known = answered(seen.logits, batch)
    open_ = [i for i, is_known in enumerate(known) if not is_known]
    passes, failing = 1, []
    if lr is None:
        search = _Search(model, plan, seen.moved)
        steps, failing = search.steps(open_)
        passes += search.passes
        steps = {i: margin * step for i, step in steps.items()}
    else:
        steps = dict.fromkeys(open_, lr)
    details = {
        "method": "forward_pass_shift",
        "layer": layer,
        "lr": [steps.get(i, 0.0) for i in range(len(listed))],
        "position": position,
        "tokens": tokens,
        "direction": direction,
        "forward_passes": passes,
    }
    lost = [i for i in open_ if i not in steps]
    change = plan.change([steps.get(key.edit, 0.0) for key in keys])
    cut = [is_cut and not is_known for is_cut, is_known in zip(more, known, strict=True)]
    notes = [_note(listed, known, lost, failing), first_only_note(listed, cut)]
    return replace(change, note="; ".join(filter(None, notes)), details=details)


def default_layer(model: LensModel) -> int:
    """The layer at 35/47 of the model's depth: 35 of GPT-2 xl's 48, 5 of the demo model's 8."""
    return int(_DEPTH * (len(model.blocks) - 1))


@dataclass(frozen=True)
class _Key:
    """Where a row is read: which edit, at which position of its prompt."""

    edit: int
    pos: int


@dataclass(frozen=True, eq=False)
class _Pass:
    """What one forward pass showed.

    `inputs` gives for each site the rows of x and which key each belongs to; `moved` the size of
    the MLP's output at each key, in units of what a step of 1 adds there.
    """

    logits: Tensor
    inputs: dict[Site, tuple[Tensor, list[int]]]
    norm: Any
    moved: list[float]


@dataclass(frozen=True, eq=False)
class _Plan:
    """All that is written, but for the steps."""

    batch: Batch
    keys: list[_Key]
    inputs: dict[Site, tuple[Tensor, list[int]]]
    rows: Tensor

    def change(self, steps: Sequence[float]) -> WeightChange:
        """The change with these steps, one for each key."""
        parts = {}
        for site, (x, owners) in self.inputs.items():
            kept = [i for i, owner in enumerate(owners) if steps[owner]]
            if kept:
                which = torch.tensor([owners[i] for i in kept], device=self.rows.device)
                scale = torch.tensor([steps[owners[i]] for i in kept]).to(self.rows)
                delta = (scale[:, None] * self.rows[which]).to(x.device)
                parts[site] = LowRankMatrix(x[kept].to(delta), delta)
        return WeightChange(parts)


def _check_settings(lr: float | None, position: str, tokens: str, direction: str) -> None:
    wanted = "a finite step other than 0, or None to find one"
    if lr is not None and number(lr, "lr", wanted) == 0:
        raise ValueError(f"lr is {lr}; expected {wanted}")
    check_position(position)
    if tokens not in ("first", "all"):
        raise ValueError(f"tokens must be 'first' or 'all', found {tokens!r}")
    check_direction(direction)
    if tokens == "all" and position != "last":
        raise ValueError(
            "tokens='all' writes at the positions that predict the target's tokens; it goes with"
            " position='last'"
        )


def _batch(
    model: LensModel, edits: list[Edit], tokens: str, prepend_bos: bool | None
) -> tuple[Batch, list[bool]]:
    """The prompts with the tokens that are written, and of which edits there are more."""
    prompts = [edit.text for edit in edits]
    batch = make_batch(model, prompts, [edit.target_new for edit in edits], prepend_bos=prepend_bos)
    more = [tokens == "first" and len(ids) > 1 for ids in batch.targets]
    if any(more):
        first = [ids[:1] for ids in batch.targets]
        batch = make_batch(model, prompts, first, prepend_bos=prepend_bos)
    return batch, more


def _keys(
    model: LensModel, edits: list[Edit], batch: Batch, position: str, prepend_bos: bool | None
) -> list[_Key]:
    """One key for each token of each target, edit by edit."""
    keys = []
    for i, (edit, last) in enumerate(zip(edits, batch.last.tolist(), strict=True)):
        if position == "subject":
            last = subject_positions(model, edit.text, edit.subject, prepend_bos, edit.start)[-1]
        keys += [_Key(i, last + k) for k in range(len(batch.targets[i]))]
    return keys


def _pass(model: LensModel, batch: Batch, layer: int, keys: list[_Key]) -> _Pass:
    """One forward pass without gradients: the answers, and what enters W_out at the keys."""
    entries = norm_entries(model, [layer])[layer]
    passed = run(model, batch.tokens, taps=find_taps(model, "W_out", layer), points=entries)
    n_pos = batch.tokens.shape[1]
    inputs: dict[Site, tuple[Tensor, list[int]]] = {}
    moved = [0.0] * len(keys)
    for flow in passed.flows:
        x, z = as_rows(flow.x), as_rows(flow.z)
        at = list(range(len(x))) if flow.tokens is None else flow.tokens.tolist()
        row_of = {token: row for row, token in enumerate(at)}
        owned = [(row_of.get(key.edit * n_pos + key.pos), i) for i, key in enumerate(keys)]
        here = [(row, owner) for row, owner in owned if row is not None]
        if not here:
            continue
        rows = wide(x[[row for row, _ in here]])
        sizes = z[[row for row, _ in here]].float().norm(dim=1) / rows.norm(dim=1).square()
        for (_, owner), size in zip(here, sizes.tolist(), strict=True):
            moved[owner] = max(moved[owner], size)
        for site, _columns in flow.parts:
            if site.matrix == "W_out":
                inputs[site] = rows, [owner for _, owner in here]
    after = norm_after(entries, passed, passed.flows)
    return _Pass(passed.logits, inputs, None if after is None else in_its_dtype(after), moved)


def _note(edits: list[Edit], known: list[bool], lost: list[int], failing: list[int]) -> str:
    said = [known_note(edits, known)] if any(known) else []
    said += [
        f"no step makes {edits[i].target_new!r} the answer to {edits[i].text!r} here, left out"
        for i in lost
    ]
    said += [
        f"{edits[i].target_new!r} is not the answer to {edits[i].text!r} beside the other edits"
        for i in failing
    ]
    return "; ".join(said)


class _Search:
    """The smallest step of each edit that makes its target the answer."""

    def __init__(self, model: LensModel, plan: _Plan, moved: list[float]) -> None:
        self._model, self._plan, self.passes = model, plan, 0
        # The first guess adds as much as the MLP's output is long.
        self._first: dict[int, float] = {}
        sizes = plan.rows.norm(dim=1).clamp(min=1e-12).tolist()
        for key, size, length in zip(plan.keys, sizes, moved, strict=True):
            self._first[key.edit] = (length or 1.0) / size

    def steps(self, edits: list[int]) -> tuple[dict[int, float], list[int]]:
        """A step for each of the edits that has one, and the edits that fail beside the others."""
        steps = {i: step for i in edits if not math.isnan(step := self._alone(i))}
        failing = self._failing(steps) if len(steps) > 1 else []
        for _ in range(_MOST):
            if not failing:
                break
            steps |= {i: steps[i] * _WITHIN**2 for i in failing}
            failing = self._failing(steps)
        return steps, failing

    def _alone(self, edit: int) -> float:
        """The step of one edit by itself; nan where there is none."""
        batch = self._plan.batch.only(edit)
        first = torch.tensor([self._first[edit]], dtype=torch.float64)

        def works(steps: Tensor) -> Tensor:
            return torch.tensor(self._works({edit: float(steps)}, batch))

        return float(smallest_steps(works, first, within=_WITHIN, most=_MOST))

    def _failing(self, steps: dict[int, float]) -> list[int]:
        works = self._works(steps, self._plan.batch)
        return [i for i in steps if not works[i]]

    def _works(self, steps: dict[int, float], batch: Batch) -> list[bool]:
        """Whether the answers of a batch are the targets with these steps applied."""
        self.passes += 1
        change = self._plan.change([steps.get(key.edit, 0.0) for key in self._plan.keys])
        with change.applied(self._model):
            return answered(run(self._model, batch.tokens).logits, batch)
