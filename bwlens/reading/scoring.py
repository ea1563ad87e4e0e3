"""Scores over the vocabulary: the product with the unembedding, its ends, and ranks in it.

Two ways through the product. Where only the ends of each row are wanted, a tile of the vocabulary
at a time, whose extremes are taken while it is in the cache; where all scores are kept, whole rows.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves linalg, split, norm and others of its functions untyped.)

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bwlens.model.head import Head

_BLOCK = 128  # The k best of a row lie in the k blocks with the best maxima.
_TILE = 2048  # Vocabulary columns scored at a time: rows x tile stays in the cache.
_SORT = 64  # From this many targets on, one sort of a row is cheaper than counting for each.


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


def score_rows(
    head: Head, rows: Tensor, k: int, targets: Tensor, log_probs: bool, width: int
) -> dict[str, Tensor]:
    """Both ends, ranks and normaliser of the logits of rows [n, d_model] in the head's dtype."""
    d_vocab = head.W_U.shape[1]
    blocked = _candidates(d_vocab, k) < d_vocab
    scores = rows.new_empty(len(rows), d_vocab, dtype=score_dtype(head))
    highs, lows = [], []
    normalizer = scores.new_full((len(rows),), -float("inf"))
    for tile in _tiles(head, rows, scores, width):
        if blocked:
            whole = tile[: len(tile) // _BLOCK * _BLOCK].unflatten(0, (-1, _BLOCK))
            highs.append(whole.amax(1))
            lows.append(whole.amin(1))
        if log_probs:
            normalizer = torch.logaddexp(normalizer, _final(head, tile).logsumexp(0))
    top = ends(scores, torch.cat(highs).T if blocked else None, k, largest=True)
    bottom = ends(scores, torch.cat(lows).T if blocked else None, k, largest=False)
    found = {
        "top_ids": top,
        "top_scores": _final(head, scores.gather(1, top)),
        "bottom_ids": bottom,
        "bottom_scores": _final(head, scores.gather(1, bottom)),
        "ranks": ranks_among(scores, scores.gather(1, targets), width),
        "target_scores": _final(head, scores.gather(1, targets)),
    }
    return found | ({"log_normalizer": normalizer} if log_probs else {})


def zero_is_uniform(head: Head) -> bool:
    """Whether the head gives every token the same score where nothing comes in."""
    scores = _scores(head, head.W_U.new_zeros(1, head.W_U.shape[0]))
    return bool(scores.amin() == scores.amax())


def plan(head: Head, top_k: int, targets: Tensor, max_memory: int) -> tuple[int, int]:
    """How many rows, and how many vocabulary columns of W_U, to work on at a time."""
    d_model, d_vocab = head.W_U.shape
    item = score_dtype(head).itemsize
    width = min(_TILE, max(1, max_memory // (8 * d_model * item * _BLOCK)) * _BLOCK)
    tiles = 6 * item * min(width, d_vocab)
    chosen = (3 * 8 + 2 * item) * _candidates(d_vocab, top_k)
    ranks = (8 + item) * d_vocab if targets.shape[1] > _SORT else 0
    per_row = item * (d_vocab + 8 * d_model) + 32 * targets.shape[1] + max(tiles, chosen, ranks)
    fixed = 0 if head.W_U.dtype == score_dtype(head) else d_model * width * item
    return max(1, (max_memory - fixed) // per_row), width


def score_dtype(head: Head) -> torch.dtype:
    """What scores are computed in: the head's own, float32 at least."""
    return torch.promote_types(head.W_U.dtype, torch.float32)


def _candidates(d_vocab: int, k: int) -> int:
    """How many logits of a row the search for its k best must look at one by one."""
    blocked = k * _BLOCK + d_vocab % _BLOCK
    return blocked if 2 * blocked <= d_vocab else d_vocab


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
    dtype = score_dtype(head)
    hidden = head.norm(rows[:, None])[:, 0].to(dtype)
    scores = hidden.new_empty(len(rows), head.W_U.shape[1])
    # By tiles as well, so that a cast holds no second unembedding.
    for tile, W_U in zip(scores.split(_TILE, 1), head.W_U.split(_TILE, 1), strict=True):
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


def ends(scores: Tensor, blocks: Tensor | None, k: int, largest: bool) -> Tensor:
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


def ranks_among(scores: Tensor, target_scores: Tensor, width: int = _TILE) -> Tensor:
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
