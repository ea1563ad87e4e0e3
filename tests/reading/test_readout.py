"""The lens against a slow loop: one vector at a time, in Python floats, with a full sort."""

import doctest
import math
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bwlens.model.head import Head
from bwlens.reading.readouts import Readout, readout

TINY, DEFAULT = 1, 256 * 2**20  # the least memory there can be: one row, one block at a time


# The oracle.


def slow_logits(head: Head, v: list[float], sign: int = 1, normalize: bool = False) -> list[float]:
    """The definition, with the norm written out by hand."""
    length = math.sqrt(sum(e * e for e in v)) if normalize else 1.0
    v = [sign * e / length for e in v]
    if isinstance(head.norm, nn.Module):
        parts = {name: part.tolist() for name, part in head.norm.named_parameters()}
        gain, bias = parts["weight"], parts.get("bias", [0.0] * len(v))
        mean = sum(v) / len(v) if head.centred else 0.0
        scale = math.sqrt(sum((e - mean) ** 2 for e in v) / len(v) + head.eps)
        v = [(e - mean) / scale * g + b for e, g, b in zip(v, gain, bias, strict=True)]
    b_U = [0.0] * head.W_U.shape[1] if head.b_U is None else head.b_U.tolist()
    logits = [
        head.scale * (sum(e * w for e, w in zip(v, column, strict=True)) + b)
        for column, b in zip(head.W_U.T.tolist(), b_U, strict=True)
    ]
    if head.soft_cap is None:
        return logits
    return [head.soft_cap * math.tanh(s / head.soft_cap) for s in logits]


def assert_reads(
    found: Readout, logits: list[list[float]], targets: list[list[int]] | None = None, rtol=1e-9
) -> None:
    """Rows of a readout [n, ...] against the logits of each row."""
    assert found.shape == (len(logits),)
    k = found.top_ids.shape[-1]
    for row, scores in enumerate(logits):
        order = sorted(range(len(scores)), key=lambda t: (-scores[t], t))
        rising = sorted(range(len(scores)), key=lambda t: (scores[t], t))
        one = found[row]
        assert one.top_ids.tolist() == order[:k]
        assert one.bottom_ids.tolist() == rising[:k]
        atol = rtol * max(map(abs, scores))
        assert one.top_scores.tolist() == pytest.approx(
            [scores[t] for t in order[:k]], rel=rtol, abs=atol
        )
        assert one.bottom_scores.tolist() == pytest.approx(
            [scores[t] for t in rising[:k]], rel=rtol, abs=atol
        )
        if targets is not None:
            assert one.ranks is not None
            assert one.target_scores is not None
            wanted = [scores[t] for t in targets[row]]
            assert one.ranks.tolist() == [sum(s > w for s in scores) for w in wanted]
            assert one.target_scores.tolist() == pytest.approx(wanted, rel=rtol, abs=atol)


def make_head(
    norm: str = "LayerNorm",
    d_model: int = 6,
    d_vocab: int = 41,
    dtype: torch.dtype = torch.float64,
    eps: float = 1e-5,
    bias: bool = True,
    seed: int = 0,
    **parts: Any,
) -> Head:
    rand = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rand, dtype=torch.float64).to(dtype)

    if norm == "LayerNorm":
        module = nn.LayerNorm(d_model, eps=eps, dtype=dtype)
        module.bias.data = draw(d_model) if bias else torch.zeros(d_model, dtype=dtype)
    else:
        module = nn.RMSNorm(d_model, eps=eps, dtype=dtype)
    module.weight.data = 1 + 0.3 * draw(d_model)
    W_U = draw(d_vocab, d_model).T  # a transposed view, as a bridge hands it over
    head = Head(module, W_U, None, None, 1.0, eps, norm == "LayerNorm")
    return replace(head, **parts)


def exact_head(d_vocab: int, seed: int = 0, d_model: int = 4) -> Head:
    """Small integers throughout: many ties, and no rounding that a batch could change."""
    rand = torch.Generator().manual_seed(seed)
    W_U = torch.randint(-2, 3, (d_model, d_vocab), generator=rand).float()
    b_U = torch.randint(-1, 2, (d_vocab,), generator=rand).float()
    return Head(as_it_is, W_U, b_U, None, 1.0, 0.0, False)


def as_it_is(v: Tensor) -> Tensor:
    """No norm at all; but norms expect [batch, pos, d_model]."""
    assert v.ndim == 3
    assert v.shape[1] == 1
    return v


def vectors_of(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same(a: Readout, b: Readout, rtol: float = 0.0) -> None:
    for field in fields(Readout):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol, equal_nan=True)


# The arithmetic.


@pytest.mark.parametrize("max_memory", [TINY, 60_000, DEFAULT])
@pytest.mark.parametrize("d_vocab", [1, 41, 900])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_agrees_with_the_slow_loop(norm, normalize, sign, d_vocab, max_memory) -> None:
    head = make_head(
        norm, d_vocab=d_vocab, b_U=vectors_of(d_vocab, seed=5), scale=0.7, soft_cap=3.0
    )
    vectors = vectors_of(5, 6) * torch.tensor([1e-3, 0.1, 1, 10, 1e3]).double()[:, None]
    targets = torch.randint(d_vocab, (5, 3), generator=torch.Generator().manual_seed(2))
    found = readout(
        head,
        vectors,
        top_k=min(3, d_vocab),
        targets=targets,
        normalize=normalize,
        sign=sign,
        max_memory=max_memory,
    )
    logits = [slow_logits(head, v, sign, normalize) for v in vectors.tolist()]
    assert_reads(found, logits, targets.tolist())
    lengths = [math.hypot(*v) for v in vectors.tolist()]
    assert found.norms.tolist() == pytest.approx(lengths, rel=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    d_vocab=st.sampled_from([2, 3, 40, 128, 300, 640, 900]),
    n=st.integers(1, 6),
    k=st.integers(1, 4),
    n_targets=st.integers(0, 3),
    sign=st.sampled_from([1, -1]),
    seed=st.integers(0, 10**6),
    memory=st.sampled_from([TINY, 20_000, DEFAULT]),
)
def test_ties_keep_the_order_of_ids(d_vocab, n, k, n_targets, sign, seed, memory) -> None:
    head, rand = exact_head(d_vocab, seed), torch.Generator().manual_seed(seed)
    vectors = torch.randint(-1, 2, (n, 4), generator=rand).float()
    vectors[:, 0] = 1
    targets = torch.randint(d_vocab, (n, n_targets), generator=rand)
    found = readout(head, vectors, min(k, d_vocab), targets, sign=sign, max_memory=memory)
    logits = [slow_logits(head, v, sign) for v in vectors.tolist()]
    assert_reads(found, logits, targets.tolist(), rtol=0)


def test_all_scores_equal() -> None:
    head = replace(exact_head(900), W_U=torch.zeros(4, 900), b_U=None)
    found = readout(head, torch.ones(2, 4), top_k=3, targets=[899, 0])
    assert found.top_ids.tolist() == found.bottom_ids.tolist() == [[0, 1, 2]] * 2
    assert found.ranks is not None
    assert not found.ranks.any()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_do_not_mix(data) -> None:
    n = data.draw(st.integers(1, 9))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    memory = data.draw(st.sampled_from([TINY, 30_000, 60_000]))
    head = exact_head(700)
    vectors = torch.randint(-3, 4, (n, 4), generator=torch.Generator().manual_seed(n)).float()
    targets = torch.arange(2 * n).view(n, 2)
    whole = readout(head, vectors, 2, targets, log_probs=True)
    shuffled = readout(head, vectors[order], 2, targets[order], log_probs=True, max_memory=memory)
    assert_same(whole[order], shuffled, rtol=1e-6)
    for row in range(n):
        alone = readout(head, vectors[row], 2, targets[row], log_probs=True)
        assert_same(whole[row], alone, rtol=1e-6)


def test_many_targets_take_the_sorting_road() -> None:
    head, vectors = exact_head(300), torch.tensor([[1.0, 0, 2, -1], [0, 1, 1, 1]])
    few = [readout(head, vectors, targets=t).ranks for t in range(300)]
    many = readout(head, vectors, targets=range(300)).ranks
    assert many is not None
    assert torch.equal(torch.cat(few, -1), many)  # type: ignore[arg-type]


def test_a_vocabulary_of_several_tiles() -> None:
    head = make_head("RMSNorm", d_vocab=9001, dtype=torch.float32)
    vectors = vectors_of(3, 6, dtype=torch.float32)
    found = readout(head, vectors, top_k=9, targets=[0, 9000], log_probs=True)
    scores = head.norm(vectors).detach() @ head.W_U
    torch.testing.assert_close(found.top_scores, scores.topk(9).values)
    torch.testing.assert_close(found.bottom_scores, scores.topk(9, largest=False).values)
    torch.testing.assert_close(found.log_normalizer, scores.logsumexp(-1))
    assert torch.equal(found.top_ids, scores.topk(9).indices)


@pytest.mark.parametrize("max_memory", [TINY, DEFAULT])
def test_log_probabilities(max_memory: int) -> None:
    head = make_head(d_vocab=300, soft_cap=2.0, scale=3.0)
    vectors = vectors_of(2, 3, 6)
    found = readout(head, vectors, 300, [7, 8], log_probs=True, max_memory=max_memory)
    logits = torch.tensor([[slow_logits(head, v) for v in vs] for vs in vectors.tolist()]).double()
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(found.top_log_probs, expected.gather(-1, found.top_ids))
    torch.testing.assert_close(found.bottom_log_probs, expected.gather(-1, found.bottom_ids))
    torch.testing.assert_close(found.target_log_probs, expected[..., 7:9])
    with pytest.raises(ValueError, match="without log_probs=True"):
        _ = readout(head, vectors).top_log_probs
    with pytest.raises(ValueError, match=r"without targets=\.\.\."):
        _ = readout(head, vectors, log_probs=True).target_log_probs


def test_a_saturated_cap_makes_no_ties() -> None:
    head = Head(lambda v: v, torch.eye(3), None, 1.0, 1.0, 0.0, False)
    found = readout(head, torch.tensor([30.0, 60.0, 50.0]), top_k=3, targets=[0, 1, 2])
    assert found.top_scores.tolist() == [1.0] * 3
    assert found.top_ids.tolist() == [1, 2, 0]
    assert found.ranks is not None
    assert found.ranks.tolist() == [2, 0, 1]


def test_sign_is_not_a_reversal_where_there_is_a_bias() -> None:
    vectors = vectors_of(4, 6)
    with_bias, without = make_head(), make_head(bias=False)
    for head, reversed_ in ((with_bias, False), (without, True)):
        up, down = readout(head, vectors, 41), readout(head, vectors, 41, sign=-1)
        assert torch.equal(up.bottom_ids, down.top_ids) is reversed_
        assert_same(down, readout(head, -vectors, 41), rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(power=st.integers(-30, 30), seed=st.integers(0, 1000))
def test_a_normalised_reading_knows_no_length(power: int, seed: int) -> None:
    head = make_head(dtype=torch.float32, eps=1e-2)
    vectors = vectors_of(2, 6, seed=seed, dtype=torch.float32)
    scaled = vectors * 10.0**power
    one, other = readout(head, vectors, normalize=True), readout(head, scaled, normalize=True)
    assert_same(replace(one, norms=other.norms), other, rtol=1e-4)
    expected = vectors.double().norm(dim=-1) * 10.0**power
    torch.testing.assert_close(other.norms.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_single_precision_logits(dtype: torch.dtype) -> None:
    head = make_head(d_vocab=3000, d_model=32, dtype=dtype)
    vectors = vectors_of(4, 32, dtype=torch.float32)
    found = readout(head, vectors, top_k=5, targets=[3], log_probs=True, max_memory=10**6)
    hidden = head.norm(vectors.to(dtype)).detach().double()
    scores = hidden @ head.W_U.double()
    assert found.top_scores.dtype == found.norms.dtype == torch.float32
    assert torch.equal(found.top_ids, scores.topk(5).indices)
    assert torch.equal(found.ranks, (scores > scores[:, 3:4]).sum(-1, keepdim=True))  # type: ignore[arg-type]
    torch.testing.assert_close(found.top_scores, scores.topk(5).values.float())
    torch.testing.assert_close(found.norms.double(), vectors.double().norm(dim=-1))


def test_what_half_precision_cannot_hold() -> None:
    head = make_head(dtype=torch.float16)
    tiny, huge = torch.full((1, 6), 1e-12), torch.full((1, 6), 1e6)
    tiny[0, 0] = huge[0, 0] = 0
    found = readout(head, tiny)
    assert found.zero.all()
    assert found.norms.item() == pytest.approx(5**0.5 * 1e-12)
    assert not readout(head, tiny, normalize=True).zero.any()
    with pytest.raises(ValueError, match=r"1 of 1 vectors are not finite in torch\.float16"):
        readout(head, huge)
    assert_same(
        replace(readout(head, huge, normalize=True), norms=found.norms),
        readout(head, tiny, normalize=True),
    )


# Traps.


@settings(max_examples=30, deadline=None)
@given(
    power=st.integers(-8, 3), normalize=st.booleans(), norm=st.sampled_from(["LayerNorm", "RMS"])
)
def test_shrinkage_is_what_epsilon_leaves(power: int, normalize: bool, norm: str) -> None:
    head = make_head(norm, eps=1e-3)
    vectors = vectors_of(3, 6) * 10.0**power
    found = readout(head, vectors, normalize=normalize)
    read = vectors / vectors.norm(dim=-1, keepdim=True) if normalize else vectors
    if norm == "LayerNorm":
        read = read - read.mean(-1, keepdim=True)
    length = read.norm(dim=-1)
    torch.testing.assert_close(found.shrinkage, length / (length**2 + 6 * 1e-3).sqrt())
    # What the norm made of the vector has that share of the length it would have without epsilon.
    gain = head.norm.weight.detach()  # type: ignore[attr-defined]
    bias = head.norm.bias.detach() if norm == "LayerNorm" else 0  # type: ignore[attr-defined]
    left = ((head.norm((read)[:, None])[:, 0].detach() - bias) / gain).norm(dim=-1)
    torch.testing.assert_close(found.shrinkage, left / 6**0.5)


def test_epsilon_is_marked_where_a_bias_would_be_read() -> None:
    vectors = vectors_of(1, 6) / vectors_of(1, 6).norm() * torch.tensor([[1e-6], [1.0]])
    b_U = torch.arange(41.0).double()
    for head, marked in (
        (make_head("LayerNorm"), True),
        (make_head("LayerNorm", bias=False), False),
        (make_head("LayerNorm", bias=False, b_U=b_U), True),
        (make_head("RMSNorm"), False),
        (make_head("RMSNorm", b_U=b_U), True),
        (make_head("RMSNorm", b_U=torch.ones(41).double()), False),  # lifts all tokens alike
    ):
        found = readout(head, vectors)
        assert found.shrinkage[0] < 1e-3
        assert found.shrinkage[1] > 0.99
        assert found.eps_regime.tolist() == [marked, False]
        assert not readout(head, vectors, normalize=True).eps_regime.any()


def test_the_mark_stands_where_shrinkage_falls_below_nine_tenths() -> None:
    head = make_head("RMSNorm", eps=1e-4, b_U=torch.arange(41.0).double())
    at = math.sqrt(6 * 1e-4 * 0.81 / 0.19)
    vectors = torch.zeros(2, 6).double()
    vectors[:, 2] = torch.tensor([0.99 * at, 1.01 * at])
    assert readout(head, vectors).eps_regime.tolist() == [True, False]


def test_a_constant_vector_is_nothing_to_layer_norm() -> None:
    found = readout(make_head(), torch.full((1, 6), 3.0))
    assert not found.zero.any()
    assert found.shrinkage.item() == 0
    assert found.eps_regime.all()


@pytest.mark.parametrize("normalize", [False, True])
def test_zero_rows_have_no_reading(normalize: bool) -> None:
    head, vectors = make_head(d_vocab=700), vectors_of(2, 3, 6)
    vectors[0, 1] = vectors[1, 2] = 0
    found = readout(
        head, vectors, 2, [1, 2], normalize=normalize, log_probs=True, max_memory=60_000
    )
    assert found.zero.tolist() == [[False, True, False], [False, False, True]]
    none = found[found.zero]
    for ids in (none.top_ids, none.bottom_ids, none.ranks):
        assert ids is not None
        assert ids.eq(-1).all()
    for scores in (none.top_scores, none.bottom_scores, none.target_scores, none.log_normalizer):
        assert scores is not None
        assert scores.isnan().all()
    assert not none.norms.any()
    assert not none.shrinkage.any()
    assert not none.eps_regime.any()
    rest = readout(head, vectors[~found.zero], 2, [1, 2], normalize=normalize, log_probs=True)
    assert_same(found[~found.zero], rest, rtol=1e-12)
    own = torch.arange(6).view(2, 3, 1)
    zero = found.zero
    found = readout(head, vectors, 2, own)[~zero]
    assert_same(found, readout(head, vectors[~zero], 2, own[~zero]), 1e-12)


def test_nothing_but_zero_rows_and_no_rows_at_all() -> None:
    head = make_head(d_vocab=700)
    assert readout(head, torch.zeros(2, 6), 2).zero.all()
    for lead in ((0,), (3, 0), (0, 2)):
        found = readout(head, torch.zeros(*lead, 6), 2, [1, 2, 3], log_probs=True)
        assert found.shape == lead
        assert found.top_ids.shape == (*lead, 2)
        assert found.ranks is not None
        assert found.ranks.shape == (*lead, 3)


# The result.


def test_targets_are_shared_or_each_rows_own() -> None:
    head, vectors = make_head(), vectors_of(2, 3, 6)
    one = readout(head, vectors, targets=4).ranks
    assert one is not None
    assert one.shape == (2, 3, 1)
    each = torch.arange(6).view(2, 3, 1)
    own = readout(head, vectors, targets=torch.cat([each, each + 7], -1).int()).ranks
    assert own is not None
    for at in range(6):
        alone = readout(head, vectors, targets=[at, at + 7]).ranks
        assert alone is not None
        assert torch.equal(alone.view(6, 2)[at], own.view(6, 2)[at])
    for same in ([4], (4,), torch.tensor(4), torch.tensor([4])):
        assert torch.equal(one, readout(head, vectors, targets=same).ranks)  # type: ignore[arg-type]
    assert readout(head, vectors).ranks is None
    assert readout(head, vectors).target_scores is None


def test_indexing_reaches_every_field() -> None:
    found = readout(make_head(), vectors_of(2, 3, 6), 5, [1, 2])
    assert repr(found) == "Readout([2, 3], k=5, n_targets=2)"
    assert repr(found[1]) == "Readout([3], k=5, n_targets=2)"
    for index in (
        0,
        (1, 2),
        (..., -1),
        slice(1, None),
        found.norms > found.norms.mean(),
        (0, [2, 0]),
    ):
        part = found[index]
        assert torch.equal(part.norms, found.norms[index])
        rows = torch.stack([found.top_ids[..., i][index] for i in range(5)], -1)
        assert torch.equal(part.top_ids, rows)
    for beyond in (2, (0, 0, 0)):
        with pytest.raises(IndexError):
            found[beyond]
    assert [layer.shape for layer in found] == [(3,), (3,)]


def test_nothing_is_kept_and_nothing_changed() -> None:
    head, vectors = make_head(), vectors_of(2, 6).requires_grad_()
    found = readout(head, vectors, targets=1, log_probs=True)
    assert not any(getattr(found, f.name).requires_grad for f in fields(Readout))
    assert torch.is_grad_enabled()
    assert torch.equal(vectors, vectors_of(2, 6))


class Memory(TorchDispatchMode):
    """The largest storage and the most bytes alive at once, of all that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, list[int]] = {}
        self.largest = self.most = 0

    def _gone(self, key: int) -> None:
        self.alive[key][1] -= 1
        if not self.alive[key][1]:
            del self.alive[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if not isinstance(tensor, Tensor) or "out" in (kwargs or {}):
                continue
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            self.alive.setdefault(key, [size, 0])[1] += 1
            weakref.finalize(tensor, self._gone, key)
            self.largest = max(self.largest, size)
        self.most = max(self.most, sum(size for size, _ in self.alive.values()))
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "n_targets"), [(3, 2), (2000, 1), (3, 100)])
def test_memory_stays_within_the_bound(dtype: torch.dtype, top_k: int, n_targets: int) -> None:
    n, d_vocab, bound = (20 if top_k > 3 else 100), 20_000, 6 * 2**20
    head = make_head(d_vocab=d_vocab, d_model=8, dtype=dtype, soft_cap=30.0, scale=0.5)
    if top_k == 2000:  # the most there can be: all is tied, and every row is sorted
        head = replace(head, W_U=torch.zeros_like(head.W_U))
    vectors, targets = vectors_of(n, 8, dtype=torch.float32), list(range(n_targets))
    with Memory() as memory:
        readout(head, vectors, top_k, targets, log_probs=True, max_memory=bound)
    result = 2 * n * (2 * top_k + n_targets) * (8 + 4)  # the parts, and then the parts joined
    assert bound / 10 < memory.largest < bound
    assert bound / 2 < memory.most < bound + result
    with Memory() as unbound:
        readout(head, vectors, top_k, targets, log_probs=True)
    assert unbound.most > bound + result


# What cannot be read.


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors a user meets, who runs without the checks of shapes."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused() -> None:
    head, vectors = make_head(), vectors_of(2, 3, 6)
    broken = vectors.clone()
    broken[0, 0, 0], broken[1, 1, 2] = math.nan, -math.inf
    refused: list[tuple[str, Callable[[], Any]]] = [
        (
            r"\[2, 7\]; expected .* d_model = 6\. W_in .* delta",
            lambda: readout(head, vectors_of(2, 7)),
        ),
        ("d_model = 6", lambda: readout(head, torch.tensor(1.0))),
        ("torch.int64; expected floating", lambda: readout(head, vectors.long())),
        ("top_k is 0; expected 1 to 41", lambda: readout(head, vectors, 0)),
        ("top_k is 42; expected 1 to 41", lambda: readout(head, vectors, 42)),
        ("target 41 is outside .* 0 to 40", lambda: readout(head, vectors, targets=[3, 41])),
        ("target -1 is outside", lambda: readout(head, vectors, targets=-1)),
        (
            "torch.float32; expected token ids",
            lambda: readout(head, vectors, targets=torch.ones(1)),
        ),
        ("torch.bool", lambda: readout(head, vectors, targets=torch.ones(1) > 0)),
        (
            r"\[3, 2\]; expected \[n_targets\].* or \[2, 3, 'n_targets'\]",
            lambda: readout(head, vectors, targets=torch.ones(3, 2).long()),
        ),
        ("sign is 0; expected 1", lambda: readout(head, vectors, sign=0)),
        ("2 of 6 vectors are not finite", lambda: readout(head, broken)),
    ]
    for message, read in refused:
        with pytest.raises(ValueError, match=message):
            read()


# The model's own lens.


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("compatibility", [False, True])
def test_a_model_is_read_by_its_own_norm_and_unembedding(boot, name, compatibility) -> None:
    model = boot(name, torch.float64, compatibility)
    vectors = vectors_of(2, 3, 16, dtype=torch.float32)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = readout(model, vectors, 61, 5)
    scores = model.unembed(model.ln_final(vectors.double())).detach()
    if name == "gemma2":
        scores = 30 * (scores / 30).tanh()
    torch.testing.assert_close(found.top_scores, scores.sort(descending=True).values)
    assert torch.equal(found.top_ids, scores.argsort(descending=True))
    assert torch.equal(found.ranks, (scores > scores[..., 5:6]).sum(-1, keepdim=True))  # type: ignore[arg-type]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_the_example_runs() -> None:
    example = doctest.DocTestFinder().find(
        readout, globs={"Head": Head, "readout": readout, "torch": torch}
    )
    runner = doctest.DocTestRunner()
    assert [runner.run(test) for test in example if test.examples]
    assert runner.summarize().failed == 0


def test_a_readout_placed_among_unread_positions():
    head = Head(lambda v: v, torch.eye(3), None, None, scale=1.0, eps=1e-5, centred=False)
    vectors = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    vectors[:, [0, 2]] = 0
    expected = readout(head, vectors, top_k=2, targets=[1], log_probs=True)
    placed = readout(head, vectors[:, [1, 3]], 2, [1], log_probs=True).placed([1, 3], 4)
    for part in fields(placed):
        one, other = getattr(placed, part.name), getattr(expected, part.name)
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, equal_nan=True, rtol=0, atol=0)
