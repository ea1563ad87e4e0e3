"""The smallest step that works, against thresholds that are known."""

import pytest
import torch

from bwlens.edit.smallest import smallest_steps

THRESHOLDS = torch.tensor([1e-5, 0.3, 1.0, 2.0, 7e4], dtype=torch.float64)


@pytest.mark.parametrize("factor", [2.0, 10.0])
def test_each_is_just_above_its_threshold(factor):
    tried = []

    def works(steps):
        tried.append(steps)
        return steps >= THRESHOLDS

    found = smallest_steps(works, torch.ones_like(THRESHOLDS), within=1.05, factor=factor)
    assert (found >= THRESHOLDS).all()
    assert (found <= 1.05 * THRESHOLDS).all()
    assert len(tried) < 30


def test_what_never_works_and_what_is_not_searched_is_nan():
    found = smallest_steps(
        lambda steps: torch.tensor([False, True, True]) & (steps > 0.7),
        torch.ones(3),
        searched=torch.tensor([True, True, False]),
    )
    assert found.isnan().tolist() == [True, False, True]


def test_what_always_works_is_the_smallest_that_was_tried():
    found = smallest_steps(lambda steps: steps > -1, torch.ones(1), most=4)
    assert found.tolist() == [0.125]
