"""`read_change`: from a change of weights to what it says, with what chance would say beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bwlens.changes.adapters import Adapters
from bwlens.changes.change import WeightChange
from bwlens.changes.lens import KEPT, READINGS, ChangeLens
from bwlens.changes.prompts import PROMPTS, ChangeEffect, effect_of, inputs_of
from bwlens.changes.reading import (
    SIDES,
    Directions,
    Side,
    Usual,
    chances,
    directions_of,
    oriented,
    random_change,
    read_side,
)
from bwlens.changes.taking import as_change
from bwlens.lens.asking import whole_number
from bwlens.model.identity import model_label
from bwlens.model.prompts import Prompts, make_batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, resolve_layers, resolve_matrices
from bwlens.model.tokens import first_token, token_texts
from bwlens.model.weights import weights_of
from bwlens.reading.standardised import head_by


def read_change(
    model: LensModel,
    change: Any,
    *,
    adapter: Adapters = None,
    differences: bool = False,
    matrices: Sequence[str] | str | None = None,
    layers: Layers = None,
    directions: int = 4,
    top_k: int = 10,
    reading: Literal["dual", "cosine", "plain"] = "dual",
    prompts: Prompts | None = None,
    prepend_bos: bool | None = None,
    effect: bool = True,
    follow: Sequence[str] = (),
    rank: int = 16,
    usual_of: int = 64,
    seed: int = 0,
) -> ChangeLens:
    """A change of a model's weights in words: what it answers to, what it writes, what it does.

    Args:
        model: The model whose weights are changed; it is left as it is.
        change: A `WeightChange` or its file; a PEFT LoRA folder or a PeftModel; a checkpoint
            (folder, file, model), compared with `model`; a pair of them (before, after); an
            `OptimizerStep`; a safetensors file of differences (`differences=True`).
        adapter: Which of several adapters: a name, several (added up), or how many times of each.
        differences: The file holds differences, not weights.
        matrices: Which matrices to read; None for all that are changed.
        layers: Which layers; None for all.
        directions: How many singular directions of each matrix to read, the largest first.
        top_k: Words kept at each end.
        reading: "dual" (the unembedding undone), "cosine" or "plain"; without a final norm's bias,
            as a direction has two signs.
        prompts: Text that signs, sizes and effect are measured on; None for six neutral beginnings.
        prepend_bos: As for `capture`.
        effect: Whether to measure what it does to the prompts' next words.
        follow: Words whose ranks each direction's shift keeps.
        rank: How many rows to keep of a difference of full rank.
        usual_of: How many random directions of each kind of matrix, at least, say what is usual.
        seed: For the random change beside it, and the randomised SVD.

    Raises:
        ValueError: A change of another model (shapes, names: it says which), broken files, nothing
            changed among what was asked for.
        NotImplementedError: DoRA and other adapters that are no plain product.

    Example:
        >>> lens = read_change(model, "my-adapter")  # doctest: +SKIP
        >>> lens.promoted()["word"]  # doctest: +SKIP
    """
    if reading not in READINGS:
        raise ValueError(f"reading is {reading!r}; there are {', '.join(READINGS)}")
    top_k, directions = whole_number(top_k, "top_k"), whole_number(directions, "directions")
    rank = whole_number(rank, "rank")
    given = as_change(model, change, adapter=adapter, differences=differences, rank=rank)
    given, remarks = _asked_for(model, given, matrices, layers)
    batch = make_batch(
        model, list(PROMPTS) if prompts is None else prompts, prepend_bos=prepend_bos
    )
    texts = _texts(model, batch)
    inputs, old = inputs_of(model, batch, given)
    random = random_change(given, seed)
    head = head_by(model, reading, False)
    device = head.W_U.device
    cells: dict[Site, Directions] = {}
    null: dict[Site, Directions] = {}
    writes: list[Tensor] = []
    for site, part in given.items():
        cells[site], wrote = oriented(directions_of(part, directions, device), inputs.get(site))
        by_chance = directions_of(random[site], directions, device)
        null[site], _ = oriented(by_chance, inputs.get(site))
        writes.append(wrote)
    follow_ids = tuple(first_token(model, word) for word in follow)
    largest = max(float(one.s[0]) for one in cells.values())
    usual = Usual(model, head, given, usual_of, seed + 1)
    read = {s: read_side(head, cells, s, largest, top_k, usual, follow_ids) for s in SIDES}
    null_read = {side: read_side(head, null, side, largest, 0, usual) for side in SIDES}
    names = [site.matrix for site, one in cells.items() for _ in one.s]
    null_names = [site.matrix for site, one in null.items() for _ in one.s]
    measured = None
    if effect:
        try:
            k = min(top_k, model.cfg.d_vocab)
            measured = effect_of(model, batch, texts, given, random, old, k)
        except NotImplementedError as error:
            remarks.append(f"the effect was not measured: {error}")
    if blind := next((s for s, partner in usual.partners.items() if partner is None), None):
        remarks.append(f"only the side in the stream of {blind} (and its like) is read in words")
    tallies = {
        "promoted": read["delta"].words, "suppressed": read["delta"].opposite,
        "answers_to": read["x"].words,
    }  # fmt: skip
    null_tallies = (null_read["delta"].words, null_read["delta"].opposite, null_read["x"].words)
    counts = [range(len(one.s)) for one in cells.values()]
    sizes = torch.cat([one.s for one in cells.values()])
    squares = torch.cat([one.s.square() / max(one.norm, 1e-30) ** 2 for one in cells.values()])
    cut = {which: _cut(tally) for which, tally in tallies.items()}
    return ChangeLens(
        change=given,
        model=model_label(model),
        reading=reading,
        sites=tuple(site for site, one in cells.items() for _ in one.s),
        numbers=tuple(i for count in counts for i in count),
        sizes=sizes,
        shares=squares,
        writes=torch.cat(writes),
        norms={site: one.norm for site, one in cells.items()},
        imprint=read["x"].readout,
        shift=read["delta"].readout,
        chance_x=chances(read["x"].legibility, names, null_read["x"].legibility, null_names),
        chance_delta=chances(
            read["delta"].legibility, names, null_read["delta"].legibility, null_names
        ),
        effect=measured,
        remarks=tuple(remarks),
        follow_ids=follow_ids,
        _tallies=cut,
        _random={
            which: {at: float(nats[0]) if len(nats) else 0.0 for at, (_, nats) in tally.items()}
            for which, tally in zip(tallies, null_tallies, strict=True)
        },
        _words=_vocabulary(model, read, cut, measured, follow_ids),
    )


def _asked_for(
    model: LensModel, change: WeightChange, matrices: Any, layers: Layers
) -> tuple[WeightChange, list[str]]:
    """The part of the change that is to be read, fit for the model, and what there is to say."""
    names = None if matrices is None else resolve_matrices(matrices)
    wanted = None if layers is None else resolve_layers(model, layers)
    parts = {
        site: part
        for site, part in change.items()
        if (names is None or site.matrix in names)
        and (wanted is None or site.layer in wanted)
        and bool(part.x.any() and part.delta.any())
    }
    if not parts:
        has = "no matrix at all" if not change else f"{', '.join(map(str, list(change)[:6]))}"
        raise ValueError(
            f"nothing to read: this changes {has}{f' ({change.note})' if change.note else ''}, and"
            f" nothing of what was asked for (or by zero)"
        )
    remarks = [change.note] if change.note else []
    if kept := change.details.get("kept"):
        low = min(kept, key=kept.get)
        remarks.append(
            f"kept {change.details['rank']} directions of each matrix' difference; they hold"
            f" {min(kept.values()):.0%} ({low}) to {max(kept.values()):.0%} of its squared norm"
        )
    try:
        weights = weights_of(model, parts)
    except NotImplementedError as error:
        remarks.append(f"shapes were not compared with the model's: {error}")
        weights = {}
    for site, weight in weights.items():
        if weight.shape != parts[site].shape:
            raise ValueError(
                f"{site} is {list(weight.shape)} in this model, but the change of it"
                f" {list(parts[site].shape)}; it was made for another model"
            )
    return WeightChange(parts, change.note, change.details), remarks


def _texts(model: LensModel, batch: Any) -> tuple[str, ...]:
    rows = [
        row[: int(length)].tolist() for row, length in zip(batch.tokens, batch.lengths, strict=True)
    ]
    return tuple("".join(token_texts(model.tokenizer, row)) for row in rows)


def _cut(tally: Any) -> dict[int | None, tuple[Tensor, Tensor]]:
    return {at: (ids[:KEPT], nats[:KEPT]) for at, (ids, nats) in tally.items()}


def _vocabulary(
    model: LensModel,
    read: dict[Any, Side],
    tallies: Any,
    measured: ChangeEffect | None,
    follow_ids: tuple[int, ...],
) -> dict[int, str]:
    """What each token says that occurs anywhere in the lens."""
    ids = [t for side in read.values() for t in (side.readout.top_ids, side.readout.bottom_ids)]
    ids += [words for tally in tallies.values() for words, _ in tally.values()]
    if measured is not None:
        ids += [measured.before, measured.after, measured.raised, measured.lowered]
    flat = {int(i) for some in ids for i in some.flatten().tolist() if i >= 0} | {*follow_ids}
    ordered = sorted(flat)
    return dict(zip(ordered, token_texts(model.tokenizer, ordered), strict=True))
