"""`ChangeLens`: a change of weights, read in words, as a user holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bwlens.changes.change import WeightChange
from bwlens.changes.prompts import ChangeEffect
from bwlens.model.sites import Site
from bwlens.reading.readouts import Readout
from bwlens.runs.paths import writable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

READINGS = ("dual", "cosine", "plain")
KEPT = 200  # Words of a whole change, or of a layer, that a lens keeps.


@dataclass(frozen=True, eq=False, repr=False)
class ChangeLens:
    """What a change of weights answers to, writes and does. Made by `read_change`.

    A cell is one singular direction of one matrix' change. Holds no model.

    Attributes:
        change: The change that was read.
        model: What the model is called.
        reading: How vectors became words.
        sites: The matrix of each cell, layer by layer.
        numbers: Which of its matrix' directions each cell is, 0 the largest.
        sizes: Singular values [cell].
        shares: Of the squared norm of the matrix' change [cell].
        writes: What a direction adds to its matrix' output on the prompts, RMS over tokens [cell].
        norms: Frobenius norm of each matrix' change, all directions.
        imprint: What each direction answers to: the `Readout` [cell] of its input side.
        shift: What it writes: the `Readout` [cell] of its output side.
        chance_x, chance_delta: Share of random directions that are at least as legible [cell].
        effect: What the change does to the next words of the prompts; None if it was not measured.
        remarks: What there is to say: rows left out, shares kept, what could not be read.
    """

    change: WeightChange
    model: str
    reading: str
    sites: tuple[Site, ...]
    numbers: tuple[int, ...]
    sizes: Float[Tensor, " cell"]
    shares: Float[Tensor, " cell"]
    writes: Float[Tensor, " cell"]
    norms: dict[Site, float]
    imprint: Readout
    shift: Readout
    chance_x: Float[Tensor, " cell"]
    chance_delta: Float[Tensor, " cell"]
    effect: ChangeEffect | None
    remarks: tuple[str, ...]
    follow_ids: tuple[int, ...]
    _tallies: dict[str, dict[int | None, tuple[Tensor, Tensor]]] = field(repr=False)
    _random: dict[str, dict[int | None, float]] = field(repr=False)
    _words: dict[int, str] = field(repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are changed, ascending."""
        return tuple(sorted({site.layer for site in self.norms}))

    def promoted(self, k: int = 10, *, layer: int | None = None) -> pd.DataFrame:
        """The words that the change mostly writes, of a layer or of all: word, id, nats, chance.

        `nats` beyond chance, summed over directions, each weighed by its size over the largest;
        `chance` is what the first word of a random change of the same singular values reaches.

        Raises:
            ValueError: A layer that is not changed.
        """
        return self._table("promoted", k, layer)

    def suppressed(self, k: int = 10, *, layer: int | None = None) -> pd.DataFrame:
        """The words that it writes away from; as `promoted`."""
        return self._table("suppressed", k, layer)

    def answers_to(self, k: int = 10, *, layer: int | None = None) -> pd.DataFrame:
        """The words whose presence in the input sets it off; as `promoted`."""
        return self._table("answers_to", k, layer)

    def _table(self, which: str, k: int, layer: int | None) -> pd.DataFrame:
        import pandas as pd

        if layer is not None and layer not in self.layers:
            raise ValueError(f"layer {layer} is not changed; changed are {list(self.layers)}")
        ids, nats = self._tallies[which].get(layer, (torch.zeros(0, dtype=torch.long),) * 2)
        return pd.DataFrame(
            {
                "word": [self._words[i] for i in ids[:k].tolist()],
                "id": ids[:k].tolist(),
                "nats": nats[:k].tolist(),
                "chance": self._random[which].get(layer, 0.0),
            }
        )

    def words(self, which: Literal["imprint", "shift", "suppressed"], cell: int) -> list[str]:
        """The words of one direction, strongest first; none where that side cannot be read."""
        read = self.imprint if which == "imprint" else self.shift
        ids = read.bottom_ids if which == "suppressed" else read.top_ids
        return [self._words[i] for i in ids[cell].tolist() if i >= 0]

    def to_frame(self) -> pd.DataFrame:
        """A row for each direction, those that write most first.

        Columns: layer, matrix, expert (-1: none), direction, size, share, writes, answers_to,
        promotes, suppresses (lists of words), chance_x, chance_delta; rank_WORD for each word
        followed, its rank in what is written (0: most promoted).
        """
        import pandas as pd

        columns: dict[str, Any] = {
            "layer": [site.layer for site in self.sites],
            "matrix": [site.matrix for site in self.sites],
            "expert": [site.expert_number for site in self.sites],
            "direction": self.numbers,
            "size": self.sizes.tolist(),
            "share": self.shares.tolist(),
            "writes": self.writes.tolist(),
            "answers_to": [self.words("imprint", i) for i in range(len(self.sites))],
            "promotes": [self.words("shift", i) for i in range(len(self.sites))],
            "suppresses": [self.words("suppressed", i) for i in range(len(self.sites))],
            "chance_x": self.chance_x.tolist(),
            "chance_delta": self.chance_delta.tolist(),
        }
        for i, token in enumerate(self.follow_ids):
            assert self.shift.ranks is not None
            columns[f"rank_{self._words[token].strip()}"] = self.shift.ranks[:, i].tolist()
        frame = pd.DataFrame(columns)
        by = "writes" if frame["writes"].notna().any() else "size"
        return frame.sort_values(by, ascending=False, kind="stable").reset_index(drop=True)

    def by_layer(self, k: int = 5) -> pd.DataFrame:
        """A row for each changed layer: norm, and the words it promotes, suppresses, answers to."""
        import pandas as pd

        rows = []
        for layer in self.layers:
            squares = sum(n**2 for site, n in self.norms.items() if site.layer == layer)
            tables = {w: self._table(w, k, layer) for w in self._tallies}
            sides = {
                which: [
                    word
                    for word, nats, chance in zip(t["word"], t["nats"], t["chance"], strict=True)
                    if nats > chance
                ]
                for which, t in tables.items()
            }
            rows.append({"layer": layer, "norm": squares**0.5, **sides})
        return pd.DataFrame(rows)

    def effects(self, k: int = 5) -> pd.DataFrame:
        """A row for each prompt: divergence in nats, the likeliest next word before and after.

        Raises:
            ValueError: The effect was not measured.
        """
        import pandas as pd

        if self.effect is None:
            raise ValueError("the effect was not measured; see .remarks, or effect=True")
        return pd.DataFrame(
            {
                "prompt": self.effect.prompts,
                "divergence": self.effect.divergences.tolist(),
                "before": [self._words[i] for i in self.effect.before.tolist()],
                "after": [self._words[i] for i in self.effect.after.tolist()],
            }
        )

    def effect_words(self, which: Literal["raised", "lowered"] = "raised") -> list[str]:
        """The words that the change raises (lowers) most after the prompts, first one first."""
        if self.effect is None:
            raise ValueError("the effect was not measured; see .remarks, or effect=True")
        ids = self.effect.raised if which == "raised" else self.effect.lowered
        return [self._words[i] for i in ids.tolist()]

    def __repr__(self) -> str:
        from bwlens.show.changes import text

        return text(self)

    def _repr_html_(self) -> str:
        from bwlens.show.changes import fragment

        return fragment(self)

    def figure(self, kind: Literal["norms", "words"] = "words", ax: Any = None) -> Figure:
        """A matplotlib figure: "norms" by layer and matrix, "words" that it writes by layer."""
        from bwlens.show.changes import figure

        return figure(self, kind, ax)

    def save(self, path: str | Path) -> Path:
        """Write it: .html a page; .csv its directions; .json tables; .png, .pdf, .svg the figure.

        Raises:
            ValueError: Another ending, or a folder that is not there.
        """
        endings = (".html", ".csv", ".json", ".png", ".pdf", ".svg")
        path = writable(path, endings)
        if path.suffix == ".html":
            from bwlens.show.changes import page

            path.write_text(page(self), encoding="utf-8")
        elif path.suffix == ".csv":
            self.to_frame().to_csv(path, index=False)
        elif path.suffix == ".json":
            tables = {w: self._table(w, KEPT, None).to_dict("records") for w in self._tallies}
            directions = self.to_frame().to_dict("records")
            about = {"model": self.model, "reading": self.reading, "remarks": self.remarks}
            effects = [] if self.effect is None else self.effects().to_dict("records")
            text = json.dumps(
                {**about, **tables, "directions": directions, "effects": effects},
                ensure_ascii=False, indent=1,
            )  # fmt: skip
            path.write_text(text, encoding="utf-8")
        else:
            self.figure().savefig(path, bbox_inches="tight")
        return path
