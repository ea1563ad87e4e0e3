"""What every Backpack reads and is asked: rows of facts and prose, questions, held-out prose.

Made once and kept as arrays, so that all arms of a seed read the same tokens in the same order.
"""

import random
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from bwlens.demo.triples import MODEL_DIR, facts
from tools.demo.corpus import Corpus, split_prose

CONTEXT = 128
FACT_ROWS, PROSE_ROWS = 20, 8
PHRASINGS = ("trained", "unpaired", "unseen")


def tokenizer() -> Any:
    """The demo model's: every answer is one token."""
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def make_rows(path: Path, prose: Sequence[str], seed: int, steps: int, processes: int = 1) -> None:
    """Save ids [steps, rows, context], and kinds beside them, unless they are there.

    A step's rows depend on the seed and the step's number alone.
    """
    if (path / f"ids-{seed}.npy").exists() and len(
        np.load(path / f"ids-{seed}.npy", mmap_mode="r")
    ) >= steps:
        return
    cuts = np.linspace(0, steps, processes * 2 + 1).astype(int)
    parts = [(prose, seed, a, b) for a, b in pairwise(cuts)]
    if processes == 1:
        made = [_rows(*part) for part in parts]
    else:
        with get_context("fork").Pool(processes) as pool:
            made = pool.starmap(_rows, parts)
    np.save(path / f"kinds-{seed}.npy", np.concatenate([kinds for _, kinds in made]))
    np.save(path / f"ids-{seed}.npy", np.concatenate([ids for ids, _ in made]))


def _rows(prose: Sequence[str], seed: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    corpus = Corpus(tokenizer(), facts(), prose)
    ids = np.zeros((last - first, FACT_ROWS + PROSE_ROWS, CONTEXT), np.int16)
    kinds = np.zeros(ids.shape, np.uint8)
    for step in range(first, last):
        rng = random.Random(f"backpack|{seed}|{step}")
        rows = [corpus.fact_row(rng, CONTEXT) for _ in range(FACT_ROWS)]
        rows += [corpus.prose_row(rng, CONTEXT) for _ in range(PROSE_ROWS)]
        ids[step - first] = [row.ids for row in rows]
        kinds[step - first] = [row.kinds for row in rows]
    return ids, kinds


def make_questions(path: Path, documents: Sequence[str]) -> None:
    """Save every fact's prompts and their answers, and the held-out prose in windows."""
    if (path / "questions.npz").exists():
        return
    encode = tokenizer()
    prompts, answers, owners, phrasings = [], [], [], []
    for i, fact in enumerate(facts()):
        for p, phrasing in enumerate(PHRASINGS):
            for prompt in fact.prompts(phrasing):  # pyright: ignore[reportArgumentType]
                prompts.append(prompt)
                answers.append(fact.answer)
                owners.append(i)
                phrasings.append(p)
    ids = encode(prompts).input_ids
    windows = []
    end = encode.eos_token_id
    for document in documents:
        words = encode(document.replace("\n\n", "\n"), verbose=False).input_ids
        windows += [[end, *words[i : i + CONTEXT - 1]] for i in range(0, len(words), CONTEXT - 1)]
    np.savez(
        path / "questions.npz",
        prompts=_padded(ids),
        lengths=[len(row) for row in ids],
        answers=[row[0] for row in encode(answers).input_ids],
        facts=owners,
        phrasings=phrasings,
        windows=_padded(windows),
        window_lengths=[len(row) for row in windows],
    )


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    padded = np.zeros((len(rows), max(map(len, rows))), np.int16)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


def prepare(
    path: Path, documents: Sequence[str], steps: dict[int, int], processes: int = 1
) -> None:
    """Everything above for `steps` of each seed, in the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    kept, held_out = split_prose(documents)
    make_questions(path, held_out)
    for seed, n in steps.items():
        make_rows(path, kept, seed, n, processes)
