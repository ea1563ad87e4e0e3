"""MEND: networks that turn a gradient's rows into an edit, trained on many edits beforehand."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.data.given import Edits, as_edits, as_records
from bwlens.data.prose import read_prose
from bwlens.data.records import Record
from bwlens.edit.editor import Editors, nonzero
from bwlens.edit.given import count, number
from bwlens.edit.gradient import edit_gradients
from bwlens.edit.known import open_edits
from bwlens.edit.mend_passes import Passes, beginnings, prompts_of
from bwlens.edit.mend_training import TEXT_TOKENS, Example, Plan, Training, digest
from bwlens.gradient.guard import check_first_use
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.identity import fingerprint, model_label
from bwlens.model.locking import one_thread_at_a_time
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, Tap, plain_taps, resolve_layers
from bwlens.model.targets import unwarned
from bwlens.model.weights import weights_of
from bwlens.runs.parts import Run, progress_bar
from bwlens.runs.tensors import read_tensors, write_tensors

_MATRICES = ("W_in", "W_out")
_WHY = "MEND edits weights that every token passes; forward_pass_shift edits mixtures"
_NEIGHBOURS = 1  # Of each record, so many are trained on.


@one_thread_at_a_time
def mend(
    model: LensModel,
    edits: Edits,
    *,
    fitted: Mend | str | os.PathLike[str],
    layers: Layers = None,
    prepend_bos: bool | None = None,
) -> WeightChange:
    """One edited gradient step: the rows of the target's NLL gradient, turned by trained networks.

    `W -= rate * x~^T delta~` with (x~, delta~) the editor's of (x, delta), each row by itself, at
    W_in and W_out of the fitted layers. Of several edits the changes are summed. Edits known
    already are left out, which the `note` says.

    Args:
        model: The model that the editors were fitted on.
        edits: One edit or several.
        fitted: What `Mend.fit` gave, or a file that it was saved to.
        layers: None for those fitted; any others are refused.
        prepend_bos: None is the model's own default.

    Returns:
        The change, a row for each token of each edit that has a gradient.

    Raises:
        ValueError: Fitted on another model or for other layers, or a malformed edit.

    Source: Mitchell et al., "Fast Model Editing at Scale", ICLR 2022.

    Example:
        >>> edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
        >>> mend(model, edit, fitted="mend.safetensors")  # doctest: +SKIP
        WeightChange(W_in, W_out of layers 5-7; 22 rows, norm 1.3)
    """
    if not isinstance(fitted, Mend):
        fitted = _loaded(str(fitted), Path(fitted).stat().st_mtime_ns)
    listed = as_edits(edits)
    fitted.check(model, layers)
    listed, note = open_edits(model, listed, prepend_bos)
    if not listed:
        return WeightChange(note=note)
    grads = edit_gradients(model, listed, _MATRICES, fitted.layers, prepend_bos)
    rows = {}
    for site, part in grads.items():
        there = nonzero(part.x, part.delta)
        rows[site] = part.x[there].float(), part.delta[there].float()
    editors = fitted.editors.to(next(iter(rows.values()))[0].device)
    parts = {site: LowRankMatrix(*pair) for site, pair in editors(rows).items()}
    details = {"method": "mend", "layers": fitted.layers, "losses": grads.losses.tolist()}
    return WeightChange(parts, note, details)


@dataclass(frozen=True, eq=False, repr=False)
class Mend:
    """Editors fitted to a model, for `bwlens.edit.mend`.

    Attributes:
        shapes: (d_in, d_out) of each weight that is edited.
        rank: Of the networks' matrices.
        tensors: The networks', by name.
        fingerprint: `bwlens.model.identity.fingerprint` of the model.
        label: What the model is called.
        history: `step`, and on the held-out records there `loss`, `nll` and `kl`.
    """

    shapes: Mapping[Site, tuple[int, int]]
    rank: int
    tensors: Mapping[str, Tensor]
    fingerprint: str
    label: str = ""
    history: Sequence[Mapping[str, float | int]] = ()

    def __post_init__(self) -> None:
        # In one order, read or fitted: the rows of an evaluation hang on them.
        object.__setattr__(self, "tensors", dict(sorted(self.tensors.items())))

    @property
    def layers(self) -> list[int]:
        """The layers that are edited, W_in and W_out of each."""
        return sorted({site.layer for site in self.shapes})

    @cached_property
    def editors(self) -> Editors:
        """The networks."""
        editors = Editors(self.shapes, self.rank)
        editors.load_state_dict(dict(self.tensors))
        return editors.requires_grad_(False)

    def __repr__(self) -> str:
        n = sum(parameter.numel() for parameter in self.editors.parameters())
        best = min(self.history, key=lambda check: check["loss"])["step"] if self.history else 0
        return (
            f"Mend(W_in, W_out of layers {', '.join(map(str, self.layers))} of"
            f" {self.label or self.fingerprint}; rank {self.rank}, {n:,} parameters,"
            f" {best:,} steps)"
        )

    @staticmethod
    def fit(
        model: LensModel,
        records: Any,
        *,
        layers: Layers = None,
        rank: int = 256,
        locality: str | Path | Sequence[str] | None = None,
        steps: int = 2000,
        lr: float = 1e-4,
        edits_per_step: int = 10,
        edit_weight: float = 0.1,
        neighbours: float = 0.0,
        held_out: Any = 40,
        check_every: int = 100,
        patience: int = 5,
        seed: int = 0,
        folder: str | os.PathLike[str] | None = None,
        prepend_bos: bool | None = None,
        progress: bool = True,
    ) -> Mend:
        """Train editors on records, none of which is to be edited later in a test.

        A step edits each of some records by itself and lowers
        `edit_weight * NLL(target_new | a paraphrase) + KL(before || after)` with Adam, the KL at
        the next word of a neighbourhood prompt or of a beginning of a text, as often. The step
        sizes of the weights are trained too, from the one at which plain gradient steps lower this
        most.
        Training ends when the loss on the held-out records has not fallen for `patience` checks;
        the best is kept.

        Args:
            model: A TransformerBridge or HookedTransformer; it is left as it was.
            records: As `read_records` gives them; each needs a paraphrase.
            layers: Which to edit; None for the last three.
            rank: Of the networks' matrices; the paper takes 1,920 for large models.
            locality: Texts whose next words are to stay: a file, or lines; None for the stories
                that come with bwlens.
            steps: At most so many.
            lr: Adam's step size; ten times that for the logarithms of the step sizes.
            edits_per_step: Records in a step.
            edit_weight: Of the edits' loss beside the KL.
            neighbours: How often a record's neighbourhood prompt stands in a text's place, 0 to 1;
                the paper's locality knows none.
            held_out: So many of the records, drawn by the seed, to stop by; or other records.
            check_every: Steps between two looks at them.
            patience: Checks without gain that end the training.
            seed: Of the draws and the networks' start.
            folder: Where the state is kept, so that a run that was stopped is carried on.
            prepend_bos: None is the model's own default.
            progress: Show bars.

        Raises:
            ValueError: Too few records, one without paraphrases or that cannot be tokenised, a
                malformed argument, or a folder with a training of other settings.
            NotImplementedError: A mixture of experts, or a model out of scope.

        Source: Mitchell et al., "Fast Model Editing at Scale", ICLR 2022, section 3.

        Example:
            >>> fitted = Mend.fit(model, records, folder="runs/mend")  # doctest: +SKIP
            >>> fitted.save("mend.safetensors")  # doctest: +SKIP
        """
        taps = _taps(model, layers)
        counts = {"rank": rank, "steps": steps, "edits_per_step": edits_per_step}
        for name, value in (counts | {"check_every": check_every, "patience": patience}).items():
            count(value, name)
        for name, value in {"lr": lr, "edit_weight": edit_weight}.items():
            if not number(value, name) > 0:
                raise ValueError(f"{name} is {value}; expected a number > 0")
        if not 0 <= number(neighbours, "neighbours") <= 1:
            raise ValueError(f"neighbours is {neighbours}; expected a share from 0 to 1")
        with unwarned():
            train, kept = (
                _examples(model, part, bool(neighbours), prepend_bos, progress)
                for part in _split(records, held_out, edits_per_step, seed)
            )
        lines = read_prose("demo" if locality is None else locality)
        texts = beginnings(model, lines, TEXT_TOKENS, prepend_bos)
        weights = weights_of(model, [tap.site for tap in taps])
        shapes = {site: weight.shape for site, weight in weights.items()}
        check_first_use(model, taps)
        mark, place = fingerprint(model), None if folder is None else Path(folder)
        if place is not None:
            settings = {
                **{"model": mark, "layers": sorted({tap.site.layer for tap in taps})},
                **{"examples": digest(train, kept, texts), "rank": rank, "lr": lr, "seed": seed},
                **{"edits_per_step": edits_per_step, "edit_weight": edit_weight},
                **{"neighbours": neighbours, "check_every": check_every},
            }
            Run(place, settings, [len(train)])
        passes = Passes(model, taps)
        passes.keep([*(p for one in (*train, *kept) for p in one.prompts), *texts], place, progress)
        editors = Editors(shapes, rank, seed).to(weights[taps[0].site].device)
        plan = Plan(steps, lr, edits_per_step, edit_weight, neighbours, check_every, patience, seed)
        training = Training(passes, editors, train, kept, texts, plan, place)
        training.run(progress)
        tensors = {name: tensor.cpu() for name, tensor in editors.state_dict().items()}
        return Mend(shapes, rank, tensors, mark, model_label(model), tuple(training.history))

    def check(self, model: LensModel, layers: Layers = None) -> None:
        """Refuse a model or layers that these were not fitted for.

        A model object that fits is known later, whatever changes are applied to it then.

        Raises:
            ValueError: Another model, or other layers.
        """
        taps = _taps(model, self.layers if layers is None else layers)
        asked = sorted({tap.site.layer for tap in taps})
        if asked != self.layers:
            raise ValueError(
                f"layers {asked} asked for, but this Mend was fitted for layers {self.layers}"
                f" together; leave layers out, or fit one with Mend.fit(model, records,"
                f" layers={asked})"
            )
        mark = _MARKS.get(model) or fingerprint(model)
        if mark != self.fingerprint:
            raise ValueError(
                f"this Mend was fitted on another model, {self.label or 'unnamed'} with fingerprint"
                f" {self.fingerprint}; this one is {model_label(model)} with {mark}. Fit one on it"
                f" with Mend.fit(model, records); if it is the same with changes applied, undo them"
                f" first"
            )
        _MARKS[model] = mark

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the editors to a safetensors file; replaced whole or not at all.

        Raises:
            ValueError: There is no such folder.
        """
        about = {
            **{"fingerprint": self.fingerprint, "label": self.label, "rank": self.rank},
            "shapes": [[s.matrix, s.layer, *shape] for s, shape in self.shapes.items()],
            "history": list(self.history),
        }
        return write_tensors(path, self.tensors, "Mend", {"about": json.dumps(about)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Mend:
        """Read what `save` wrote.

        Raises:
            ValueError: Another kind of file.
            FileNotFoundError: There is none.
        """
        tensors, metadata = read_tensors(path, "Mend", "Mend.save")
        about = json.loads(metadata["about"])
        shapes = {Site(m, layer): (d_in, d_out) for m, layer, d_in, d_out in about.pop("shapes")}
        return Mend(shapes, tensors=tensors, **about)


_MARKS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Fingerprints of models that fitted, as they were before changes that were applied later."""


@lru_cache(1)
def _loaded(path: str, written: int) -> Mend:
    return Mend.load(path)


def _taps(model: LensModel, layers: Layers) -> list[Tap]:
    """W_in and W_out of the layers; of the last three where none are named."""
    chosen = resolve_layers(model, slice(-3, None) if layers is None else layers)
    return plain_taps(model, _MATRICES, chosen, _WHY)


def _split(
    records: Any, held_out: Any, edits_per_step: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Records to train on and to stop by, all of them fit."""
    train = list(as_records(records))
    if isinstance(held_out, int):
        n = count(held_out, "held_out")
        random.Random(f"{seed}|held out").shuffle(train)
        kept, train = train[:n], train[n:]
    else:
        n, kept = 0, list(as_records(held_out))
    every = [*train, *kept]
    if lacking := [record.case_id for record in every if not record.paraphrase_prompts]:
        raise ValueError(
            f"{len(lacking)} of {len(every)} records have no paraphrase_prompts, the first with"
            f" case_id {lacking[0]}; MEND learns to carry an edit over to them. Leave those out, or"
            f" make some with bwlens.make_records"
        )
    if len(train) < edits_per_step:
        raise ValueError(
            f"{len(train) + n} records to fit MEND on, too few: it needs {edits_per_step} for each"
            f" step{f' beside {n} held out' * bool(n)}, and learns from thousands"
        )
    return train, kept


def _examples(
    model: LensModel,
    records: Sequence[Record],
    neighbours: bool,
    prepend_bos: bool | None,
    progress: bool,
) -> list[Example]:
    """The records' prompts as tokens; a fault is named by its record."""
    examples = []
    with progress_bar("Tokenising", len(records), shown=progress) as advance:
        for record in records:
            texts = [record.edit.text, *record.paraphrase_prompts]
            near = record.neighborhood_prompts[: _NEIGHBOURS * neighbours]
            try:
                edit, *said = prompts_of(model, texts, record.edit.target_new, prepend_bos)
                stay = prompts_of(model, near, None, prepend_bos)
            except ValueError as error:
                raise ValueError(f"record {record.case_id}: {error}") from error
            examples.append(Example(edit, tuple(said), tuple(stay)))
            advance(1)
    return examples
