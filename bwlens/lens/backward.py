"""The Backward Lens of one prompt: what a gradient step would write, in the model's own words.

Each weight gradient is a sum of outer products of x (what came in) and delta (what came back). A
matrix is read through the one that is as wide as the residual stream:

- **imprint**: x of W_in (and W_gate, W_Q, W_K, W_V). Its most probable tokens are what the step
  stamps in: the context, as this layer sees it.
- **shift**: delta of W_out (and W_O). A descent step *subtracts* the gradient, so delta's *least*
  probable tokens are what the step promotes, and its most probable ones what it suppresses.

These signs are written here, once: `promoted` and `suppressed` speak of a descent step. How well a
reading of delta says what the step does grows towards the top and differs between models.

Source: Katz, Belinkov, Geva and Wolf, "Backward Lens", EMNLP 2024, sections 4 and 5.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bwlens.attention.maps import ReversedAttention
from bwlens.gradient.capturing import Gradients
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.lens import frames
from bwlens.lens import neurons as neurons_
from bwlens.lens.reading import Positions, resolve_positions
from bwlens.lens.rows import READ_THROUGH as READ_THROUGH
from bwlens.lens.rows import Expert, by_expert, neuron_norms, stream_rows
from bwlens.model.sites import Layers
from bwlens.reading.readouts import Readout
from bwlens.reading.trust import Trust
from bwlens.runs.paths import writable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class BackwardLens:
    """What a gradient step on one prompt would write into each layer, at each token.

    Made by `backward_lens`. Holds detached tensors and words; neither the model nor a graph.

    Attributes:
        prompt: The prompt as text.
        tokens: What each token says, teacher-forced target tokens included.
        token_ids: Their ids.
        n_prompt: Number of tokens of the prompt alone.
        subject: Positions of the subject's tokens; empty if none was named.
        target: The target as text; empty if the objective has none.
        target_ids: Its token ids.
        answer: The model's own next word, before any step.
        answer_probability: The probability the model gives it.
        target_probability: The probability it gives the target's first token; None without target.
        loss: The loss whose gradient this is.
        layers: The layers read, ascending.
        matrices: The matrices read.
        gradients: x and delta of every matrix.
        settings: What is needed to make this lens again.
        loss_is: What the loss is, in words: "loss", "mean loss of the target's 2 tokens".
        n_layers: How many layers the model has, read or not; 0 where that is not known.
        reading: How gradients became words here; `readings` are all that it holds.
        positions: The positions read; None for all.
        follow_ids: Ids of further words whose ranks every cell holds, beside target and answer.
    """

    prompt: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    n_prompt: int
    subject: tuple[int, ...]
    target: str
    target_ids: tuple[int, ...]
    answer: str
    answer_probability: float
    target_probability: float | None
    loss: float
    layers: tuple[int, ...]
    matrices: tuple[str, ...]
    gradients: Gradients
    settings: dict[str, Any]
    _readings: dict[str, dict[str, Readout]] = field(repr=False)
    _words: dict[int, str] = field(repr=False)
    loss_is: str = "loss"
    n_layers: int = 0
    reading: str = "plain"
    positions: tuple[int, ...] | None = None
    _trust: dict[str, dict[int, Trust]] = field(default_factory=dict, repr=False)
    follow_ids: tuple[int, ...] = ()
    _neurons: dict[neurons_.Key, int] = field(default_factory=dict, repr=False)
    _attention: ReversedAttention | None = field(default=None, repr=False)

    @property
    def attention(self) -> ReversedAttention:
        """The reversed and forward maps of the heads.

        Raises:
            ValueError: The lens was made without them.
        """
        if self._attention is None:
            raise ValueError(
                "this lens has no attention; make it with backward_lens(attention=True)"
            )
        return self._attention

    def reversed_attention(self, layer: int, head: int) -> Float[Tensor, "query key"]:
        """R of one head."""
        return self.attention.map(layer, head)

    def heads(self, top_k: int = 10) -> list[tuple[int, int, float]]:
        """(layer, head, ||R||_F) of the heads that the loss asks most of."""
        return [
            (*place, float(self.attention.map(*place).norm()))
            for place in self.attention.strongest(top_k)
        ]

    @property
    def trust(self) -> Trust:
        """How far the words of each layer say what a step does: see `bwlens.reading.trust`.

        Measured with the lens, of the model as it was then; at the last of the positions measured.

        Raises:
            ValueError: The lens was made without it.
        """
        return [*self._trusts().values()][-1]

    def trust_at(self, position: int) -> Trust:
        """The trust of the words at a position, negative ones from the end.

        Raises:
            ValueError: It was not measured there.
        """
        measured = self._trusts()
        if (position + len(self.tokens) if position < 0 else position) not in measured:
            raise ValueError(
                f"trust was not measured at position {position}, but at"
                f" {', '.join(map(str, measured))}; name it in backward_lens(..., trust=[...])"
            )
        return measured[position % len(self.tokens)]

    @property
    def trust_positions(self) -> tuple[int, ...]:
        """Where it was measured, ascending."""
        return tuple(self._trust[self.reading]) if self._trust else ()

    def _trusts(self) -> dict[int, Trust]:
        if not self._trust:
            raise ValueError(
                "trust was not measured, and a lens holds no model to measure it on; make it with"
                " backward_lens(..., trust=True)"
            )
        return self._trust[self.reading]

    @property
    def has_trust(self) -> bool:
        """Whether it was measured."""
        return bool(self._trust)

    def through(self, matrix: str = "W_out") -> Literal["x", "delta", "effect"]:
        """What the words of a matrix are read from.

        A descent step promotes the most probable words of x and of a measured effect, and, as it
        subtracts the gradient, the least probable ones of delta.
        """
        return "effect" if self.reading == "effect" else READ_THROUGH[self._known(matrix)]

    def unit(self, matrix: str = "W_out") -> str:
        """What the scores of a matrix' words are: "logit", "effect" (nats for a nat), "score"."""
        through = self.through(matrix)
        by = self.settings.get("imprint", "plain") if through == "x" else self.reading
        return "effect" if through == "effect" else "score" if by in ("dual", "cosine") else "logit"

    @property
    def d_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self.gradients.next_logits.shape[-1]

    @property
    def target_tokens(self) -> tuple[str, ...]:
        """What each token of the target says; ranks and marks speak of the first."""
        return tuple(self._words[i] for i in self.target_ids)

    @property
    def vocabulary(self) -> Mapping[int, str]:
        """What each token says that occurs anywhere in the lens, by its id."""
        return MappingProxyType(self._words)

    def readout(self, matrix: str = "W_out") -> Readout:
        """The `Readout` [layer, pos] of a matrix; its targets are the target's, then the answer."""
        return self._readings[self.reading][self._known(matrix)]

    @property
    def readings(self) -> tuple[str, ...]:
        """The readings this lens holds, that of its first look first."""
        return tuple(self._readings)

    @property
    def normalized(self) -> bool:
        """Whether vectors were read at unit length."""
        return self.reading == "normalised"

    def as_reading(self, reading: str) -> BackwardLens:
        """This lens by another of its `readings`; nothing is read again and nothing copied.

        Raises:
            ValueError: The lens was made without it.
        """
        if reading not in self._readings:
            raise ValueError(
                f"this lens holds no {reading} reading, but {', '.join(self.readings)}; make it"
                f" with backward_lens(..., reading=[{reading!r}, ...])"
            )
        return self if reading == self.reading else replace(self, reading=reading)

    def words(
        self, which: Literal["promoted", "suppressed"] = "promoted", matrix: str = "W_out"
    ) -> list[list[list[str]]]:
        """The words of every cell, [layer][pos][k], strongest first; none where delta is zero."""
        ids, _ = self.side(which, matrix)
        return [[[self._words[i] for i in cell if i >= 0] for cell in row] for row in ids.tolist()]

    def side(self, which: str, matrix: str = "W_out") -> tuple[Tensor, Tensor]:
        """Token ids and scores of one end of every cell, each [layer, pos, k], strongest first.

        `which` is "promoted" or "suppressed"; -1 and nan where delta is zero.
        """
        if which not in ("promoted", "suppressed"):
            raise ValueError(f"expected 'promoted' or 'suppressed', found {which!r}")
        read = self.readout(matrix)
        top = (which == "promoted") == (self.through(matrix) != "delta")
        ids, scores = (
            (read.top_ids, read.top_scores) if top else (read.bottom_ids, read.bottom_scores)
        )
        silent = self.silent(matrix)[..., None]
        return ids.masked_fill(silent, -1), scores.masked_fill(silent, float("nan"))

    def promoted(
        self,
        k: int = 5,
        matrix: str = "W_out",
        *,
        layers: Layers = None,
        positions: Positions = None,
    ) -> pd.DataFrame:
        """The k words a descent step promotes most, a row for each layer, position and word.

        `layers` and `positions` as for `backward_lens`; None for all that were read.

        Raises:
            ValueError: `k` is not between 1 and the number of words that the lens keeps; a layer
                that was not read, or positions out of range.
        """
        return frames.words(self, "promoted", k, matrix, layers, positions)

    def suppressed(
        self,
        k: int = 5,
        matrix: str = "W_out",
        *,
        layers: Layers = None,
        positions: Positions = None,
    ) -> pd.DataFrame:
        """The k words a descent step suppresses most; all as for `promoted`."""
        return frames.words(self, "suppressed", k, matrix, layers, positions)

    def norms(
        self, matrix: str = "W_out", of: Literal["x", "delta"] = "delta"
    ) -> Float[Tensor, "layer pos"]:
        """L2 norms of delta (the colour of the paper's tables) or x, raw also if normalised.

        In a mixture of experts, the norm of the factor that is read is that of the one vector which
        a token's experts share (`bwlens.lens.rows`); that of the other, whose entries are each
        expert's own neurons, is the root of the sum of the experts' squared norms.

        Raises:
            ValueError: A matrix that was not read, or neither "x" nor "delta".
        """
        self._known(matrix)
        if of not in ("x", "delta"):
            raise ValueError(f"of must be 'x' or 'delta', found {of!r}")
        if of == READ_THROUGH[matrix]:
            rows = [stream_rows(self.gradients, matrix, k, of).norm(dim=1) for k in self.layers]
        else:
            rows = [neuron_norms(self.gradients, matrix, layer, of) for layer in self.layers]
        # Of a model on several devices each layer's are where the layer is.
        return torch.stack([row.to(self.gradients.next_logits.device) for row in rows])

    def silent(self, matrix: str = "W_out") -> Bool[Tensor, "layer pos"]:
        """Cells without words: delta is zero and a step writes nothing, or they were not read."""
        silent = self.norms(matrix, "delta") == 0
        if self.positions is not None:
            unread = torch.ones(silent.shape[1], dtype=torch.bool, device=silent.device)
            unread[list(self.positions)] = False
            silent = silent | unread
        return silent

    def target_ranks(self, matrix: str = "W_out") -> Int[Tensor, "layer pos"]:
        """Rank of the target's first token in each cell's reading (0 most, V-1 least probable).

        In delta of W_out a *high* rank means that the step promotes the target; -1: no reading.

        Raises:
            ValueError: The objective has no target.
        """
        if not self.target_ids:
            raise ValueError("this lens has no target; use an objective that names one")
        return self._ranks(matrix)[..., 0]

    def target_places(self, matrix: str = "W_out") -> Int[Tensor, "layer pos"]:
        """Place of the target's first token from the promoted end, 1 the most promoted; 0 for none.

        `target_ranks`, counted from whichever end a descent step promotes.

        Raises:
            ValueError: The objective has no target.
        """
        return self._places(self.target_ranks(matrix), matrix)

    def followed_places(self, matrix: str = "W_out") -> dict[str, Int[Tensor, "layer pos"]]:
        """Places, as `target_places`, of the words that the lens was made to `follow`."""
        ranks = self._ranks(matrix)[..., len(self.target_ids) + 1 :]
        return {
            self._words[index]: self._places(ranks[..., at], matrix)
            for at, index in enumerate(self.follow_ids)
        }

    def answer_ranks(self, matrix: str = "W_out") -> Int[Tensor, "layer pos"]:
        """Rank of the model's own answer in each cell's reading, as `target_ranks`."""
        return self._ranks(matrix)[..., len(self.target_ids)]

    def gradient(
        self, matrix: str = "W_out", layer: int | None = None, expert: int | None = None
    ) -> LowRankGradient:
        """The gradient of one weight matrix.

        Args:
            matrix: Which one.
            layer: Which layer, negative ones from the model's end; None for the last one read.
            expert: Which expert of a mixture.

        Raises:
            ValueError: A matrix or layer that was not read, or an expert that took no token.
        """
        self._known(matrix)
        layer = self.layers[-1] if layer is None else self.resolve_layer(layer)
        key = (matrix, layer) if expert is None else (matrix, layer, expert)
        try:
            return self.gradients[key]
        except KeyError as error:
            raise ValueError(error.args[0]) from None

    def gradients_of(self, matrix: str, layer: int) -> dict[Expert, LowRankGradient]:
        """The gradient of a matrix of a layer by expert; under None where there are no experts.

        Raises:
            ValueError: A matrix or layer that was not read.
        """
        return by_expert(self.gradients, self._known(matrix), self.resolve_layer(layer))

    def neurons(
        self,
        matrix: str = "W_out",
        *,
        layers: Layers = None,
        positions: Positions = None,
        top_k: int = 5,
    ) -> pd.DataFrame:
        """The neurons that each token's own step moves most, `bwlens.lens.neurons`.

        Columns: layer, pos, token, neuron, its activation (W_out) or delta (W_in, W_gate), how far
        it moved, and the word that its row of W_out promotes most, where the lens was made with
        `neurons=`.

        Raises:
            ValueError: A matrix without neurons or one that was not read; a layer or positions that
                are not there.
        """
        last = self.n_prompt - 1
        chosen = resolve_positions(positions, len(self.tokens), self.subject, last)
        where = range(len(self.tokens)) if chosen is None else chosen
        return neurons_.frame(self, matrix, self.resolve_layers(layers), where, top_k)

    def moved_neurons(self, matrix: str, layer: int, top_k: int) -> list[list[neurons_.Moved]]:
        """The neurons moved most at each position, as `neurons` has them."""
        neurons_.check_matrix(matrix)
        parts = self.gradients_of(matrix, layer)
        return neurons_.moved(parts, matrix, layer, len(self.tokens), top_k)

    def neuron_id(self, neuron: neurons_.Moved) -> int:
        """The token that a neuron's row of W_out promotes most; -1 where that was not read."""
        return self._neurons.get(neuron.key, -1)

    @property
    def has_neurons(self) -> bool:
        """Whether the words of the neurons moved most were read."""
        return bool(self._neurons)

    def resolve_layer(self, layer: int) -> int:
        """The number from 0 of a layer that was read; negative ones count from the model's end.

        Raises:
            ValueError: The layer was not read, the model has no such layer, or it is no number.
        """
        n_layers = self.n_layers or self.layers[-1] + 1
        read = f"this lens has read {', '.join(map(str, self.layers))}"
        try:
            number = operator.index(layer)
        except TypeError:
            raise ValueError(f"layer {layer!r} is no whole number; {read}") from None
        number += n_layers if number < 0 else 0
        if number not in self.layers:
            there = 0 <= number < n_layers
            why = "" if there else f", the model has {n_layers} layers"
            raise ValueError(f"layer {layer} was not read{why}; {read}")
        return number

    def resolve_layers(self, layers: Layers = None) -> tuple[int, ...]:
        """Numbers from 0, ascending, of one, several or a slice of the model's layers.

        None, and a slice, give those of them that were read.

        Raises:
            ValueError: A layer named by itself was not read, or none is left.
        """
        if layers is None:
            return self.layers
        chosen: Iterable[int]
        if isinstance(layers, slice):
            chosen = set(range(self.n_layers or self.layers[-1] + 1)[layers]) & {*self.layers}
        else:
            several = layers if isinstance(layers, Iterable) else [layers]
            chosen = {self.resolve_layer(layer) for layer in several}
        if not chosen:
            read = ", ".join(map(str, self.layers))
            raise ValueError(f"layers={layers!r} names no layer; this lens has read {read}")
        return tuple(sorted(chosen))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per matrix, layer and position: norms, ranks, words, and the marks of doubt."""
        return frames.cells(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything the lens shows, as plain lists and numbers (for JSON)."""
        return frames.plain(self)

    def figure(
        self,
        kind: Literal["table", "norms", "target_ranks", "spectrum"] = "table",
        matrix: str = "W_out",
        **options: Any,
    ) -> Figure:
        """A static figure for a paper; `bwlens.show.figures` has the options of each kind.

        Raises:
            ValueError: No such kind.
        """
        from bwlens.show import figures

        kinds = ("table", "norms", "target_ranks", "spectrum")
        if kind not in kinds:
            raise ValueError(f"no figure {kind!r}; there are {', '.join(kinds)}")
        return getattr(figures, kind)(self, matrix, **options)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the lens as a page (.html), a figure of the table (.pdf, .svg, .png) or data.

        Data are .json, everything the lens shows, or .csv, `to_dataframe()`. Figures take the
        `options` of `bwlens.show.figures.table`.

        Raises:
            ValueError: Another ending, a folder that is not there, or options for what is no
                figure; said before anything is drawn.
        """
        path = writable(path, (".html", ".pdf", ".svg", ".png", ".json", ".csv"))
        if options and path.suffix not in (".pdf", ".svg", ".png"):
            raise ValueError(f"{path.suffix} takes no options, but figures do; got {[*options]}")
        if path.suffix in (".pdf", ".svg", ".png"):
            self.figure("table", **options).savefig(path, dpi=300)
            return path
        if path.suffix == ".html":
            from bwlens.show.table import page

            text = page(self)
        elif path.suffix == ".json":
            text = json.dumps(self.to_dict(), ensure_ascii=False)
        else:
            text = self.to_dataframe().to_csv(index=False)
        path.write_text(text, encoding="utf-8")
        return path

    def report(self, path: str | Path) -> Path:
        """Write one page to send to somebody: table, details, figures, how to read them, settings.

        The page needs no network and no kernel.

        Raises:
            ValueError: A file that does not end in .html, or a folder that is not there.
        """
        from bwlens.show.report import report

        path = writable(path, (".html",))
        path.write_text(report(self), encoding="utf-8")
        return path

    def __rich__(self) -> Any:
        from bwlens.show.terminal import TextTable

        return TextTable(self)

    def __repr__(self) -> str:
        from bwlens.show.terminal import plain_text

        return plain_text(self)

    def _repr_html_(self) -> str:
        from bwlens.show.table import table

        return table(self)

    def _known(self, matrix: str) -> str:
        if matrix not in self.matrices:
            raise ValueError(
                f"{matrix!r} was not read; this lens has {', '.join(self.matrices)}. Ask for it"
                f" with backward_lens(..., matrices=[...])"
            )
        return matrix

    def _places(self, ranks: Tensor, matrix: str) -> Tensor:
        places = self.d_vocab - ranks if self.through(matrix) == "delta" else ranks + 1
        return places.masked_fill(ranks < 0, 0)

    def _ranks(self, matrix: str) -> Tensor:
        ranks = self.readout(matrix).ranks
        assert ranks is not None
        return ranks.masked_fill(self.silent(matrix)[..., None], -1)
