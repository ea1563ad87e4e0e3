"""Which model is this: fingerprints that meet every number's row and column."""

import pytest
import torch
from torch import nn

from bwlens.model.identity import fingerprint


class Weights(nn.Module):
    """Two million numbers, of which a fingerprint takes half at most."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2048, 1024), (4096, 576), (3000, 1023), (1_000, 3 * 5 * 7 * 11)])
@pytest.mark.parametrize("axis", [0, 1])
def test_no_row_or_column_goes_unseen(shape, axis):
    model = Weights(*shape)
    before = fingerprint(model)
    for place in [*range(12), shape[axis] - 1]:
        with torch.no_grad():
            model.weight.select(axis, place).fill_(1.0)
            assert fingerprint(model) != before, place
            model.weight.zero_()
    assert fingerprint(model) == before


def test_names_shapes_and_dtypes_count():
    model = Weights(4, 6)
    assert fingerprint(model) == fingerprint(Weights(4, 6))
    assert len({fingerprint(m) for m in (model, Weights(6, 4), Weights(4, 6).double())}) == 3
