"""Numbers of fewer bits, for the wheel: how far off, how small, and what they are for."""

import zlib

import torch

from bwlens.edit.statistics import demo_statistics
from bwlens.runs.tensors import read_tensors
from tests.oracle import relative_error
from tools.demo.statistics import ROOM
from tools.rounding import rounded, rounded_inverse_factor


def test_a_weight_is_in_steps_of_its_rows():
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 400, generator=make) * torch.logspace(-3, 1, 20)[:, None]
    weight[3] = 0.0
    found = rounded(weight, 8)
    assert found.dtype == torch.float16
    for row, given in zip(found, weight, strict=True):
        values = row.double().unique()
        step = float(values.diff().min()) if len(values) > 1 else 0.0
        assert len(values) <= 255
        assert float((row.double() - given.double()).abs().max()) <= step / 2
    small, plain = (len(zlib.compress(w.numpy().tobytes(), 9)) for w in (found, weight.half()))
    assert small < 0.75 * plain


def test_what_an_entry_loses_others_make_up_for():
    """Whitened keys of few directions: rounded together far better than each entry alone."""
    make = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 60, generator=make, dtype=torch.float64)
    keys = torch.randn(4000, 12, generator=make, dtype=torch.float64) @ mixing
    keys = keys + 0.1 * torch.randn(4000, 60, generator=make, dtype=torch.float64)
    inverse = torch.linalg.inv(torch.linalg.cholesky(keys.T @ keys / len(keys)))
    together = rounded_inverse_factor(inverse, 64)
    step = torch.where(together != 0, together.abs(), torch.inf).amin(0)
    alone = (inverse / step).round() * step
    exact, one, other = (keys[:50] @ f.T @ f for f in (inverse, together, alone))
    assert relative_error(one, exact) < 0.1
    assert relative_error(one, exact) < relative_error(other, exact) / 3
    assert torch.equal(together, together.tril())


def test_the_shipped_statistics_are_of_few_bits():
    tensors, _ = read_tensors(ROOM / "statistics.safetensors", "KeyStatistics", "save_statistics")
    packed = [tensor for name, tensor in tensors.items() if name.endswith("packed")]
    assert len(packed) == len(demo_statistics())
    zipped = sum(len(zlib.compress(tensor.numpy().tobytes(), 9)) for tensor in packed)
    assert zipped < 0.65 * sum(2 * tensor.numel() for tensor in packed)
