"""Changes of a word's senses: scaled, swapped, or with one answer put in place of another.

They are `WeightChange`s: applied, undone bit for bit, and measured by `bwlens.evaluate` as edits of
weights are. What they change is a table beside the sense network: some words' own senses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.data.given import OneEdit, as_edits
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.knowledge.backpack.senses import mixing_of, sense_vectors, token_of
from bwlens.model.locking import alone_with
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site
from bwlens.model.tokens import subject_positions, text_to_ids
from bwlens.model.weights import copy_of


@dataclass(frozen=True, eq=False, repr=False)
class SenseChange(WeightChange):
    """What is added to the senses of some words, as a change of the matrices C(x) [sense, d_model].

    Its sites are `Site("senses", layer, token)`. Several may be applied at a time, and undone in
    any order.
    """

    @property
    def added(self) -> dict[int, Float[Tensor, "sense d_model"]]:
        """What is added to each token's senses."""
        return {int(site.expert_number): part.dense() for site, part in self.parts.items()}

    def __repr__(self) -> str:
        n = len(self.parts)
        said = f"; {self.note}" if self.note else ""
        return f"SenseChange({n} word{'s' * (n != 1)}, norm {self.norm():.4g}{said})"

    def apply(self, model: LensModel) -> None:
        """Give the words these senses, until `undo`.

        Raises:
            ValueError: It is applied already, or was made for a model of other sizes.
            NotImplementedError: The model is no Backpack.
        """
        network = self._network_in(model)
        with alone_with(model):
            applied = _APPLIED.setdefault(network, [])
            if any(one is self for one in applied):
                raise ValueError("this change is applied to this model already; undo it first")
            applied.append(self)
            _put(model, network, applied)

    def undo(self, model: LensModel) -> None:
        """Take the change back.

        Raises:
            ValueError: It is not applied to this model.
        """
        network = mixing_of(model).sense_network
        with alone_with(model):
            applied = _APPLIED.get(network, [])
            kept = [one for one in applied if one is not self]
            if len(kept) == len(applied):
                raise ValueError("this change is not applied to this model: there is none to undo")
            _APPLIED[network] = kept
            _put(model, network, kept)

    def _network_in(self, model: LensModel) -> Any:
        """The model's sense network, fit for this change."""
        mixing = mixing_of(model)
        sizes = (mixing.sense_network.stores, mixing.ln_f.weight.shape[0])
        for site, part in self.parts.items():
            if part.shape != sizes or not 0 <= site.expert_number < model.cfg.d_vocab:
                raise ValueError(
                    f"a word's senses are {list(sizes)} in this model of {model.cfg.d_vocab} words,"
                    f" but the change of token {site.expert}'s is {list(part.shape)}; it was made"
                    f" for another model"
                )
        return mixing.sense_network

    def edited(self, model: LensModel) -> Any:
        """A copy of the model with the change; see `WeightChange.edited`."""
        network = self._network_in(model)
        twin = copy_of(model)
        _APPLIED[mixing_of(twin).sense_network] = list(_APPLIED.get(network, []))
        self.apply(twin)
        return twin

    def save_pretrained(self, model: LensModel, folder: str | os.PathLike[str]) -> Path:
        """Write the model with this change as a folder; see `WeightChange.save_pretrained`."""
        from bwlens.changes import export

        folder = export.check_exportable(model, folder)
        with self.applied(model):
            export.Export(model, {}).write(folder)
        return folder

    @staticmethod
    def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> SenseChange:
        """Read what `save` wrote; raises as `WeightChange.load` does."""
        return _of(WeightChange.load(path, device))

    def __add__(self, other: WeightChange) -> WeightChange:
        if not isinstance(other, SenseChange):
            return NotImplemented
        return _of(super().__add__(other))

    def __mul__(self, scalar: float | int) -> WeightChange:
        made = super().__mul__(scalar)
        return made if made is NotImplemented else _of(made)

    __rmul__ = __mul__

    def compress(self, rtol: float | None = None) -> WeightChange:
        """The same change in as few rows as its rank."""
        return _of(super().compress(rtol))

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> WeightChange:
        """The same change elsewhere, or in another dtype."""
        return _of(super().to(device, dtype))


def _of(change: WeightChange) -> SenseChange:
    return SenseChange(change.parts, change.note, change.details)


def _change(model: LensModel, added: Mapping[int, Tensor], note: str) -> SenseChange:
    layer = len(model.blocks) - 1
    parts = {
        Site("senses", layer, token): LowRankMatrix(torch.eye(len(rows)).to(rows), rows)
        for token, rows in added.items()
    }
    return SenseChange(parts, note)


_APPLIED: WeakKeyDictionary[Any, list[SenseChange]] = WeakKeyDictionary()
"""What is applied to each living sense network."""


def _put(model: LensModel, network: Any, applied: Sequence[SenseChange]) -> None:
    """The table of changed words, from the senses that the network gives them."""
    added = [change.added for change in applied]
    tokens = sorted({token for one in added for token in one})
    network.changed = network.own = None
    config = getattr(getattr(model, "original_model", None), "config", None)
    if config is not None:
        config.n_changed = len(tokens)
    if not tokens:
        return
    rows = []
    for token in tokens:
        own = sense_vectors(model, token)
        rows.append(own + sum(one[token].to(own) for one in added if token in one))
    device = rows[0].device
    network.changed, network.own = torch.tensor(tokens, device=device), torch.stack(rows)


def _senses_of(model: LensModel, sense: int | Sequence[int] | None) -> list[int]:
    n = mixing_of(model).sense_network.stores
    given = range(n) if sense is None else [sense] if isinstance(sense, int) else list(sense)
    if bad := [one for one in given if not isinstance(one, int) or not -n <= one < n]:
        raise ValueError(f"sense {bad[0]!r} asked for; words have senses 0 to {n - 1} here")
    return sorted({one % n for one in given})


def scale_sense(
    model: LensModel, word: str | int, sense: int | Sequence[int] | None, factor: float
) -> SenseChange:
    """A sense of a word (several, or None for all) times a factor; 0 takes it away.

    Raises:
        ValueError: The word is not one token, or has no such sense.
        NotImplementedError: The model is no Backpack.

    Source: Hewitt et al., ACL 2023, section 6.2 (reducing bias by one sense of profession nouns).

    Example:
        >>> with scale_sense(model, " Nigeria", 3, 0.0).applied(model):  # doctest: +SKIP
        ...     model.generate("Nigeria has its capital in")
    """
    chosen = _senses_of(model, sense)
    token, own = token_of(model, word), sense_vectors(model, word)
    added = torch.zeros_like(own)
    added[chosen] = (factor - 1) * own[chosen]
    return _change(model, {token: added}, f"senses {chosen} of {word!r} times {factor:g}")


def swap_sense(
    model: LensModel,
    word: str | int,
    sense: int,
    other: str | int,
    other_sense: int | None = None,
) -> SenseChange:
    """One sense of a word and one of another (the same number, where none is named) exchanged.

    Raises:
        ValueError: A word is not one token, has no such sense, or both are the same.
        NotImplementedError: The model is no Backpack.
    """
    (mine,) = _senses_of(model, sense)
    (theirs,) = _senses_of(model, mine if other_sense is None else other_sense)
    token, token2 = token_of(model, word), token_of(model, other)
    if token == token2:
        raise ValueError(f"{word!r} and {other!r} are the same token; swap with another word's")
    own, own2 = sense_vectors(model, word), sense_vectors(model, other)
    added, added2 = torch.zeros_like(own), torch.zeros_like(own2)
    added[mine] = own2[theirs] - own[mine]
    added2[theirs] = own[mine] - own2[theirs]
    note = f"sense {mine} of {word!r} and sense {theirs} of {other!r} swapped"
    return _change(model, {token: added, token2: added2}, note)


def replace_in_senses(
    model: LensModel,
    word: str | int,
    old: str | int,
    new: str | int,
    *,
    strength: float = 1.0,
    gain: float = 1.0,
) -> SenseChange:
    """The old answer projected out of every sense of a word, the new one put in, as much of it.

    `C_l + strength * (C_l . e_old / |e_old|) (gain * e_new / |e_new| - e_old / |e_old|)`, e the
    unembedding's vectors less their mean, which no prediction hangs on.

    Raises:
        ValueError: A word is not one token, or old and new are the same.
        NotImplementedError: The model is no Backpack.

    Source: Hewitt et al., ACL 2023, section 6.3 (" MacBook": " Apple" out, " HP" in).
    """
    token = token_of(model, word)
    was, becomes = token_of(model, old), token_of(model, new)
    if was == becomes:
        raise ValueError(f"old and new answer are the same, {old!r}; there is nothing to change")
    added = _replaced(model, sense_vectors(model, token), was, becomes, strength, gain)
    note = f"{new!r} for {old!r} in the senses of {word!r}"
    return _change(model, {token: added}, note)


def _replaced(
    model: LensModel, own: Tensor, was: int, becomes: int, strength: float, gain: float
) -> Tensor:
    W_U = model.unembed.W_U.detach().float()
    e_old, e_new = (
        torch.nn.functional.normalize(W_U[:, token] - W_U.mean(1), dim=0)
        for token in (was, becomes)
    )
    had = own.float() @ e_old
    return strength * had[:, None] * (gain * e_new - e_old)


def sense_edit(
    model: LensModel,
    edit: OneEdit,
    *,
    strength: float = 1.0,
    gain: float = 1.0,
    prepend_bos: bool | None = None,
) -> SenseChange:
    """The paper's editing example on a fact, as a method that `bwlens.evaluate` takes.

    `replace_in_senses` on the subject's last token (as it stands in the prompt, behind a space, and
    where a text begins with it: these may differ) of the answer that the edit says is true. Another
    subject that ends in the same token is changed with it.

    Raises:
        ValueError: The edit has no `target_true`, or an answer is not one token.
        NotImplementedError: The model is no Backpack.

    Example:
        >>> methods = {"senses": sense_edit, "rome": "rome"}
        >>> bwlens.evaluate(model, methods, records)  # doctest: +SKIP
    """
    mixing_of(model)
    (edit,) = as_edits(edit)
    if edit.target_true is None:
        raise ValueError(f"{edit.text!r}: to project the old answer out it must be known; give"
                         " target_true")  # fmt: skip
    at = subject_positions(model, edit.text, edit.subject, prepend_bos, edit.start)[-1]
    tokens = {text_to_ids(model, edit.text, prepend_bos)[at]}
    tokens |= {text_to_ids(model, s + edit.subject.strip(), False)[-1] for s in ("", " ")}
    was, becomes = token_of(model, edit.target_true), token_of(model, edit.target_new)
    if was == becomes:
        return SenseChange(note="the target is the answer already")
    added = {
        token: _replaced(model, sense_vectors(model, token), was, becomes, strength, gain)
        for token in sorted(tokens)
    }
    return _change(model, added, f"{edit.target_new!r} for {edit.target_true!r}")
