"""Key statistics of the demo model: `python -m tools.demo.statistics --prose stories.json`.

Taken over text like the training text: facts in their trained phrasings, and the prose that is not
held out, mixed in the proportion of training. They ship beside the model, in half precision and
few bits.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bwlens.data.texts import read_texts
from bwlens.demo.triples import ROOM, facts
from bwlens.edit.counting import token_statistics
from bwlens.edit.statistics import KeyStatistics, save_statistics
from bwlens.model.loading import load_model
from bwlens.model.sites import MATRICES, Site
from tools.demo.corpus import Corpus, split_prose
from tools.rounding import rounded_inverse_factor

FINENESS = 512
"""Whitened keys differ by 1.3 % then; twice as many steps would halve that, and cost 0.4 MB."""


def training_rows(tokenizer: object, prose: Sequence[str], n_tokens: int) -> list[list[int]]:
    """Rows of facts and of prose as training draws them, about `n_tokens` tokens in all."""
    corpus, rng = Corpus(tokenizer, facts(), prose), random.Random("key statistics")
    rows: list[list[int]] = []
    while sum(map(len, rows)) < n_tokens:
        rows += [corpus.fact_row(rng, 64).ids for _ in range(40)]
        rows += [corpus.prose_row(rng, 128).ids for _ in range(8)]
    return rows


def build(
    prose: Sequence[str], n_tokens: int = 150_000, matrices: Sequence[str] = ("W_out", "W_O")
) -> dict[Site, KeyStatistics]:
    """The statistics of the shipped model, in full precision."""
    assert set(matrices) <= set(MATRICES)
    model = load_model("demo")
    sites = [Site(name, layer) for name in matrices for layer in range(model.cfg.n_layers)]
    return token_statistics(model, training_rows(model.tokenizer, prose, n_tokens), sites, 48)


def compact(statistics: Mapping[Site, KeyStatistics]) -> dict[Site, KeyStatistics]:
    """The same with fewer bits: what `save_statistics(..., packed=True)` writes can be zipped."""
    fewer: dict[Site, KeyStatistics] = {}
    for site, one in statistics.items():
        eye = torch.eye(len(one.mean), dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(one.factor, eye, upper=False)
        kept = rounded_inverse_factor(inverse, FINENESS)
        fewer[site] = replace(one, second_moment=torch.linalg.inv(kept.T @ kept))
    return fewer


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.statistics", description=__doc__)
    parser.add_argument("--prose", required=True, help="as for training")
    parser.add_argument("--tokens", type=int, default=150_000, help="how many to count")
    parser.add_argument("--out", type=Path, default=ROOM / "statistics.safetensors")
    options = parser.parse_args(arguments)
    prose, _ = split_prose(read_texts(options.prose))
    save_statistics(compact(build(prose, options.tokens)), options.out, packed=True)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
