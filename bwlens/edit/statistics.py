"""Statistics of keys: the second moment of what enters a weight, over a text.

With C = E[k k^T] over many tokens, a key is *whitened* by C^-1: `C^-1 k` answers to k and as little
as possible to what other tokens bring there. ROME, MEMIT and the whitened shift write under such
keys. Statistics are the model's and the text's; those of another model are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bwlens.data.texts import read_texts
from bwlens.edit.keys import key_taps, keys_of
from bwlens.model.identity import fingerprint, is_demo, model_label
from bwlens.model.prompts import padded
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site
from bwlens.model.tokens import text_to_ids
from bwlens.runs.parts import whole

_FORMAT = {"format": "bwlens.KeyStatistics", "version": "1"}
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
    """

    site: Site
    mean: Float[Tensor, " d_in"]
    second_moment: Float[Tensor, "d_in d_in"]
    n_tokens: int
    fingerprint: str
    probe: Float[Tensor, " pos"]

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


def key_statistics(
    model: LensModel,
    texts: Sequence[str] | str | os.PathLike[str],
    *,
    matrix: str = "W_out",
    layers: Layers = None,
    max_tokens: int | None = 100_000,
    window: int | None = None,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
    cache: bool = True,
) -> dict[Site, KeyStatistics]:
    """Mean and second moment of a weight's input over a text, all layers in the same passes.

    `C = sum_t k_t k_t^T / n` over the tokens t of all documents, each cut into windows. They are
    summed in float64, batch by batch, and kept on disk by model, text and settings
    (`$BWLENS_CACHE`, or `bwlens` in the user's cache folder).

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        texts: Documents, or a file of them: a JSON list of strings, or text with two blank lines
            between documents. ROME takes 100,000 samples of Wikipedia.
        matrix: Whose input: "W_out" (the papers'), "W_O", or any of `bwlens.MATRICES`.
        layers: Layers from 0; None for all.
        max_tokens: Stop after this many tokens; None for all.
        window: Tokens in a window; None for the model's context, at most 512.
        batch_size: Windows in a batch.
        prepend_bos: Whether documents begin with a BOS token; None is the model's own default.
        cache: Whether to look on disk and keep the result there.

    Raises:
        ValueError: No text, or unknown layers.
        NotImplementedError: A mixture of experts.

    Source: Meng et al., ROME (NeurIPS 2022), section 3.1 and appendix E.5.

    Example:
        >>> statistics = key_statistics(model, ["Once upon a time ..."])  # doctest: +SKIP
        >>> statistics[Site("W_out", 5)].second_moment.shape  # doctest: +SKIP
        torch.Size([768, 768])
    """
    documents = _documents(texts)
    sites = [tap.site for tap in key_taps(model, [matrix], layers)]
    window = window or min(512, getattr(model.cfg, "n_ctx", None) or 512)
    settings = [matrix, [s.layer for s in sites], max_tokens, window, prepend_bos]
    path = _cached(model, documents, settings) if cache else None
    if path is not None and path.exists():
        return load_statistics(path)
    counted = _Sums(model, sites)
    windows = _windows(model, documents, window, max_tokens, prepend_bos)
    counted.over(windows, batch_size)
    found = counted.statistics()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_statistics(found, path)
    return found


def token_statistics(
    model: LensModel, windows: Sequence[Sequence[int]], sites: Sequence[Site], batch_size: int = 16
) -> dict[Site, KeyStatistics]:
    """`key_statistics` of token ids, in windows that fit the model's context."""
    counted = _Sums(model, list(sites))
    counted.over([list(row) for row in windows], batch_size)
    return counted.statistics()


def statistics_for(
    model: LensModel, sites: Sequence[Site], given: Statistics | str | os.PathLike[str] | None
) -> dict[Site, KeyStatistics]:
    """The statistics of these weights of this model, checked to be this model's.

    None takes those that ship with the demo model. Each model object is checked once: changes
    applied to it later are the same model's, as in editing one fact after another.

    Raises:
        ValueError: None were given and the model is not the demo model, a weight has none, or they
            are another model's.
    """
    key_taps(model, list(dict.fromkeys(s.matrix for s in sites)), [s.layer for s in sites])
    if given is None:
        if not is_demo(model):
            raise ValueError(
                f"key statistics of {model_label(model)!r} are needed: compute them with"
                f" bwlens.edit.key_statistics(model, texts) and pass statistics=... (only the demo"
                f" model's ship with bwlens)"
            )
        held = demo_statistics()
    else:
        held = given if isinstance(given, Mapping) else load_statistics(given)
    if missing := [site for site in sites if site not in held]:
        raise ValueError(
            f"no key statistics of {missing[0]}; there are those of"
            f" {', '.join(map(str, held)) or 'nothing'}"
        )
    chosen = {site: held[site] for site in sites}
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
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    told = {}
    for site, one in statistics.items():
        key = f"{site.matrix}.{site.layer}"
        told[key] = {"n_tokens": one.n_tokens, "fingerprint": one.fingerprint}
        tensors[f"{key}.mean"] = one.mean.float().contiguous()
        tensors[f"{key}.probe"] = one.probe.float().contiguous()
        if packed:
            inverse = torch.linalg.solve_triangular(
                one.factor, torch.eye(len(one.mean)).to(one.factor), upper=False
            )
            low = torch.tril_indices(*inverse.shape)
            tensors[f"{key}.packed"] = inverse[low[0], low[1]].half()
        else:
            tensors[f"{key}.second_moment"] = one.second_moment.contiguous()
    with whole(path) as draft:
        save_file(tensors, draft, metadata=_FORMAT | {"about": json.dumps(told)})
        draft.chmod(0o644)
    return path


def load_statistics(path: str | os.PathLike[str]) -> dict[Site, KeyStatistics]:
    """Read what `save_statistics` wrote.

    Raises:
        ValueError: Another kind of file.
        FileNotFoundError: There is none.
    """
    found: dict[Site, KeyStatistics] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if {name: metadata.get(name) for name in _FORMAT} != _FORMAT:
                raise ValueError(f"{path} holds no key statistics: its metadata is {metadata}")
            names = set(file.keys())
            for key, about in json.loads(metadata["about"]).items():
                matrix, layer = key.split(".")
                mean = file.get_tensor(f"{key}.mean")
                if f"{key}.packed" in names:
                    moment = _unpacked(file.get_tensor(f"{key}.packed"), len(mean))
                else:
                    moment = file.get_tensor(f"{key}.second_moment")
                site = Site(matrix, int(layer))
                found[site] = KeyStatistics(
                    site, mean, moment, probe=file.get_tensor(f"{key}.probe"), **about
                )
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of key statistics ({error})") from error
    return found


def demo_statistics() -> dict[Site, KeyStatistics]:
    """Those that ship with the demo model: of W_out and W_O in every layer."""
    from bwlens.demo.triples import ROOM

    if not _DEMO:
        _DEMO.update(load_statistics(ROOM / "statistics.safetensors"))
    return dict(_DEMO)


_DEMO: dict[Site, KeyStatistics] = {}
_CHECKED: WeakKeyDictionary[Any, dict[Site, Tensor]] = WeakKeyDictionary()


class _Sums:
    """Sums of keys and of their outer products, over batches."""

    def __init__(self, model: LensModel, sites: list[Site]) -> None:
        self._model, self._sites, self._n = model, sites, 0
        self._first: dict[Site, Tensor] = {}
        self._second: dict[Site, Tensor] = {}

    def over(self, windows: list[list[int]], batch_size: int) -> None:
        """Count the windows' tokens, with a progress bar."""
        from rich.progress import Progress

        if not windows:
            raise ValueError("the text holds no tokens; give some documents")
        windows = sorted(windows, key=len)
        with Progress(transient=True) as progress:
            task = progress.add_task("key statistics", total=len(windows))
            for start in range(0, len(windows), batch_size):
                self._add(windows[start : start + batch_size])
                progress.update(task, advance=batch_size)

    def _add(self, rows: list[list[int]]) -> None:
        batch = padded(self._model, rows)
        matrices = list(dict.fromkeys(site.matrix for site in self._sites))
        layers = sorted({site.layer for site in self._sites})
        passed = keys_of(self._model, batch, matrices, layers)
        self._n += batch.n_rows
        for site in self._sites:
            keys = passed[site][batch.mask].double()
            self._first[site] = self._first.get(site, 0) + keys.sum(0)
            self._second[site] = self._second.get(site, 0) + keys.T @ keys

    def statistics(self) -> dict[Site, KeyStatistics]:
        """What the sums amount to."""
        mark, probes = fingerprint(self._model), _probes(self._model, self._sites)
        return {
            site: KeyStatistics(
                site,
                (self._first[site] / self._n).cpu(),
                (self._second[site] / self._n).cpu(),
                self._n,
                mark,
                probes[site],
            )
            for site in self._sites
        }


def _probes(model: LensModel, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Norms of the keys at fixed token ids: the same for a model in any wrapping and dtype."""
    ids = [(37 * i + 1) % model.cfg.d_vocab for i in range(_PROBE)]
    layers = sorted({site.layer for site in sites})
    matrices = list(dict.fromkeys(site.matrix for site in sites))
    passed = keys_of(model, padded(model, [ids]), matrices, layers)
    return {site: passed[site][0].norm(dim=-1).float().cpu() for site in sites}


def _check(model: LensModel, statistics: Mapping[Site, KeyStatistics]) -> None:
    probes = _probes(model, list(statistics))
    for site, one in statistics.items():
        same = torch.allclose(probes[site], one.probe, rtol=_SAME, atol=1e-3)
        if len(one.mean) != _width(model, site) or not same:
            raise ValueError(
                f"these are the key statistics of {site} of another model (fingerprint"
                f" {one.fingerprint}; this one's is {fingerprint(model)}): its keys differ. Compute"
                f" this model's with bwlens.edit.key_statistics(model, texts)"
            )


def _width(model: LensModel, site: Site) -> int:
    from bwlens.model.weights import weight_of

    return weight_of(model, site).shape[0]


def _windows(
    model: LensModel, documents: list[str], window: int, limit: int | None, prepend_bos: bool | None
) -> list[list[int]]:
    """The documents' tokens in windows, up to the limit."""
    windows, n = [], 0
    for document in documents:
        ids = text_to_ids(model, document, prepend_bos)
        for start in range(0, len(ids), window):
            piece = ids[start : start + window]
            piece = piece if limit is None else piece[: limit - n]
            if not piece:
                return windows
            windows.append(piece)
            n += len(piece)
    return windows


def _documents(texts: Sequence[str] | str | os.PathLike[str]) -> list[str]:
    if isinstance(texts, str | os.PathLike):
        path = Path(texts)
        if path.suffix not in (".json", ".txt") or not path.is_file():
            raise ValueError(
                f"{texts!r} is no .json or .txt file here; give one, or a list of documents"
            )
        return read_texts(str(path))
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise ValueError("no text was given; key statistics are taken over documents")
    return documents


def _cached(model: LensModel, documents: list[str], settings: list[Any]) -> Path:
    held = hashlib.sha256(json.dumps(settings).encode())
    for document in documents:
        held.update(hashlib.sha256(document.encode()).digest())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    room = Path(os.environ.get("BWLENS_CACHE") or Path(base) / "bwlens")
    return room / "statistics" / f"{fingerprint(model)}-{held.hexdigest()[:16]}.safetensors"


def _unpacked(packed: Tensor, width: int) -> Tensor:
    """C out of the lower triangle of its inverse factor."""
    inverse = torch.zeros(width, width, dtype=torch.float64)
    low = torch.tril_indices(width, width)
    inverse[low[0], low[1]] = packed.double()
    eye = torch.eye(width, dtype=torch.float64)
    factor = torch.linalg.solve_triangular(inverse, eye, upper=False)
    return factor @ factor.T
