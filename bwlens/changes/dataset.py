"""A data set about to be trained on, in words: what each example's gradient would write.

Examples stream: a batch is read with one forward and one backward pass, its rows go to Parquet, and
what is kept of the gradients is a sketch of each and of their sum, so that memory does not grow.
Stopped and started again a run carries on (`bwlens.runs.parts`).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves functions untyped.)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.changes.lens import READINGS
from bwlens.changes.sketches import RANK, SUM, Summing, projections, sketching, widths
from bwlens.changes.streaming import Parts, captured, counted, tokenised
from bwlens.gradient.capturing import Gradients
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.gradient.spectra import by_prompt
from bwlens.lens.asking import whole_number
from bwlens.model.identity import fingerprint, model_label
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, resolve_layers, resolve_matrices
from bwlens.model.tokens import token_texts
from bwlens.reading.readouts import readout
from bwlens.reading.standardised import head_by
from bwlens.runs.parts import Failure, Part, Process, Run, read_failures, read_table
from bwlens.runs.tensors import read_tensors

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class DatasetLens:
    """What training on a data set would write; in a folder, read when it is asked for.

    Attributes:
        folder: Where it lies.
        model: What the model is called.
        matrix: The matrix whose shift is read in words.
        failures: The examples that could not be read: index and why.
    """

    folder: Path
    model: str
    matrix: str
    failures: tuple[Failure, ...]
    sites: tuple[Site, ...] = field(repr=False)

    def examples(self) -> pd.DataFrame:
        """A row for each example: item, text, tokens, learned, loss, norm."""
        return read_table(self.folder, "examples")

    def writes(self) -> pd.DataFrame:
        """A row for each example, layer and strongest token: what a descent step writes there.

        Columns: item, layer, pos, token, size (norm of that token's part), promoted, suppressed.
        """
        return read_table(self.folder, "writes")

    def search(self, word: str, *, layer: int | None = None, which: str = "promoted") -> Any:
        """The rows of `writes` that promote (or suppress) a word, the strongest first.

        Words are compared as written, or, without a blank before, by their letters.

        Raises:
            ValueError: `which` is neither "promoted" nor "suppressed".
        """
        if which not in ("promoted", "suppressed"):
            raise ValueError(f"which is {which!r}; expected 'promoted' or 'suppressed'")
        rows = self.writes()
        if layer is not None:
            rows = rows[rows["layer"] == layer]
        exact = word.startswith(" ")
        hit = [any((w if exact else w.strip()) == word for w in words) for words in rows[which]]
        found: Any = rows.loc[np.array(hit, dtype=bool)]  # pandas' types are wider
        texts = self.examples().set_index("item")["text"]
        return found.assign(text=found["item"].map(texts)).sort_values("size", ascending=False)

    def words(self, k: int = 20, *, layer: int | None = None) -> pd.DataFrame:
        """The words that most examples promote: word, and in how many examples it is.

        Raises:
            ValueError: `k` is no whole number from 1.
        """
        rows: Any = self.writes()
        rows = rows if layer is None else rows[rows["layer"] == layer]
        pairs = rows[["item", "promoted"]].explode("promoted").drop_duplicates()
        counts = pairs["promoted"].value_counts().head(whole_number(k, "k"))
        return counts.rename_axis("word").rename("examples").reset_index()

    def summed(self) -> WeightChange:
        """The step along minus the sum of all gradients, in its best rows, to be read.

        Example:
            >>> bwlens.read_change(model, dataset.summed()).promoted()  # doctest: +SKIP
        """
        state, _ = read_tensors(self.folder / SUM, "DatasetSum", "read_dataset")
        parts: dict[Site, LowRankMatrix] = {}
        for i, site in enumerate(self.sites):
            Y, Z = state[f"Y{i}"].double(), state[f"Z{i}"].double()
            B = projections(site, *widths(state, i))[1].double()
            Q = torch.linalg.qr(Y).Q
            inner = torch.linalg.lstsq(B @ Q, Z).solution
            U, S, Vh = torch.linalg.svd(inner, full_matrices=False)
            keep = S[:RANK] > S[0] * 1e-6
            root = S[:RANK][keep, None].sqrt()
            x, delta = root * (Q @ U[:, :RANK][:, keep]).T, -root * Vh[:RANK][keep]
            parts[site] = LowRankMatrix(x.float(), delta.float())
        return WeightChange(parts, f"minus the summed gradient of {self.folder.name}")

    def cosines(self) -> np.ndarray:
        """Cosines of the examples' gradients, from their sketches [example, example]."""
        rows = self._sketches()
        return rows @ rows.T

    def clusters(self, n: int = 5, seed: int = 0) -> pd.DataFrame:
        """Examples by the direction of their gradients: item, cluster, text (spherical k-means).

        Raises:
            ValueError: More clusters than examples.
        """
        rows, table = self._sketches(), self.examples()
        if not 1 <= n <= len(rows):
            raise ValueError(f"{n} clusters of {len(rows)} examples")
        rng = np.random.default_rng(seed)
        centres = [rows[rng.integers(len(rows))]]
        for _ in range(n - 1):  # the farthest from those there are
            centres.append(rows[(rows @ np.stack(centres).T).max(1).argmin()])
        middle, own = np.stack(centres), np.zeros(len(rows), dtype=int)
        for _ in range(50):
            own = (rows @ middle.T).argmax(1)
            sums = [rows[own == c].sum(0) if (own == c).any() else middle[c] for c in range(n)]
            moved = np.stack([s / max(float(np.linalg.norm(s)), 1e-30) for s in sums])
            if np.allclose(moved, middle):
                break
            middle = moved
        return table[["item", "text"]].assign(cluster=own)[["item", "cluster", "text"]]

    def _sketches(self) -> np.ndarray:
        rows = np.stack(read_table(self.folder, "sketches")["sketch"].to_list()).astype(np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)

    def save(self, path: str | Path) -> Path:
        """Write a page (.html) with a search over examples, words and layers."""
        from bwlens.runs.paths import writable
        from bwlens.show.dataset import page

        path = writable(path, (".html",))
        path.write_text(page(self), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        n, words = len(self.examples()), ", ".join(w.strip() for w in self.words(8)["word"])
        failed = f", {len(self.failures)} not read" if self.failures else ""
        return f"DatasetLens({n} examples{failed} of {self.model}; most promote: {words})"


def read_dataset(
    model: LensModel,
    examples: Any,
    folder: str | Path,
    *,
    matrix: str = "W_out",
    layers: Layers = None,
    top_k: int = 5,
    positions: int = 1,
    reading: str = "dual",
    batch_size: int = 16,
    part_size: int = 128,
    max_tokens: int = 256,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> DatasetLens:
    """What training on each example would write, in words; streamed into a folder.

    Args:
        model: The model; it is left as it is.
        examples: Texts, (prompt, answer) pairs, mappings (text; prompt and answer; messages),
            records, or a .jsonl, .json, .csv or .txt file. Of pairs and chats the answer is
            learned, of texts all tokens.
        folder: Where the rows go; a run of the same settings that is there is carried on.
        matrix: The matrix whose gradient is read: W_out, or W_O.
        layers: Which layers; None for all.
        top_k: Words kept at each end.
        positions: How many of an example's tokens are read in each layer, the strongest first.
        reading: "dual", "cosine" or "plain".
        batch_size: Examples read at once; those of like length go together.
        part_size: Examples between two writings to the disk.
        max_tokens: Longer examples are cut.
        prepend_bos: As for `capture`.
        progress: Whether to show a bar.

    Raises:
        ValueError: No example can be read; a folder with a run of other settings or examples. Rows
            that are empty or broken are left out and named in `failures`.

    Example:
        >>> data = read_dataset(model, "train.jsonl", "runs/train")  # doctest: +SKIP
        >>> data.search(" Paris", layer=12)  # doctest: +SKIP
    """
    (matrix,) = resolve_matrices(matrix)
    if matrix not in ("W_out", "W_O"):
        raise ValueError(f"matrix is {matrix!r}; what is written is read of W_out or W_O")
    if reading not in READINGS:
        raise ValueError(f"reading is {reading!r}; there are {', '.join(READINGS)}")
    whole_number(top_k, "top_k", model.cfg.d_vocab)
    for name, number in (
        ("positions", positions), ("batch_size", batch_size), ("part_size", part_size),
        ("max_tokens", max_tokens),
    ):  # fmt: skip
        whole_number(number, name)
    wanted = resolve_layers(model, layers)
    head = head_by(model, reading, False)
    sizes, mark = counted(examples, part_size)
    settings = {
        "model": model_label(model), "weights": fingerprint(model), "examples": mark,
        "matrix": matrix, "layers": wanted, "top_k": top_k, "positions": positions,
        "reading": reading, "max_tokens": max_tokens, "prepend_bos": prepend_bos,
        "part_size": part_size,
    }  # fmt: skip
    run = Run(folder, settings, sizes)
    sites: list[Site] = [Site(matrix, layer) for layer in wanted]
    summing = Summing(Path(folder) / SUM, sites)
    reader = Parts(examples, part_size)

    def work(part: int) -> Part:
        import pandas as pd

        tables: dict[str, list[Any]] = {"examples": [], "writes": [], "sketches": []}
        failures: list[Failure] = []
        rows = tokenised(model, reader.part(part), max_tokens, prepend_bos, failures)
        rows.sort(key=lambda row: len(row[2]))
        for at in range(0, len(rows), batch_size):
            batch = rows[at : at + batch_size]
            grads = captured(model, batch, matrix, wanted)
            _rows_of(model, head, grads, batch, sites, top_k, positions, tables)
            summing.add(part, grads)
        summing.save(part)
        order = sorted(range(len(tables["examples"])), key=lambda i: tables["examples"][i]["item"])
        tables["examples"] = [tables["examples"][i] for i in order]
        tables["sketches"] = [tables["sketches"][i] for i in order]
        tables["writes"].sort(key=lambda row: (row["item"], row["layer"]))
        return Part({name: pd.DataFrame(rows) for name, rows in tables.items()}, failures)

    run.work(work, process=Process(), progress=progress, label="Reading examples")
    failures = tuple(read_failures(folder))
    if len(failures) >= sum(sizes):
        raise ValueError(
            f"none of the {sum(sizes)} examples could be read; the first:"
            f" {failures[0].message if failures else 'there is none'}"
        )
    return DatasetLens(Path(folder), model_label(model), matrix, failures, tuple(sites))


# What is kept of a batch.


def _rows_of(
    model: Any,
    head: Any,
    grads: Gradients,
    batch: Any,
    sites: Sequence[Site],
    top_k: int,
    positions: int,
    tables: dict[str, list[Any]],
) -> None:
    n = len(batch)
    squares = torch.zeros(n, dtype=torch.float64)
    sketches: list[Tensor] = []
    chosen: list[tuple[int, int, int, float]] = []
    rows: list[Tensor] = []
    for site in sites:
        gradient = grads[site]
        assert gradient.prompt is not None
        assert gradient.pos is not None
        _, (x, delta, pos) = by_prompt(gradient.prompt, gradient.x, gradient.delta, gradient.pos)
        P, Q = sketching(site, x.shape[2], delta.shape[2])
        gram = (x @ x.mT) * (delta @ delta.mT)
        squares += gram.double().sum((1, 2)).clamp_min(0).cpu()
        sketches.append(((x @ P.to(x)).mT @ (delta @ Q.to(x))).flatten(1).cpu())
        best = (x.norm(dim=2) * delta.norm(dim=2)).topk(min(positions, x.shape[1]))
        sizes, places = best.values.tolist(), pos.gather(1, best.indices).tolist()
        for i, pairs in enumerate(zip(places, sizes, strict=True)):
            found = zip(*pairs, strict=True)
            chosen += [(i, site.layer, at, size) for at, size in found if size > 0]
        strongest = delta.gather(1, best.indices[..., None].expand(-1, -1, delta.shape[2]))
        rows.append(strongest[best.values > 0].to(head.W_U.device))
    vectors = -torch.cat(rows)  # a descent step subtracts
    read = readout(head, vectors, top_k, normalize=True)
    ids = torch.cat([read.top_ids, read.bottom_ids], 1).cpu()
    words = dict(
        zip((unique := ids.unique().tolist()), token_texts(model.tokenizer, unique), strict=True)
    )
    said = [[words[i] for i in row] for row in ids.tolist()]
    sketch = torch.cat(sketches, 1).half()
    for i, (item, example, tokens, start) in enumerate(batch):
        tables["examples"].append(
            {
                "item": item,
                "text": example.text[:400],
                "tokens": len(tokens),
                "learned": len(tokens) - start,
                "loss": float(grads.losses[i]),
                "norm": float(squares[i]) ** 0.5,
            }
        )
        tables["sketches"].append({"item": item, "sketch": sketch[i].numpy()})
    texts = {i: token_texts(model.tokenizer, ids) for i, (_, _, ids, _) in enumerate(batch)}
    for (i, layer, pos, size), row in zip(chosen, said, strict=True):
        tables["writes"].append(
            {
                "item": batch[i][0],
                "layer": layer,
                "pos": pos,
                "token": texts[i][pos],
                "size": size,
                "promoted": row[:top_k],
                "suppressed": row[top_k:],
            }
        )
