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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bwlens.model.head import Head, head_of

_BLOCK = 128  # The k best of a row lie in the k blocks with the best maxima.
_TILE = 2048  # Vocabulary columns scored at a time: rows x tile stays in the cache.
_SORT = 64  # From this many targets on, one sort of a row is cheaper than counting for each.
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
        step, width = _plan(head, top_k, wanted, max_memory)
        parts = [
            _read_rows(head, chunk, top_k, ids, normalize, sign, log_probs, width)
            for chunk, ids in zip(rows.split(step), wanted.split(step), strict=True)
        ]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        joined = {name: part.reshape((*lead, *part.shape[1:])) for name, part in joined.items()}
        faint = (joined["shrinkage"] < _TRUSTED) & ~joined["zero"]
        if faint.any() and _zero_is_uniform(head):
            faint = torch.zeros_like(faint)
    if targets is None:
        del joined["ranks"], joined["target_scores"]
    return Readout(eps_regime=faint, **joined)


def all_scores(
    head: Head,
    vectors: Float[Tensor, "n d_model"],
    normalize: bool = False,
    tokens: Int[Tensor, " some"] | None = None,
) -> Float[Tensor, "n scored"]:
    """The score of every token, as `readout` has them at its ends; nan where a vector is zero.

    With `tokens` (ids), of those alone.
    """
    if tokens is not None:
        b_U, lengths = (None if p is None else p[tokens] for p in (head.b_U, head.lengths))
        head = replace(head, W_U=head.W_U.T[tokens].T, b_U=b_U, lengths=lengths)
    with torch.no_grad():
        rows = vectors.to(head.W_U.device, torch.promote_types(vectors.dtype, torch.float32))
        zero = ~rows.any(1)
        if normalize:
            rows = torch.nn.functional.normalize(rows, dim=1)
        scores = _final(head, _scores(head, rows.to(head.W_U.dtype)))
        scores[zero] = float("nan")
        return scores


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
    top = _ends(scores, None, top_k, largest=True)
    bottom = _ends(scores, None, top_k, largest=False)
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
        ranks=_ranks(scores, goals, _TILE),
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


def _plan(head: Head, top_k: int, targets: Tensor, max_memory: int) -> tuple[int, int]:
    """How many rows, and how many vocabulary columns of W_U, to work on at a time."""
    d_model, d_vocab = head.W_U.shape
    item = _score_dtype(head).itemsize
    width = min(_TILE, max(1, max_memory // (8 * d_model * item * _BLOCK)) * _BLOCK)
    tiles = 6 * item * min(width, d_vocab)
    ends = (3 * 8 + 2 * item) * _candidates(d_vocab, top_k)
    ranks = (8 + item) * d_vocab if targets.shape[1] > _SORT else 0
    per_row = item * (d_vocab + 8 * d_model) + 32 * targets.shape[1] + max(tiles, ends, ranks)
    fixed = 0 if head.W_U.dtype == _score_dtype(head) else d_model * width * item
    return max(1, (max_memory - fixed) // per_row), width


def _score_dtype(head: Head) -> torch.dtype:
    return torch.promote_types(head.W_U.dtype, torch.float32)


def _candidates(d_vocab: int, k: int) -> int:
    """How many logits of a row the search for its k best must look at one by one."""
    blocked = k * _BLOCK + d_vocab % _BLOCK
    return blocked if 2 * blocked <= d_vocab else d_vocab


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
    device, dtype = head.W_U.device, _score_dtype(head)
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
    found = _score_rows(head, read[alive], k, targets[alive], log_probs, width)
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


def _score_rows(
    head: Head, rows: Tensor, k: int, targets: Tensor, log_probs: bool, width: int
) -> dict[str, Tensor]:
    """Both ends, ranks and normaliser of the logits of rows [n, d_model] in the head's dtype."""
    d_vocab = head.W_U.shape[1]
    blocked = _candidates(d_vocab, k) < d_vocab
    scores = rows.new_empty(len(rows), d_vocab, dtype=_score_dtype(head))
    highs, lows = [], []
    normalizer = scores.new_full((len(rows),), -float("inf"))
    for tile in _tiles(head, rows, scores, width):
        if blocked:
            whole = tile[: len(tile) // _BLOCK * _BLOCK].unflatten(0, (-1, _BLOCK))
            highs.append(whole.amax(1))
            lows.append(whole.amin(1))
        if log_probs:
            normalizer = torch.logaddexp(normalizer, _final(head, tile).logsumexp(0))
    top = _ends(scores, torch.cat(highs).T if blocked else None, k, largest=True)
    bottom = _ends(scores, torch.cat(lows).T if blocked else None, k, largest=False)
    found = {
        "top_ids": top,
        "top_scores": _final(head, scores.gather(1, top)),
        "bottom_ids": bottom,
        "bottom_scores": _final(head, scores.gather(1, bottom)),
        "ranks": _ranks(scores, scores.gather(1, targets), width),
        "target_scores": _final(head, scores.gather(1, targets)),
    }
    return found | ({"log_normalizer": normalizer} if log_probs else {})


def _tiles(head: Head, rows: Tensor, out: Tensor, width: int) -> Iterator[Tensor]:
    """Fill `out` with norm(rows) W_U + b_U, and hand over each tile of it, [columns, n].

    The product is taken transposed: a tall matrix times a narrow one is a quarter faster on CPUs,
    and so are the extremes of a tile.
    """
    hidden = head.norm(rows[:, None])[:, 0].to(out.dtype).T
    b_U = None if head.b_U is None or not head.b_U.any() else head.b_U.to(out.dtype)
    buffer = out.new_empty(min(width, out.shape[1]), len(rows))
    for start in range(0, out.shape[1], width):
        columns = slice(start, start + width)
        W_U = head.W_U[:, columns].to(out.dtype).T
        tile = buffer[: len(W_U)]
        if b_U is None:
            torch.mm(W_U, hidden, out=tile)
        else:
            torch.addmm(b_U[columns, None], W_U, hidden, out=tile)
        if head.centre is not None:
            tile -= head.centre.to(out.dtype) @ hidden
        if head.lengths is not None:
            tile /= head.lengths[columns, None].to(out.dtype)
        out[:, columns] = tile.T
        yield tile


def _scores(head: Head, rows: Tensor) -> Tensor:
    """norm(rows) W_U + b_U as it is scored, whole: faster than tile by tile where all is kept."""
    dtype = _score_dtype(head)
    hidden = head.norm(rows[:, None])[:, 0].to(dtype)
    scores = hidden.new_empty(len(rows), head.W_U.shape[1])
    # What is cast is cast a tile at a time, to hold no second unembedding.
    width = scores.shape[1] if head.W_U.dtype == dtype else _TILE
    for tile, W_U in zip(scores.split(width, 1), head.W_U.split(width, 1), strict=True):
        torch.mm(hidden, W_U.to(dtype), out=tile)
    if head.b_U is not None:
        scores += head.b_U.to(dtype)
    if head.centre is not None:
        scores -= (hidden @ head.centre.to(dtype))[:, None]
    if head.lengths is not None:
        scores /= head.lengths.to(dtype)
    return scores


def _final(head: Head, scores: Tensor) -> Tensor:
    """Logits out of norm(v) W_U + b_U: what the scale and the soft cap make of them."""
    scores = scores if head.scale == 1 else head.scale * scores
    return scores if head.soft_cap is None else head.soft_cap * (scores / head.soft_cap).tanh()


def _zero_is_uniform(head: Head) -> bool:
    scores = _scores(head, head.W_U.new_zeros(1, head.W_U.shape[0]))
    return bool(scores.amin() == scores.amax())


def _ends(scores: Tensor, blocks: Tensor | None, k: int, largest: bool) -> Tensor:
    """The ids [n, k] of the k largest or smallest scores of each row, in order, ties by id.

    `blocks` [n, d_vocab // _BLOCK] are the extremes of the whole blocks of a row. The k best scores
    lie in the k best blocks or in the tail behind them: an element of any other block is preceded
    by the extremes of all those k.
    """
    if blocks is None:
        ids = _choose(scores, k, largest)
    else:
        inside = torch.arange(_BLOCK, device=scores.device)
        ids = (_choose(blocks, k, largest)[:, :, None] * _BLOCK + inside).flatten(1)
        tail = torch.arange(blocks.shape[1] * _BLOCK, scores.shape[1], device=scores.device)
        ids = torch.cat([ids, tail.expand(len(ids), -1)], 1)
        ids = ids.gather(1, _choose(scores.gather(1, ids), k, largest))
    order = torch.sort(scores.gather(1, ids), dim=1, descending=largest, stable=True).indices
    return ids.gather(1, order)


def _choose(values: Tensor, k: int, largest: bool) -> Tensor:
    """Ascending positions [n, k] of the k largest or smallest values, the first among equals."""
    best, at = values.topk(min(k + 1, values.shape[1]), largest=largest)
    at = at[:, :k]
    # topk is free to choose among equals: where the k-th equals the next, a stable sort decides.
    tied = (best[:, k - 1] == best[:, -1]).nonzero().squeeze(1)
    if k < values.shape[1] and len(tied):
        sort = torch.sort(values[tied], dim=1, descending=largest, stable=True)
        at = at.index_copy(0, tied, sort.indices[:, :k])
    return at.sort(1).values


def _ranks(scores: Tensor, target_scores: Tensor, width: int) -> Tensor:
    """How many scores of the row are strictly higher than each target's, [n, n_targets]."""
    if target_scores.shape[1] > _SORT:
        not_higher = torch.searchsorted(scores.sort(1).values, target_scores, right=True)
        return scores.shape[1] - not_higher
    ranks = torch.zeros_like(target_scores, dtype=torch.long)
    higher = torch.empty_like(scores[:, :width])  # 0 and 1 as floats add up faster than booleans
    for tile in scores.split(width, 1):
        for i in range(ranks.shape[1]):
            torch.gt(tile, target_scores[:, i : i + 1], out=higher[:, : tile.shape[1]])
            ranks[:, i] += higher[:, : tile.shape[1]].sum(1).long()
    return ranks
