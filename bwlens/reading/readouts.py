"""Vectors of width d_model read in the vocabulary: the logit lens of activations and gradients.

The lens of a vector v is LL(v) = softmax(cap(scale * (norm(v) W_U + b_U))), with the model's own
final norm, whose statistics are computed afresh on v. A gradient has two kinds of rows that wide:
the x of W_in (its top tokens are the imprint) and the delta of W_out (its bottom tokens are what a
descent step promotes).

Three things make such a reading worthless, and each is marked in the result: a zero vector has
none (`zero`); beside a vector much shorter than sqrt(d_model * eps) the norm's epsilon weighs more
than the vector, and with a bias the lens decodes that bias instead (`shrinkage`, `eps_regime`); and
with a bias the lens is not odd, so that "the other direction" is `sign=-1`, never a negated score.

Source: Katz, Belinkov, Geva and Wolf, "Backward Lens", EMNLP 2024, sections 2 and 4, appendix H.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bwlens.model.head import Head, head_of
from bwlens.reading.scoring import ends, plan, ranks_among, score_dtype, score_rows, zero_is_uniform

_TRUSTED = 0.9  # Shrinkage below which a bias may speak louder than the vector.


_BLANKS = {"norms": 0, "shrinkage": 0, "eps_regime": False, "zero": True}
"""What a readout has where there is no reading; elsewhere ids are -1, scores nan."""


@dataclass(frozen=True, eq=False, repr=False)
class Readout:
    """What vectors [*lead, d_model] say in the vocabulary; detached tensors on the head's device.

    - `top_ids`, `top_scores` [*lead, k]: the most probable tokens and their logits, best first.
    - `bottom_ids`, `bottom_scores` [*lead, k]: the least probable ones, lowest first.
      Equal scores stand in the order of their token ids, in both.
    - `norms` [*lead]: the L2 norms of the vectors as they came, in the vectors' units.
    - `zero` [*lead]: the vector is zero and has no reading: ids and ranks are -1, scores nan.
    - `shrinkage` [*lead]: ||c|| / sqrt(||c||^2 + d_model * eps), what the final norm's epsilon
      leaves of the length (1: all of it); c is the vector as it is read: of unit length if
      normalised, centred for LayerNorm.
    - `eps_regime` [*lead]: shrinkage < 0.9 and the lens of the zero vector is not uniform, so
      that what is read may be the final norm's bias. An RMSNorm without bias loses only
      scale: its ranks stand. False where `zero`.
    - `ranks`, `target_scores` [*lead, n_targets], if targets were given: how many tokens score
      strictly higher (0: most probable, d_vocab - 1: least), and the targets' logits.
    - `log_normalizer` [*lead], if log_probs: logsumexp of all logits, in nats.

    Indexing reaches the leading dimensions of all fields at once: `r[3]`, `r[..., -1]`,
    `r[~r.zero]`.
    """

    top_ids: Int[Tensor, "*lead k"]
    top_scores: Float[Tensor, "*lead k"]
    bottom_ids: Int[Tensor, "*lead k"]
    bottom_scores: Float[Tensor, "*lead k"]
    norms: Float[Tensor, "*lead"]
    zero: Bool[Tensor, "*lead"]
    shrinkage: Float[Tensor, "*lead"]
    eps_regime: Bool[Tensor, "*lead"]
    ranks: Int[Tensor, "*lead n_targets"] | None = None
    target_scores: Float[Tensor, "*lead n_targets"] | None = None
    log_normalizer: Float[Tensor, "*lead"] | None = None

    @property
    def shape(self) -> torch.Size:
        """The leading shape: that of the vectors without d_model."""
        return self.norms.shape

    @property
    def top_log_probs(self) -> Float[Tensor, "*lead k"]:
        """Log-probabilities of `top_ids`, in nats; ValueError without `log_probs=True`."""
        return self._log_probs(self.top_scores)

    @property
    def bottom_log_probs(self) -> Float[Tensor, "*lead k"]:
        """Log-probabilities of `bottom_ids`, in nats; ValueError without `log_probs=True`."""
        return self._log_probs(self.bottom_scores)

    @property
    def target_log_probs(self) -> Float[Tensor, "*lead n_targets"]:
        """Log-probabilities of the targets, in nats; ValueError without targets or `log_probs`."""
        return self._log_probs(self.target_scores)

    def _log_probs(self, scores: Tensor | None) -> Tensor:
        if scores is None or self.log_normalizer is None:
            missing = "targets=..." if scores is None else "log_probs=True"
            raise ValueError(f"this readout was made without {missing}; ask readout() for it")
        return scores - self.log_normalizer[..., None]

    def __getitem__(self, index: Any) -> "Readout":
        device, n, lead = self.norms.device, self.norms.numel(), self.norms.ndim
        at = torch.arange(n, device=device).view(self.shape)[index]
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {
            name: part.reshape(n, *part.shape[lead:])[at]
            for name, part in parts.items()
            if part is not None
        }
        return Readout(**chosen)

    def placed(self, at: Sequence[int], size: int) -> "Readout":
        """The last leading dimension spread over a longer one, its entries at the places `at`.

        Elsewhere there is no reading (`zero`).
        """
        chosen: dict[str, Any] = {}
        lead = self.norms.shape[:-1]
        for name in (f.name for f in fields(self)):
            part = getattr(self, name)
            if part is not None:
                blank = _BLANKS.get(name, float("nan") if part.is_floating_point() else -1)
                full = part.new_full((*lead, size, *part.shape[len(lead) + 1 :]), blank)
                chosen[name] = full.index_copy(
                    len(lead), torch.tensor(at, device=part.device), part
                )
        return Readout(**chosen)

    def __repr__(self) -> str:
        targets = "" if self.ranks is None else f", n_targets={self.ranks.shape[-1]}"
        return f"Readout({list(self.shape)}, k={self.top_ids.shape[-1]}{targets})"


def readout(
    model: Any,
    vectors: Float[Tensor, "*lead d_model"] | Float[np.ndarray, "*lead d_model"],
    top_k: int = 10,
    targets: int | Sequence[int] | Int[Tensor, "..."] | None = None,
    *,
    normalize: bool = False,
    sign: int = 1,
    log_probs: bool = False,
    max_memory: int = 256 * 2**20,
) -> Readout:
    """Read vectors in the vocabulary: the tokens at both ends, and the ranks of chosen tokens.

    logits = cap(scale * (norm(sign * v) W_U + b_U)), row by row; no position mixes with another.

    - `model`: a TransformerBridge, a HookedTransformer, or a `Head`.
    - `vectors` [*lead, d_model], any floating dtype and device; norm and unembedding run in the
      head's dtype and on its device, but logits are at least float32, so that half-precision
      models do not tie: W_U is converted a few thousand columns at a time.
    - `targets`: token ids shared by all rows (one, a sequence, or a tensor [n_targets]), or a
      tensor [*lead, n_targets] with each row's own.
    - `normalize`: read v / ||v||_2 instead (appendix H); `norms` stay those of v.
    - `sign`: -1 reads -v. With a bias that is not the reversed reading of v.
    - `log_probs`: also keep the log-normaliser, for `Readout.top_log_probs` and its like.
    - `max_memory`: bytes that logits and their temporaries may take at a time; one row always fits.

    A vector that underflows to zero in the head's dtype counts as zero (`normalize` helps).
    Ranks compare logits before scale and soft cap, which keep the order, so that a saturated cap
    makes no ties. Where two logits differ by rounding only, their order may hang on `max_memory`.

    Raises ValueError: vectors that are not floating, of another width, or not finite; top_k outside
    1..d_vocab; a target outside the vocabulary or targets of another shape; a sign but 1 and -1.

    Source: Backward Lens, section 4 and appendix H; nostalgebraist, "interpreting GPT: the logit
    lens", 2020.

    >>> head = Head(lambda v: v, torch.eye(3), None, None, scale=1.0, eps=0.0, centred=False)
    >>> r = readout(head, torch.tensor([[0.0, 2.0, 1.0]]), top_k=2, targets=1)
    >>> r.top_ids, r.bottom_ids, r.ranks
    (tensor([[1, 2]]), tensor([[0, 2]]), tensor([[0]]))
    """
    head = model if isinstance(model, Head) else head_of(model)
    given: Any = torch.from_numpy(vectors) if isinstance(vectors, np.ndarray) else vectors
    if not isinstance(given, Tensor):
        raise TypeError(
            f"vectors are a {type(given).__name__}; expected a tensor [..., d_model], such as"
            f" grads['W_out', 3].delta"
        )
    vectors = given
    with torch.no_grad():
        _check(head, vectors, top_k, sign, normalize)
        lead = vectors.shape[:-1]
        rows = vectors.reshape(prod(lead), vectors.shape[-1])
        wanted = _target_ids(targets, lead, head)
        step, width = plan(head, top_k, wanted, max_memory)
        parts = [
            _read_rows(head, chunk, top_k, ids, normalize, sign, log_probs, width)
            for chunk, ids in zip(rows.split(step), wanted.split(step), strict=True)
        ]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        joined = {name: part.reshape((*lead, *part.shape[1:])) for name, part in joined.items()}
        faint = (joined["shrinkage"] < _TRUSTED) & ~joined["zero"]
        if faint.any() and zero_is_uniform(head):
            faint = torch.zeros_like(faint)
    if targets is None:
        del joined["ranks"], joined["target_scores"]
    return Readout(eps_regime=faint, **joined)


def readout_of_scores(
    scores: Float[Tensor, "n d_vocab"],
    norms: Float[Tensor, " n"],
    doubtful: Bool[Tensor, " n"],
    at: Int[Tensor, " n"],
    lead: tuple[int, ...],
    top_k: int,
    targets: Sequence[int],
) -> Readout:
    """A readout of scores that are there already, such as measured effects.

    Row i belongs at place `at[i]` of the flattened leading shape; where none does, or its scores
    are nan, there is no reading (`zero`). `eps_regime` marks the doubtful ones.
    """
    wanted = torch.tensor(list(targets), dtype=torch.long, device=scores.device)
    there = ~scores.amin(1).isnan()  # A row's least is nan where any of it is.
    if not there.all():
        scores, at = scores[there], at[there]
    top = ends(scores, None, top_k, largest=True)
    bottom = ends(scores, None, top_k, largest=False)
    goals = scores[:, wanted]
    n = int(prod(lead))
    read = Readout(
        top_ids=top,
        top_scores=scores.gather(1, top),
        bottom_ids=bottom,
        bottom_scores=scores.gather(1, bottom),
        norms=norms[there],
        zero=torch.zeros_like(doubtful[there]),
        shrinkage=torch.ones_like(scores[:, 0]),
        eps_regime=doubtful[there],
        ranks=ranks_among(scores, goals),
        target_scores=goals,
    ).placed(at.tolist(), n)
    return read[torch.arange(n).reshape(lead)]


def _check(head: Head, vectors: Tensor, top_k: int, sign: int, normalize: bool) -> None:
    d_model, d_vocab = head.W_U.shape
    if not vectors.is_floating_point():
        raise ValueError(f"vectors are {vectors.dtype}; expected floating point: vectors.float()")
    if vectors.ndim == 0 or vectors.shape[-1] != d_model:
        raise ValueError(
            f"vectors have shape {list(vectors.shape)}; expected [..., d_model] with d_model ="
            f" {d_model}. W_in and W_gate are read through x, W_out through delta; their other"
            f" side has width d_mlp and no reading in the vocabulary."
        )
    if not hasattr(top_k, "__index__") or isinstance(top_k, bool):
        raise ValueError(f"top_k is {top_k!r}; expected a whole number, 1 to {d_vocab}")
    if not 1 <= top_k <= d_vocab:
        raise ValueError(f"top_k is {top_k}; expected 1 to {d_vocab}, the size of the vocabulary")
    if sign not in (1, -1):
        raise ValueError(f"sign is {sign}; expected 1 (read v) or -1 (read -v)")
    peaks = torch.linalg.vector_norm(vectors, float("inf"), dim=-1)
    # What overflows in the head's dtype is as unreadable as what came in as inf or nan.
    dtype = peaks.dtype if normalize else head.W_U.dtype
    if bad := int((~peaks.to(dtype).isfinite()).sum()):
        raise ValueError(
            f"{bad} of {peaks.numel()} vectors are not finite in {dtype}; check the loss and the"
            f" gradients for inf and nan"
        )


def _target_ids(targets: Any, lead: torch.Size, head: Head) -> Tensor:
    """Target ids as one row per vector, [prod(lead), n_targets]; no columns without targets."""
    d_vocab = head.W_U.shape[1]
    if targets is None:
        targets = []
    if not isinstance(targets, Tensor):
        many = targets if isinstance(targets, Sequence) else [targets]
        targets = torch.tensor([operator.index(t) for t in many], dtype=torch.long)
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets are {targets.dtype}; expected token ids, which are integers")
    ids = targets.to(head.W_U.device, torch.long)
    if ids.ndim > 1 and ids.shape[:-1] != lead:
        raise ValueError(
            f"targets have shape {list(ids.shape)}; expected [n_targets], shared by all rows, or"
            f" {[*lead, 'n_targets']}, one set per row"
        )
    if (outside := ids[(ids < 0) | (ids >= d_vocab)]).numel():
        raise ValueError(
            f"target {int(outside[0])} is outside the vocabulary; expected ids 0 to {d_vocab - 1}"
        )
    n_targets = ids.shape[-1] if ids.ndim else 1
    return ids.expand(*lead, n_targets).reshape(prod(lead), n_targets)


def _read_rows(
    head: Head,
    rows: Tensor,
    k: int,
    targets: Tensor,
    normalize: bool,
    sign: int,
    log_probs: bool,
    width: int,
) -> dict[str, Tensor]:
    """The fields of a Readout for rows [n, d_model] and their targets [n, n_targets]."""
    device, dtype = head.W_U.device, score_dtype(head)
    rows = rows.to(device, torch.promote_types(rows.dtype, torch.float32))
    # Norms are taken relative to the largest entry, where squares neither over- nor underflow.
    peaks = torch.linalg.vector_norm(rows, float("inf"), dim=1)
    unit = rows / peaks.where(peaks > 0, 1)[:, None]
    lengths = torch.linalg.vector_norm(unit, dim=1)
    norms = lengths * peaks
    read = sign * (unit / lengths.where(lengths > 0, 1)[:, None] if normalize else rows)
    read = read.to(head.W_U.dtype)
    shrinkage, zero = _shrinkage(head, read.to(dtype))

    alive = (~zero).nonzero().squeeze(1)
    found = score_rows(head, read[alive], k, targets[alive], log_probs, width)
    every = {"norms": norms, "zero": zero, "shrinkage": shrinkage}
    for name, part in found.items():
        blank = float("nan") if part.is_floating_point() else -1
        every[name] = part.new_full((len(rows), *part.shape[1:]), blank).index_copy(0, alive, part)
    return every


def _shrinkage(head: Head, read: Tensor) -> tuple[Tensor, Tensor]:
    """What the norm's epsilon leaves of each row's length, and which rows are zero."""
    peaks = torch.linalg.vector_norm(read, float("inf"), dim=1)
    unit = read / peaks.where(peaks > 0, 1)[:, None]
    if head.centred:
        unit = unit - unit.mean(1, keepdim=True)
    lengths = torch.linalg.vector_norm(unit, dim=1)
    floor = sqrt(read.shape[1] * head.eps) / peaks
    return (lengths / torch.hypot(lengths, floor)).nan_to_num(0.0), peaks == 0
