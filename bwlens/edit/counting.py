"""Counting the statistics of keys: sums over a text, in passes that may be stopped and go on."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bwlens.data.texts import read_texts
from bwlens.edit.cache import cache_path
from bwlens.edit.keys import key_taps
from bwlens.edit.statistics import (
    KeyStatistics,
    keys_at,
    load_statistics,
    probes_of,
    save_statistics,
)
from bwlens.model.identity import fingerprint
from bwlens.model.prompts import Batch, padded
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site
from bwlens.model.tokens import text_to_ids
from bwlens.runs.parts import progress_bar
from bwlens.runs.tensors import read_tensors, write_tensors

_AGREEING = 64  # Keys by which convergence is told.
_SAVED_EVERY = 300.0  # Seconds between two writings of unfinished sums.
_MOMENTS = ("first", "second")


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
        passed = keys_at(self._model, batch, self._sites)
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
        mark, probes = fingerprint(self._model), probes_of(self._model, self._sites)
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
