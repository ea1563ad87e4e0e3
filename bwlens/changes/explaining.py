"""Which examples a change comes from: those whose own descent steps lie closest to it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves functions untyped.)

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bwlens.changes.streaming import captured, chunks, counted, numbered, tokenised
from bwlens.changes.taking import as_change
from bwlens.gradient.capturing import Gradients
from bwlens.gradient.spectra import by_prompt
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, resolve_layers, resolve_matrices
from bwlens.runs.parts import Failure, progress_bar

if TYPE_CHECKING:
    import pandas as pd


def explain(
    model: LensModel,
    change: Any,
    examples: Any,
    *,
    matrices: Sequence[str] | str | None = None,
    layers: Layers = None,
    batch_size: int = 16,
    max_tokens: int = 256,
    prepend_bos: bool | None = None,
    by: str = "all",
    progress: bool = False,
) -> pd.DataFrame:
    """The examples whose descent steps lie closest to a change, the closest first.

    `cosine` is that of -dL/dW of the example and the change, over all matrices of the change that
    are read, exact from the factors; nothing is kept of an example but its figures. With `by`
    "layer", "matrix" or "site" there is a column for each as well.

    Args:
        model: The model before the change.
        change: As for `read_change`.
        examples: As for `read_dataset`.
        matrices: Which of the change's matrices; None for all.
        layers: Which layers; None for all.
        batch_size: Examples read at once.
        max_tokens: Longer examples are cut.
        prepend_bos: As for `capture`.
        by: "all", "layer", "matrix" or "site".
        progress: Whether to show a bar.

    Raises:
        ValueError: A change of none of these matrices, an unknown `by`, or no example that could be
            read. Examples that cannot be read are left out.
    """
    import pandas as pd

    if by not in ("all", "layer", "matrix", "site"):
        raise ValueError(f"by is {by!r}; expected 'all', 'layer', 'matrix' or 'site'")
    given = as_change(model, change)
    names = None if matrices is None else resolve_matrices(matrices)
    wanted = None if layers is None else resolve_layers(model, layers)
    parts = {
        site: part
        for site, part in given.items()
        if (names is None or site.matrix in names) and (wanted is None or site.layer in wanted)
    }
    if not parts:
        raise ValueError(f"{given!r} changes none of the matrices asked for")
    keys = {site: _key(site, by) for site in parts}
    squares: dict[str, float] = {}
    for site, part in parts.items():
        squares[keys[site]] = squares.get(keys[site], 0.0) + float(part.norm()) ** 2
    chosen = list(dict.fromkeys(site.matrix for site in parts))
    at_layers = sorted({site.layer for site in parts})
    sizes, _ = counted(examples, 10**9)
    failures: list[Failure] = []
    table: list[dict[str, Any]] = []
    with progress_bar("Explaining", sum(sizes), shown=progress) as advance:
        for some in chunks(numbered(examples), 8 * batch_size):
            rows = tokenised(model, some, max_tokens, prepend_bos, failures)
            rows.sort(key=lambda row: len(row[2]))
            for at in range(0, len(rows), batch_size):
                batch = rows[at : at + batch_size]
                grads = captured(model, batch, chosen, at_layers)
                table += _closeness(grads, batch, parts, keys, squares)
            advance(len(some))
    if not table:
        why = failures[0].message if failures else "there is none"
        raise ValueError(f"no example could be read: {why}")
    frame = pd.DataFrame(table).sort_values("cosine", ascending=False, kind="stable")
    return frame.reset_index(drop=True)


def _key(site: Site, by: str) -> str:
    named = {"layer": f"layer {site.layer}", "matrix": site.matrix, "site": str(site)}
    return named.get(by, "")


def _closeness(
    grads: Gradients, batch: Any, parts: Any, keys: Any, squares: dict[str, float]
) -> list[dict[str, Any]]:
    n, device = len(batch), grads.losses.device
    inner, norms = (
        {key: torch.zeros(n, dtype=torch.float64, device=device) for key in squares}
        for _ in range(2)
    )
    for site, part in parts.items():
        if site not in grads:
            continue
        gradient = grads[site]
        assert gradient.prompt is not None
        numbers, (x, delta) = by_prompt(gradient.prompt, gradient.x, gradient.delta)
        along = (x @ part.x.to(x).T) * (delta @ part.delta.to(x).T)
        gram = (x @ x.mT).double() * (delta @ delta.mT).double()
        for sums, each in ((inner, -along.double()), (norms, gram)):
            each = each.sum((1, 2)).to(device)
            sums[keys[site]].index_add_(0, numbers.to(device), each)
    inner = {key: values.cpu() for key, values in inner.items()}
    norms = {key: values.clamp_min(0).cpu() for key, values in norms.items()}
    total = sum(squares.values()) ** 0.5
    rows = []
    for i, (item, example, ids, _) in enumerate(batch):
        norm = float(sum(v[i] for v in norms.values())) ** 0.5
        dot = float(sum(v[i] for v in inner.values()))
        row = {
            "item": item,
            "text": example.text,
            "tokens": len(ids),
            "loss": float(grads.losses[i]),
            "cosine": dot / max(norm * total, 1e-300),
            "inner": dot,
        }
        for key in squares:
            if key:
                length = float(norms[key][i]) ** 0.5 * squares[key] ** 0.5
                row[key] = float(inner[key][i]) / max(length, 1e-300)
        rows.append(row)
    return rows
