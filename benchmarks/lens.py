"""The whole lens, beside the `BackwardLens` tool that TransformerLens 4.2 has."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch

import bwlens
from benchmarks.measure import Note, Row, held_bytes, race, timed, weigh
from benchmarks.model import TARGET, text
from benchmarks.peer import OtherProcess, Tool, is_here
from benchmarks.setting import Setting


def lens(setting: Setting) -> list[Row | Note]:
    """`bwlens.backward_lens` of text, by its default settings."""
    model = setting.model
    # The BOS token is prepended.
    prompt = text(setting.tokens[1:])

    def ours() -> Any:
        return bwlens.backward_lens(model, prompt, f" t{TARGET}")

    if setting.peer is not None:
        peer = OtherProcess(setting.peer, setting, prompt)
    elif is_here():
        peer = Tool(model, prompt)
    else:
        return [
            Note(
                "lens: left out, as this transformer_lens has no BackwardLens; run with --peer"
                " PYTHON, an interpreter with transformer_lens 4.2, or run all of it there"
            )
        ]
    with closing(peer):
        where = "here" if isinstance(peer, Tool) else "in a process of its own"
        speed = race(
            "lens / TransformerLens 4.2's BackwardLens",
            timed(ours),
            peer.seconds,
            setting.repeats,
            0.35,
        )
        theirs = peer.numbers()
    found = ours()
    return [
        speed,
        weigh("the same, tensors held by the result", held_bytes(found), theirs["held_bytes"], 0.1),
        Note(f"lens: TransformerLens' tool ran {where}; both say, where they mean the same:"),
        *map(Note, _agreement(found, theirs)),
    ]


def _agreement(found: Any, theirs: dict[str, Any]) -> list[str]:
    """How far the two say the same; vectors that are zero have no reading and are left out."""
    if list(found.token_ids) != theirs["token_ids"]:
        raise RuntimeError("the two tools read different tokens")
    lines = [f"  loss: {found.loss:.6f} and {theirs['loss']:.6f}"]
    for matrix, of in (("W_in", "x"), ("W_out", "delta")):
        read, other = found.readout(matrix), theirs[matrix]
        alive = ~torch.tensor(other["zero"])
        if not torch.equal(alive, ~read.zero):
            raise RuntimeError(f"{matrix}: the two tools disagree on which vectors are zero")
        norms = found.norms(matrix, of)[alive], torch.tensor(other["norms"])[alive]
        apart = float(((norms[0] - norms[1]).abs() / norms[1]).max())
        parts = [f"norms of {of} within {apart:.1e}"]
        for name, mine in (
            ("ranks", read.ranks[..., 0]),
            ("top", read.top_ids),
            ("bottom", read.bottom_ids),
        ):
            pair = mine[alive], torch.tensor(other[name])[alive]
            parts.append(f"{name} equal in {float((pair[0] == pair[1]).double().mean()):.2%}")
            if name == "ranks":
                parts[-1] += f", {int((pair[0] - pair[1]).abs().max())} apart at most"
        lines.append(f"  {matrix}, {int(alive.sum())} vectors: {'; '.join(parts)}")
    return lines
