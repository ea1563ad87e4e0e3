"""What an edit is to make probable: the targets' tokens behind each of its contexts.

A value is searched over many passes that differ in the shift at one matrix alone. So what is below
the matrix runs once; above it only the tokens from the key's on are computed anew, the keys and
values of those before them kept; and only what predicts the target passes the unembedding.
"""

from __future__ import annotations

from itertools import takewhile

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bwlens.edit.keys import Contexts, key_taps, shift_of
from bwlens.model.flows import as_rows
from bwlens.model.partly import Partly, linear_maps, token_wise
from bwlens.model.passes import run, wide
from bwlens.model.prompts import Batch
from bwlens.model.protocol import LensModel
from bwlens.model.sites import Point, Site


class Aims:
    """The targets' log-probabilities under shifts of what leaves one weight.

    Args:
        model: A TransformerBridge or HookedTransformer.
        contexts: Prompts with targets, and where each prompt's key stands.
        site: The weight whose output is shifted there.

    Attributes:
        keys: What enters the weight at the keys' positions [edit, context, d_in].
        outputs: What leaves it there [edit, context, d_out].
        stream: What leaves the block there [edit, context, d_model].
        mask: Which places are a token of the target [edit, context, token].
    """

    def __init__(self, model: LensModel, contexts: Contexts, site: Site) -> None:
        batch = contexts.batch
        self._model, self._contexts = model, contexts
        (self._tap,) = key_taps(model, site.matrix, site.layer)
        self._positions, ids, mask = _places(batch)
        self._ids, self.mask = contexts.by_edit(ids), contexts.by_edit(mask)
        block, *above = model.blocks[site.layer :]
        end = Point(block, "output")
        given = [*model.blocks[: site.layer], *linear_maps(block)]
        shifted = [point.module for point in self._tap.z]
        again = [part for each in above for part in token_wise(each)]
        passed = run(
            model,
            batch.tokens,
            taps=[self._tap],
            points=[end],
            keeping=dict.fromkeys([*given, *shifted, *again]),
            positions=self._positions,
        )
        left, n_tokens = passed.left, batch.tokens.numel()
        before = takewhile(lambda part: part not in shifted, left)  # in the order they ran
        self._given = {part: left[part] for part in before if part in given}
        kept = {part: left[part] for part in again if isinstance(left.get(part), Tensor)}
        by_token = {part: t for part, t in kept.items() if t.shape[:-1].numel() == n_tokens}
        self._again = Partly(self._rows(), by_token)
        (flow,) = passed.flows
        shape = batch.tokens.shape
        self.keys, self.outputs = (
            contexts.at(wide(as_rows(rows)).unflatten(0, shape)) for rows in (flow.x, flow.z)
        )
        self.stream = contexts.at(wide(passed.seen[end][0]))

    def _rows(self) -> Int[Tensor, " n"]:
        """The rows of the flattened batch from each prompt's key to its last prediction."""
        n_pos = self._contexts.batch.tokens.shape[1]
        ends = self._positions.amax(1).tolist()
        spans = zip(self._contexts.rows.tolist(), ends, strict=True)
        return torch.tensor(
            [
                row
                for i, (first, end) in enumerate(spans)
                for row in range(first, i * n_pos + end + 1)
            ]
        )

    def words(
        self, shifts: Float[Tensor, "edit d_out"]
    ) -> Float[Tensor, "edit context token d_vocab"]:
        """Log-probability of every word where each token of the target is predicted.

        Autograd follows to the shifts where they ask for it.
        """
        batch, contexts = self._contexts.batch, self._contexts
        rows = repeat(shifts, "edit d -> (edit context) d", context=contexts.n)
        passed = run(
            self._model,
            batch.tokens,
            additions=[shift_of(self._tap, batch, contexts.rows, rows)],
            positions=self._positions,
            giving=self._given,
            partly=self._again,
            graph=shifts.requires_grad,
        )
        return contexts.by_edit(wide(passed.logits).log_softmax(-1))

    def of_target(
        self, words: Float[Tensor, "edit context token d_vocab"]
    ) -> Float[Tensor, "edit context token"]:
        """Of these words, the target's tokens; those before each are teacher forced."""
        return words.gather(-1, self._ids[..., None].to(words.device))[..., 0]


def _places(
    batch: Batch,
) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """Where each token of each target is predicted, its id, and which places are one."""
    most = max(map(len, batch.targets))
    lengths = torch.tensor([len(ids) for ids in batch.targets])
    places = torch.arange(most).expand(len(lengths), -1)
    mask = places < lengths[:, None]
    ids = torch.tensor([[*row, *[row[-1]] * (most - len(row))] for row in batch.targets])
    positions = batch.last.cpu()[:, None] + places.minimum(lengths[:, None] - 1)
    return positions, ids, mask
