"""Statistics of keys: the second moment of what enters a weight, over a text.

With C = E[k k^T] over many tokens, a key is *whitened* by C^-1: `C^-1 k` answers to k and as little
as possible to what other tokens bring there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from bwlens.edit.cache import kept_files
from bwlens.edit.keys import key_taps, keys_of
from bwlens.model.identity import fingerprint, is_demo, model_label
from bwlens.model.prompts import Batch, padded
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Site
from bwlens.model.weights import weight_of
from bwlens.runs.tensors import read_tensors, write_tensors

_PROBE = 8  # Tokens whose keys tell one model from another.
_RIDGE = 1e-6
_SAME = 0.02  # Share by which the sizes of those keys may differ (half precision).


@dataclass(frozen=True, eq=False, repr=False)
class KeyStatistics:
    """Mean and second moment of what enters one weight, over the tokens of a text.

    Attributes:
        site: The weight, `Site("W_out", 5)`.
        mean: E[k] [d_in], in units of the activations.
        second_moment: C = E[k k^T] [d_in, d_in], not centred.
        n_tokens: How many tokens were counted.
        fingerprint: `bwlens.model.identity.fingerprint` of the model.
        probe: Norms of the keys at a few fixed tokens, by which another model is told.
        convergence: Mean cosine of `C^-1 k` by half of the text with that by all of it, over keys
            of the text's end; of one layer of each matrix, the middle one, else None. Near 1 more
            text changes nothing.
    """

    site: Site
    mean: Float[Tensor, " d_in"]
    second_moment: Float[Tensor, "d_in d_in"]
    n_tokens: int
    fingerprint: str
    probe: Float[Tensor, " pos"]
    convergence: float | None = None

    @property
    def layer(self) -> int:
        """The weight's layer."""
        return self.site.layer

    def __repr__(self) -> str:
        return f"KeyStatistics({self.site}; {self.n_tokens:,} tokens of model {self.fingerprint})"

    @cached_property
    def factor(self) -> Float64[Tensor, "d_in d_in"]:
        """The lower Cholesky factor F, C = F F^T.

        Where neurons are dead on the whole text (ReLU), a millionth of C's mean diagonal is added
        to its diagonal.

        Raises:
            ValueError: Fewer tokens were counted than a key is wide, or C is not finite.
        """
        if self.n_tokens < len(self.mean):
            raise ValueError(
                f"the second moment of the keys of {self.site} is singular: {self.n_tokens:,}"
                f" tokens for keys of width {len(self.mean)}; take more text"
            )
        moment = self.second_moment.double()
        if not torch.isfinite(moment).all():
            raise ValueError(
                f"the second moment of the keys of {self.site} holds nan or inf; compute it anew"
            )
        factor, failed = torch.linalg.cholesky_ex(moment)
        if int(failed):
            ridge = torch.eye(len(moment)).to(moment) * moment.diagonal().mean() * _RIDGE
            factor = torch.linalg.cholesky(moment + ridge)
        return factor

    def whitened(self, keys: Float[Tensor, "n d_in"]) -> Float64[Tensor, "n d_in"]:
        """`C^-1 k` for each key, in float64 on the keys' device."""
        factor = self.factor.to(keys.device)
        return torch.cholesky_solve(keys.double().T, factor).T


Statistics = Mapping[Site, KeyStatistics]
"""Key statistics of several weights of one model."""


def statistics_for(
    model: LensModel, sites: Sequence[Site], given: Statistics | str | os.PathLike[str] | None
) -> dict[Site, KeyStatistics]:
    """The statistics of these weights of this model, checked to be this model's.

    None takes those that ship with the demo model or, of any other, what `key_statistics` kept on
    disk for a model of this fingerprint, over the most tokens. Each model object is checked once,
    as changes applied to it later are the same model's.

    Raises:
        ValueError: None were given and none are kept, a weight has none, or they are another
            model's.
    """
    key_taps(model, list(dict.fromkeys(s.matrix for s in sites)), [s.layer for s in sites])
    if given is None:
        known = demo_statistics() if is_demo(model) else _kept(model, sites)
    else:
        known = given if isinstance(given, Mapping) else load_statistics(given)
    if missing := [site for site in sites if site not in known]:
        raise ValueError(
            f"no key statistics of {missing[0]}; there are those of"
            f" {', '.join(map(str, known)) or 'nothing'}"
        )
    chosen = {site: known[site] for site in sites}
    checked = _CHECKED.setdefault(model, {})
    if unchecked := [s for s in sites if checked.get(s) is not chosen[s].probe]:
        _check(model, {site: chosen[site] for site in unchecked})
        checked |= {site: chosen[site].probe for site in unchecked}
    return chosen


def save_statistics(
    statistics: Statistics, path: str | os.PathLike[str], *, packed: bool = False
) -> Path:
    """Write statistics to a safetensors file, replaced whole or not at all.

    `packed` keeps the lower triangle of C's inverse Cholesky factor in half precision, a quarter of
    the size; `whitened` then agrees to about three digits.
    """
    tensors: dict[str, Tensor] = {}
    about = {}
    for site, one in statistics.items():
        key = f"{site.matrix}.{site.layer}"
        about[key] = {
            "n_tokens": one.n_tokens,
            "fingerprint": one.fingerprint,
            "convergence": one.convergence,
        }
        tensors[f"{key}.mean"] = one.mean.float()
        tensors[f"{key}.probe"] = one.probe.float()
        if packed:
            inverse = torch.linalg.solve_triangular(
                one.factor, torch.eye(len(one.mean)).to(one.factor), upper=False
            )
            low = torch.tril_indices(*inverse.shape)
            tensors[f"{key}.packed"] = inverse[low[0], low[1]].half()
        else:
            tensors[f"{key}.second_moment"] = one.second_moment
    path = write_tensors(path, tensors, "KeyStatistics", {"about": json.dumps(about)})
    path.chmod(0o644)
    return path


def load_statistics(
    path: str | os.PathLike[str], sites: Collection[Site] | None = None
) -> dict[Site, KeyStatistics]:
    """Read what `save_statistics` wrote; of these sites alone, where the file has them.

    Raises:
        ValueError: Another kind of file.
        FileNotFoundError: There is none.
    """

    def wanted(name: str) -> bool:
        matrix, layer, _ = name.split(".")
        return sites is None or Site(matrix, int(layer)) in sites

    tensors, metadata = read_tensors(path, "KeyStatistics", "save_statistics", only=wanted)
    statistics: dict[Site, KeyStatistics] = {}
    for key, about in json.loads(metadata["about"]).items():
        if f"{key}.mean" not in tensors:
            continue
        matrix, layer = key.split(".")
        site, mean = Site(matrix, int(layer)), tensors[f"{key}.mean"]
        packed = tensors.get(f"{key}.packed")
        moment = tensors[f"{key}.second_moment"] if packed is None else _unpacked(packed, len(mean))
        statistics[site] = KeyStatistics(site, mean, moment, probe=tensors[f"{key}.probe"], **about)
    return statistics


def demo_statistics() -> dict[Site, KeyStatistics]:
    """Those that ship with the demo model: of W_out and W_O in every layer."""
    from bwlens.demo.triples import ROOM

    if not _DEMO:
        _DEMO.update(load_statistics(ROOM / "statistics.safetensors"))
    return dict(_DEMO)


def _kept(model: LensModel, sites: Sequence[Site]) -> dict[Site, KeyStatistics]:
    """Those of this model on disk, each over the most tokens.

    Raises:
        ValueError: A weight has none there.
    """
    kept = _KEPT.setdefault(model, {})
    if any(site not in kept for site in sites):
        for path in kept_files(model):
            for site, one in load_statistics(path, sites).items():
                if site not in kept or kept[site].n_tokens < one.n_tokens:
                    kept[site] = one
    if missing := [site for site in sites if site not in kept]:
        raise ValueError(
            f"key statistics of {missing[0]} of {model_label(model)!r} are needed: compute them"
            f" with bwlens.edit.key_statistics(model, texts), or `bwlens statistics` on the command"
            f" line, which also keeps them for the next time (only the demo model's ship with"
            f" bwlens)"
        )
    return kept


_DEMO: dict[Site, KeyStatistics] = {}
_KEPT: WeakKeyDictionary[Any, dict[Site, KeyStatistics]] = WeakKeyDictionary()
_CHECKED: WeakKeyDictionary[Any, dict[Site, Tensor]] = WeakKeyDictionary()


def keys_at(model: LensModel, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """What enters each of the weights [batch, pos, d_in]."""
    matrices = list(dict.fromkeys(site.matrix for site in sites))
    return keys_of(model, batch, matrices, sorted({site.layer for site in sites}))


def probes_of(model: LensModel, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Norms of the keys at fixed token ids: the same for a model in any wrapping and dtype."""
    ids = [(37 * i + 1) % model.cfg.d_vocab for i in range(_PROBE)]
    passed = keys_at(model, padded(model, [ids]), sites)
    return {site: passed[site][0].norm(dim=-1).float().cpu() for site in sites}


def _check(model: LensModel, statistics: Mapping[Site, KeyStatistics]) -> None:
    probes = probes_of(model, list(statistics))
    for site, one in statistics.items():
        same = torch.allclose(probes[site], one.probe, rtol=_SAME, atol=1e-3)
        if len(one.mean) != weight_of(model, site).shape[0] or not same:
            raise ValueError(
                f"these are the key statistics of {site} of another model (fingerprint"
                f" {one.fingerprint}; this one's is {fingerprint(model)}): its keys differ. Compute"
                f" this model's with bwlens.edit.key_statistics(model, texts)"
            )


def _unpacked(packed: Tensor, width: int) -> Tensor:
    """C out of the lower triangle of its inverse factor."""
    inverse = torch.zeros(width, width, dtype=torch.float64)
    low = torch.tril_indices(width, width)
    inverse[low[0], low[1]] = packed.double()
    eye = torch.eye(width, dtype=torch.float64)
    factor = torch.linalg.solve_triangular(inverse, eye, upper=False)
    return factor @ factor.T
