"""Figures 7-9: reading a whole gradient neuron by neuron only repeats its spanning vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bwlens.data.given import Edits, as_edits
from bwlens.data.records import Record
from bwlens.experiments.base import Experiment, Reading, Result
from bwlens.experiments.columns import frame
from bwlens.experiments.running import run
from bwlens.gradient.capturing import capture
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.gradient.objectives import NLL
from bwlens.gradient.spectra import spectra
from bwlens.lens.backward import READ_THROUGH
from bwlens.model.head import Head, head_of
from bwlens.model.prompts import Edit
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Layers, Site, resolve_layer
from bwlens.model.tokens import token_texts
from bwlens.reading.readouts import readout

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class NaiveMap:
    """How alike each neuron of a prompt's gradient is to each vector that spans it.

    A neuron is a vector of the residual stream's width in the dense gradient: row k of W_out's,
    sum_i x_i[k] delta_i, or column k of W_in's, sum_i delta_i[k] x_i.

    Where either is zero, cosine and overlap are nan.
    """

    site: Site
    tokens: tuple[str, ...]
    """What the prompt's tokens say, one for each spanning vector."""
    neurons: Int[Tensor, " neurons"]
    """The neurons' numbers, in the order of the maps' rows."""
    cosine: Float[Tensor, "neurons n"]
    overlap: Float[Tensor, "neurons n"]
    """The share of the neuron's most probable tokens that are among the vector's: among those of -v
    where the cosine with v is negative, as the neuron then holds a negative multiple of it."""
    top_k: int
    """How many tokens of each are compared."""

    def __repr__(self) -> str:
        n_neurons, n = self.cosine.shape
        return f"NaiveMap({self.site}: {n_neurons} neurons, {n} spanning vectors, top {self.top_k})"

    @property
    def nearest(self) -> Int[Tensor, " neurons"]:
        """The vector of the largest |cosine| with each neuron; -1 for a neuron that is zero."""
        size = self.cosine.abs().nan_to_num(-1.0)
        best, at = size.max(1)
        return at.masked_fill(best < 0, -1)

    def figure(self) -> Figure:
        """Both maps, neurons sorted by the vector that is nearest to them."""
        from matplotlib.colors import Normalize

        from bwlens.show.drawing import SCALE, Drawing, label, plain, scale_bar

        nearest = self.nearest
        strength = self.cosine.gather(1, nearest.clamp(min=0)[:, None])[:, 0].nan_to_num(0.0)
        order = np.lexsort((-strength.cpu().numpy(), nearest.cpu().numpy()))
        figure = Drawing(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        shown = (
            (self.cosine, "cosine", "RdBu", -1.0),
            (self.overlap, f"overlap of the top {self.top_k}", SCALE, 0.0),
        )
        for ax, (values, name, cmap, low) in zip(axes, shown, strict=True):
            ax.imshow(
                values.cpu().numpy()[order], aspect="auto", cmap=cmap, vmin=low, vmax=1,
                interpolation="nearest",
            )  # fmt: skip
            ax.set_xticks(range(len(self.tokens)), [label(token) for token in self.tokens])
            for text in ax.get_xticklabels():
                text.set(rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
            ax.set_title(name, fontsize=7, pad=3)
            plain(ax)
            scale_bar(figure, ax, Normalize(low, 1.0), "", cmap=cmap)
        axes[0].set_ylabel(f"neurons of {self.site}, by nearest vector")
        return figure

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.figure()._repr_png_()  # pyright: ignore[reportAttributeAccessIssue]


def naive_map(
    model: LensModel,
    edit: Edit | Record,
    *,
    matrix: str = "W_out",
    layer: int,
    top_k: int = 100,
    neurons: int | None = None,
    normalize: bool = True,
    prepend_bos: bool | None = None,
) -> NaiveMap:
    """Compare the lens of every neuron of one prompt's gradient with that of the spanning vectors.

    Args:
        model: A TransformerBridge or HookedTransformer.
        edit: The prompt and its new target.
        matrix: A name out of `bwlens.MATRICES`.
        layer: From 0, or negative from the end.
        top_k: How many tokens of each reading are compared.
        neurons: Only so many neurons, those with the largest norms; None for all.
        normalize: Read vectors at unit length: a neuron's scale is then no matter. Where vectors
            are small, the final norm's epsilon makes all readings alike otherwise.
        prepend_bos: Whether the prompt gets a BOS token; None is the model's own default.

    Raises:
        ValueError: No such layer or matrix, or `top_k` is larger than the vocabulary.
        NotImplementedError: The layer is a mixture of experts.

    Source: Backward Lens, appendix C, figures 7-9.

    Example:
        >>> edit = Edit("{} plays for", "Lionel Messi", " Paris")
        >>> naive_map(model, edit, layer=3).figure()  # doctest: +SKIP
    """
    (edit,) = as_edits(edit)
    layer = resolve_layer(model, layer)
    grads = capture(
        model, edit.text, NLL(edit.target_new), [matrix], layer, prepend_bos=prepend_bos
    )
    site = Site(matrix, layer)
    if site not in grads:
        raise NotImplementedError(
            f"layer {layer} is a mixture of experts, each with a gradient of its own; name a layer"
            f" with a dense MLP, or run naive_reading, which reads them one by one"
        )
    found = _Readings(head_of(model), matrix, grads[site], top_k, neurons, normalize)
    cosine, overlap = found.maps(0, 0)
    ids = grads.batch.tokens[0].tolist()
    tokens = token_texts(model.tokenizer, ids) if model.tokenizer else [str(i) for i in ids]
    return NaiveMap(site, tuple(tokens), found.numbers[0], cosine, overlap, top_k)


@dataclass(frozen=True)
class NaiveReading(Experiment):
    """How much of the strongest neurons' readings the spanning vectors' already say.

    Rows: `item`, `matrix`, `layer`; means over the neurons of the best |cosine| with a spanning
    vector (`cosine`) and of the best overlap of their top tokens (`overlap`, see `NaiveMap`); the
    same with the vectors of the next prompt in the batch, the first after the last, as a control
    (`control_cosine`, `control_overlap`; nan in a batch of one); and `explained`, the share of
    the gradient's squared norm in its first singular direction.

    Source: Backward Lens, appendix C, figures 7-9.
    """

    matrices: tuple[str, ...] = ("W_out", "W_in")
    top_k: int = 100
    """How many tokens of each reading are compared."""
    neurons: int | None = 64
    """How many neurons are read, those with the largest norms; None for all."""
    normalize: bool = True
    """Read vectors at unit length, see `naive_map`."""

    name: ClassVar[str] = "naive_reading"
    title: ClassVar[str] = "Neurons of the whole gradient against its spanning vectors"
    source: ClassVar[str] = "Figures 7-9"
    caption: ClassVar[str] = (
        "Each neuron of the whole gradient is a mixture of the few spanning vectors. How alike is"
        " it to the nearest of its own prompt's, and, as a control, of another prompt's?"
    )
    published: ClassVar[str] = (
        "the neurons' readings repeat the spanning vectors', in their top 100 words and in cosine;"
        " so the vectors are all that need be read."
    )
    by: ClassVar[tuple[str, ...]] = ("matrix", "layer")
    values: ClassVar[tuple[str, ...]] = (
        "cosine",
        "overlap",
        "control_cosine",
        "control_overlap",
        "explained",
    )

    def measure(self, reading: Reading) -> pd.DataFrame:
        """Rows of a batch."""
        head = head_of(reading.model)
        columns = []
        for site in reading.sites(self.matrices):
            gradient = reading.grads[site]
            readings = _Readings(
                head, site.matrix, gradient, self.top_k, self.neurons, self.normalize
            )
            n_prompts = len(readings.prompts)
            own = [_best(*readings.maps(at, at)) for at in range(n_prompts)]
            others = [_best(*readings.maps(at, (at + 1) % n_prompts)) for at in range(n_prompts)]
            if n_prompts == 1:
                others = [(float("nan"), float("nan"))]
            squares = spectra(gradient).singular_values.square()
            columns.append(
                {
                    "item": np.array(readings.prompts),
                    "matrix": site.matrix,
                    "layer": site.layer,
                    "expert": site.expert_number,
                    "cosine": np.array([cosine for cosine, _ in own]),
                    "overlap": np.array([overlap for _, overlap in own]),
                    "control_cosine": np.array([cosine for cosine, _ in others]),
                    "control_overlap": np.array([overlap for _, overlap in others]),
                    "explained": (squares[:, 0] / squares.sum(1)).cpu().numpy(),
                }
            )
        return frame(columns)

    def draw(self, summary: pd.DataFrame) -> Figure:
        """Best cosine and best overlap by layer, with the control; the share of the first rank."""
        import pandas as pd

        from bwlens.show.drawing import panels

        rows = []
        for quantity in ("cosine", "overlap"):
            lines = []
            for owner, prefix in (("", ""), (", another prompt", "control_")):
                found = summary[summary["quantity"] == prefix + quantity]
                lines.append(found.assign(line=found["matrix"] + owner))
            rows.append(pd.concat(lines))
        explained = summary[summary["quantity"] == "explained"]
        rows.append(explained.assign(line=explained["matrix"]))
        names = [f"{m}{owner}" for m in self.matrices for owner in ("", ", another prompt")]
        titles = ["best |cosine|", f"best overlap of the top {self.top_k}", "share of rank 1"]
        figure, axes = panels(pd.concat(rows), titles, rows, "line", names, "")
        for ax in axes:
            ax.set_ylim(0, 1.04)
        return figure


def naive_reading(
    model: LensModel,
    records: Edits,
    *,
    matrices: str | Sequence[str] = ("W_out", "W_in"),
    layers: Layers = None,
    top_k: int = 100,
    neurons: int | None = 64,
    normalize: bool = True,
    **options: Any,
) -> Result:
    """Best cosine and overlap of the gradient's neurons with the vectors that span it.

    The settings are those of `NaiveReading`, the options those of `run`.
    """
    settings = {"matrices": matrices, "top_k": top_k, "neurons": neurons, "normalize": normalize}
    return run(NaiveReading.of(model, layers, **settings), model, records, **options)


class _Readings:
    """The most probable tokens of a gradient's neurons and vectors, prompt by prompt."""

    def __init__(
        self,
        head: Head,
        matrix: str,
        gradient: LowRankGradient,
        top_k: int,
        neurons: int | None,
        normalize: bool,
    ) -> None:
        if neurons is not None and neurons < 1:
            raise ValueError(f"neurons is {neurons}; expected 1 or more, or None for all")
        self._d_vocab = head.W_U.shape[1]
        self.prompts = gradient.prompts
        self._vectors, self._neurons, self.numbers = [], [], []
        through = READ_THROUGH[matrix]
        for part in gradient.split():
            dense = part.dense() if through == "delta" else part.dense().T
            norms = dense.norm(dim=1)
            kept = norms.topk(min(neurons or len(norms), len(norms))).indices.sort().values
            self._vectors.append(getattr(part, through))
            self._neurons.append(dense[kept])
            self.numbers.append(kept)

        def tops(rows: list[Tensor], sign: int) -> list[Tensor]:
            found = readout(head, torch.cat(rows), top_k, normalize=normalize, sign=sign)
            return list(found.top_ids.to(gradient.device).split([len(part) for part in rows]))

        self._of_neurons = tops(self._neurons, 1)
        self._of_vectors = tops(self._vectors, 1), tops(self._vectors, -1)

    def maps(self, at: int, other: int) -> tuple[Tensor, Tensor]:
        """Cosine and overlap of one prompt's neurons with the vectors of a prompt."""
        vectors, neurons = self._vectors[other].double(), self._neurons[at].double()
        cosine = (neurons / neurons.norm(dim=1, keepdim=True)) @ (
            vectors / vectors.norm(dim=1, keepdim=True)
        ).T
        of_neurons = self._of_neurons[at]
        shares = []
        for ids in (tops[other] for tops in self._of_vectors):
            # Rows without a reading have ids of -1: they fall in a column that is left out.
            held = torch.zeros(len(ids), self._d_vocab + 1, device=ids.device)
            held.scatter_(1, ids.where(ids >= 0, self._d_vocab), 1.0)
            shares.append(held[:, of_neurons.flatten()].unflatten(1, of_neurons.shape).mean(-1).T)
        overlap = torch.where(cosine < 0, shares[1], shares[0]).double()
        return cosine, overlap.masked_fill(cosine.isnan(), float("nan"))


def _best(cosine: Tensor, overlap: Tensor) -> tuple[float, float]:
    """Means over the neurons of the largest |cosine| and overlap; nan where there is none."""
    found = []
    for values in (cosine.abs(), overlap):
        best = values.nan_to_num(-1.0).amax(1)
        found.append(float(best[best >= 0].mean()))
    return found[0], found[1]
