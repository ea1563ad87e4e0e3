"""Statistics of keys: the second moment of what enters a weight, over a text.

With C = E[k k^T] over many tokens, a key is *whitened* by C^-1: `C^-1 k` answers to k and as little
as possible to what other tokens bring there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from bwlens.data.texts import read_texts
from bwlens.edit.cache import cache_path, kept_files
from bwlens.edit.keys import key_taps, keys_of
from bwlens.model.identity import fingerprint, is_demo, model_label
from bwlens.model.prompts import Batch, padded
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site
from bwlens.model.tokens import text_to_ids
from bwlens.model.weights import weight_of
from bwlens.runs.parts import progress_bar
from bwlens.runs.tensors import read_tensors, write_tensors

_PROBE = 8  # Tokens whose keys tell one model from another.
_RIDGE = 1e-6
_SAME = 0.02  # Share by which the sizes of those keys may differ (half precision).
_AGREEING = 64  # Keys by which convergence is told.
_SAVED_EVERY = 300.0  # Seconds between two writings of unfinished sums.
_MOMENTS = ("first", "second")


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


def key_statistics(
    model: LensModel,
    texts: Sequence[str] | str | os.PathLike[str],
    *,
    matrix: str | Sequence[str] = "W_out",
    layers: Layers = None,
    max_tokens: int | None = 100_000,
    window: int | None = None,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
    cache: bool = True,
) -> dict[Site, KeyStatistics]:
    """Mean and second moment of a weight's input over a text, all layers in the same passes.

    `C = sum_t k_t k_t^T / n` over the tokens t of all documents, in float64; kept on disk by model,
    text and settings (`$BWLENS_CACHE`, or `bwlens` in the user's cache folder), where editing
    methods look for them by themselves. What was stopped goes on where it was.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was.
        texts: Documents, or a file of them: a JSON list of strings, or text with two blank lines
            between documents. ROME takes 100,000 samples of Wikipedia.
        matrix: Whose input: "W_out" (the papers'), "W_O", or any of `bwlens.MATRICES`; several are
            counted in the same passes.
        layers: Layers from 0; None for all.
        max_tokens: Stop after this many tokens; None for all.
        window: Tokens in a window; None for the model's context, at most 512.
        batch_size: Windows in a batch.
        prepend_bos: None is the model's own default.
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
    sites = [tap.site for tap in key_taps(model, matrix, layers)]
    window = window or min(512, getattr(model.cfg, "n_ctx", None) or 512)
    settings = [matrix, [s.layer for s in sites], max_tokens, window, prepend_bos]
    path = cache_path(model, documents, settings) if cache else None
    if path is not None and path.exists():
        return load_statistics(path)
    windows = _windows(model, documents, window, max_tokens, prepend_bos)
    counted = _Sums(model, sites)
    if path is None:
        counted.over(windows, batch_size)
        return counted.statistics()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    counted.over(windows, batch_size, partial)
    statistics = counted.statistics()
    save_statistics(statistics, path)
    partial.unlink(missing_ok=True)
    return statistics


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


class _Sums:
    """Sums of keys and of their outer products, over batches; of every second one's in `half`."""

    def __init__(self, model: LensModel, sites: list[Site]) -> None:
        self._model, self._sites = model, sites
        self._sums: dict[str, Tensor] = {}
        self._n, self._half = 0, 0
        matrices = dict.fromkeys(site.matrix for site in sites)
        of_each = ([site for site in sites if site.matrix == matrix] for matrix in matrices)
        self._middle = {several[len(several) // 2] for several in of_each}
        self._last: dict[Site, Tensor] = {}

    def over(self, windows: list[list[int]], batch_size: int, partial: Path | None = None) -> None:
        """Count the windows' tokens, with a progress bar.

        What is counted is written to `partial` every few minutes, and taken up from there.
        """
        if not windows:
            raise ValueError("the text holds no tokens; give some documents")
        windows = sorted(windows, key=len)
        done = self._take_up(partial) if partial is not None and partial.exists() else 0
        saved = time.monotonic()
        with progress_bar("Key statistics", len(windows), done) as advance:
            for start in range(done, len(windows), batch_size):
                batch = padded(self._model, windows[start : start + batch_size])
                self._add(batch, half=start // batch_size % 2 == 0)
                advance(len(batch.tokens))
                if partial is not None and time.monotonic() - saved > _SAVED_EVERY:
                    about = {"done": start + batch_size, "n": self._n, "half": self._half}
                    named = {name: str(value) for name, value in about.items()}
                    write_tensors(partial, self._sums, "KeySums", named)
                    saved = time.monotonic()

    def _take_up(self, partial: Path) -> int:
        """Go on with what a stopped run had counted: so many windows."""
        self._sums, about = read_tensors(partial, "KeySums", "key_statistics")
        self._n, self._half = int(about["n"]), int(about["half"])
        return int(about["done"])

    def _add(self, batch: Batch, half: bool) -> None:
        passed = _keys(self._model, batch, self._sites)
        self._n += batch.n_rows
        self._half += batch.n_rows if half else 0
        for site in self._sites:
            keys = passed[site][batch.mask].double().cpu()
            square = keys.T @ keys
            self._count(f"{site} first", keys.sum(0))
            self._count(f"{site} second", square)
            if site in self._middle:
                self._last[site] = keys[-_AGREEING:]
                if half:
                    self._count(f"{site} half", square)

    def _count(self, name: str, added: Tensor) -> None:
        self._sums[name] = self._sums[name] + added if name in self._sums else added

    def statistics(self) -> dict[Site, KeyStatistics]:
        """What the sums amount to."""
        mark, probes = fingerprint(self._model), _probes(self._model, self._sites)
        found: dict[Site, KeyStatistics] = {}
        for site in self._sites:
            first, second = (self._sums[f"{site} {which}"] / self._n for which in _MOMENTS)
            one = KeyStatistics(site, first, second, self._n, mark, probes[site])
            found[site] = replace(one, convergence=self._convergence(one))
        return found

    def _convergence(self, one: KeyStatistics) -> float | None:
        if one.site not in self._last or not len(one.mean) <= self._half < self._n:
            return None
        moment = self._sums[f"{one.site} half"] / self._half
        by_half = replace(one, second_moment=moment, n_tokens=self._half)
        keys = self._last[one.site]
        cosine = torch.cosine_similarity(by_half.whitened(keys), one.whitened(keys), dim=-1)
        return float(cosine.mean())


def _keys(model: LensModel, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
    matrices = list(dict.fromkeys(site.matrix for site in sites))
    return keys_of(model, batch, matrices, sorted({site.layer for site in sites}))


def _probes(model: LensModel, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Norms of the keys at fixed token ids: the same for a model in any wrapping and dtype."""
    ids = [(37 * i + 1) % model.cfg.d_vocab for i in range(_PROBE)]
    passed = _keys(model, padded(model, [ids]), sites)
    return {site: passed[site][0].norm(dim=-1).float().cpu() for site in sites}


def _check(model: LensModel, statistics: Mapping[Site, KeyStatistics]) -> None:
    probes = _probes(model, list(statistics))
    for site, one in statistics.items():
        same = torch.allclose(probes[site], one.probe, rtol=_SAME, atol=1e-3)
        if len(one.mean) != weight_of(model, site).shape[0] or not same:
            raise ValueError(
                f"these are the key statistics of {site} of another model (fingerprint"
                f" {one.fingerprint}; this one's is {fingerprint(model)}): its keys differ. Compute"
                f" this model's with bwlens.edit.key_statistics(model, texts)"
            )


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


def _unpacked(packed: Tensor, width: int) -> Tensor:
    """C out of the lower triangle of its inverse factor."""
    inverse = torch.zeros(width, width, dtype=torch.float64)
    low = torch.tril_indices(width, width)
    inverse[low[0], low[1]] = packed.double()
    eye = torch.eye(width, dtype=torch.float64)
    factor = torch.linalg.solve_triangular(inverse, eye, upper=False)
    return factor @ factor.T
