"""Changes of weights added, measured and made small."""

import copy

import pytest
import torch

from bwlens import LowRankGradient, Site
from bwlens.edit import WeightChange
from bwlens.model.weights import weight_of
from tests.changed import (
    assert_untouched,
    change_of,
    state,
)

# Arithmetic.


def two_changes():
    generator = torch.Generator().manual_seed(3)

    def rows(n, d_in, d_out):
        return LowRankGradient(
            torch.randn(n, d_in, generator=generator), torch.randn(n, d_out, generator=generator)
        )

    a = WeightChange({("W_out", 1): rows(2, 6, 4), ("W_in", 0): rows(1, 4, 6)}, "first")
    b = WeightChange({("W_out", 1): rows(3, 6, 4), ("W_out", 2): rows(1, 6, 4)}, "second")
    return a, b


def dense(change):
    return {site: part.dense() for site, part in change.items()}


def test_sums_and_multiples():
    a, b = two_changes()
    x, y = dense(a), dense(b)
    for found, expected in (
        (a + b, lambda s: x.get(s, 0) + y.get(s, 0)),
        (a - b, lambda s: x.get(s, 0) - y.get(s, 0)),
        (sum([a, b]), lambda s: x.get(s, 0) + y.get(s, 0)),
    ):
        assert set(found) == set(a) | set(b)
        assert found.note == "first; second"
        for site, values in dense(found).items():
            torch.testing.assert_close(values, expected(site))
    for found, factor in ((2 * a, 2), (a * 0.5, 0.5), (-a, -1)):
        for site, values in dense(found).items():
            torch.testing.assert_close(values, factor * x[site])


def test_sums_of_changes_of_different_models():
    a, _ = two_changes()
    other = WeightChange({("W_out", 1): LowRankGradient(torch.ones(1, 6), torch.ones(1, 5))})
    with pytest.raises(ValueError, match=r"W_out of layer 1: a change of a \[6, 4\] matrix and"):
        _ = a + other
    with pytest.raises(TypeError):
        _ = a + object()  # pyright: ignore[reportOperatorIssue]


def test_norms():
    a, _ = two_changes()
    x = dense(a)
    assert a.norm(("W_out", 1)) == pytest.approx(float(x[Site("W_out", 1)].norm()))
    whole = torch.cat([values.flatten() for values in x.values()])
    assert a.norm() == pytest.approx(float(whole.norm()))
    assert WeightChange().norm() == 0
    with pytest.raises(KeyError, match="W_O of layer 1 is not changed here; this changes W_in of"):
        a.norm(("W_O", 1))


def test_compressed():
    a, _ = two_changes()
    doubled = (a + a).compress()
    assert [part.n for part in doubled.values()] == [1, 2]
    for site, values in dense(doubled).items():
        torch.testing.assert_close(values, 2 * dense(a)[site], rtol=1e-4, atol=1e-5)


def test_what_it_says():
    a, b = two_changes()
    assert repr(WeightChange()) == "WeightChange(nothing)"
    assert repr(WeightChange(note="known already")) == "WeightChange(nothing; known already)"
    assert repr(a).startswith("WeightChange(W_in, W_out of layers 0-1; 3 rows, norm ")
    assert repr(a).endswith("; first)")
    assert repr(WeightChange({("W_out", 1): b["W_out", 1]})).startswith(
        "WeightChange(W_out of layer 1; 3 rows"
    )
    assert ("W_out", 1) in b
    assert ("W_in", 1) not in b
    assert "W_out" not in b
    assert list(a) == [Site("W_in", 0), Site("W_out", 1)]


def test_an_empty_change_changes_nothing(boot, tmp_path):
    model = boot("gpt2")
    before = state(model)
    with WeightChange().applied(model):
        assert_untouched(model, before)
    WeightChange().save(tmp_path / "nothing")
    assert len(WeightChange.load(tmp_path / "nothing")) == 0


def test_no_model():
    with pytest.raises(TypeError, match="expected a TransformerLens model, found str"):
        WeightChange().apply("gpt2")


def test_a_copy_of_a_change_is_another_change(boot):
    """Identity says what is applied, so an equal change may be added on top."""
    model, site = boot("gpt2"), Site("W_out", 1)
    change = change_of(model, site)
    value = weight_of(model, site).read()
    with change.applied(model), copy.copy(change).applied(model):
        torch.testing.assert_close(weight_of(model, site).read(), value + 2 * change[site].dense())
    assert torch.equal(weight_of(model, site).read(), value)
