"""The lens of a mixture of experts: each number against autograd on an unbridged copy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bwlens
from bwlens.show import circuits
from tests import tiny

PROMPT = "t5 t9 t30 t41 t8 t5"
NAMES = ("mixtral", "qwen2_moe")


def unbridged(name):
    """By hand, of a Hugging Face model: what the experts of layer 1 are given and give back.

    The experts are run one by one in here, so that every row is a leaf of its own.
    """
    hf = tiny.hf_model(name)
    experts = hf.model.layers[1].mlp.experts
    seen = {}

    def slow(hidden, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden)
        seen["weights"] = top_k_weights.detach()
        for token in range(len(hidden)):
            for choice, expert in enumerate(top_k_index[token].tolist()):
                both = hidden[token] @ experts.gate_up_proj[expert].T
                gate, up = both.chunk(2)
                post = experts.act_fn(gate) * up
                out = post @ experts.down_proj[expert].T
                for tensor in (gate, up, out):
                    tensor.retain_grad()
                seen[token, choice] = (hidden[token].detach(), gate, up, post, out)
                total = total + torch.nn.functional.one_hot(torch.tensor(token), len(hidden))[
                    :, None
                ] * (top_k_weights[token, choice] * out)
        total.retain_grad()
        seen["total"] = total
        return total

    experts.forward = slow
    # The expert that every token passes, where there is one: what leaves each of its matrices.
    shared = getattr(hf.model.layers[1].mlp, "shared_expert", None)
    for name in ("gate_proj", "up_proj", "down_proj") if shared is not None else ():

        def keep(module, args, output, name=name):
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        getattr(shared, name).register_forward_hook(keep)
    return hf, seen


@pytest.fixture(scope="module", params=NAMES)
def both(request, tokenizer):
    """A lens, and what was seen by hand at layer 1."""
    model = tiny.bridge(request.param, tokenizer)
    lens = bwlens.backward_lens(model, PROMPT, "t17", normalize="both", prepend_bos=False)
    hf, seen = unbridged(request.param)
    logits = hf(torch.tensor([lens.token_ids])).logits[0, -1]
    (-logits.log_softmax(-1)[17]).backward()
    seen["read"] = bwlens.readout(model, seen["total"].grad, normalize=True)
    seen["sums to one"] = request.param == "mixtral"
    return lens, seen


def norms_by_hand(seen, pick, shared):
    """The norm of all the rows that a token has in its experts, side by side."""
    n_tokens, n_choices = seen["weights"].shape
    rows = [[pick(*seen[t, c]) for c in range(n_choices)] for t in range(n_tokens)]
    if "up_proj" in seen:
        rows = [[*row, own] for row, own in zip(rows, shared(seen), strict=True)]
    return torch.stack([torch.cat(row).norm() for row in rows])


def test_neurons_of_different_experts_stand_side_by_side(both):
    lens, seen = both
    by_hand = {
        ("W_in", "delta"): (
            lambda x, gate, up, post, out: up.grad,
            lambda seen: seen["up_proj"][1].grad,
        ),
        ("W_gate", "delta"): (
            lambda x, gate, up, post, out: gate.grad,
            lambda seen: seen["gate_proj"][1].grad,
        ),
        ("W_out", "x"): (
            lambda x, gate, up, post, out: post.detach(),
            lambda seen: seen["down_proj"][0],
        ),
    }
    for (matrix, of), (pick, shared) in by_hand.items():
        expected = norms_by_hand(seen, pick, shared)
        torch.testing.assert_close(lens.norms(matrix, of)[1], expected, rtol=1e-4, atol=1e-7)


def test_the_norm_of_delta_is_that_of_the_gradients_own_rows(both):
    """Summed over tokens, the squares are those of all the rows that the gradient has."""
    lens, _ = both
    for matrix in ("W_in", "W_out"):
        parts = [g for s, g in lens.gradients.items() if (s.matrix, s.layer) == (matrix, 1)]
        of = "delta" if matrix == "W_in" else "x"
        total = sum(getattr(part, of).double().square().sum() for part in parts)
        found = lens.norms(matrix, of)[1].double().square().sum()
        torch.testing.assert_close(found, total, rtol=1e-5, atol=0)


def test_the_vector_that_is_read_is_one_for_all_experts(both):
    """x as it came in; delta as what the experts add up to has it, by the sum of their weights."""
    lens, seen = both
    x = torch.stack([seen[token, 0][0] for token in range(len(lens.tokens))])
    torch.testing.assert_close(lens.norms("W_in", "x")[1], x.norm(dim=1), rtol=1e-4, atol=1e-6)
    weights = seen["weights"].sum(1)
    g = seen["total"].grad
    expected = weights * g.norm(dim=1)
    if "down_proj" in seen:  # another multiple of the same vector
        expected = expected + seen["down_proj"][1].grad.norm(dim=1)
    torch.testing.assert_close(lens.norms("W_out")[1], expected, rtol=1e-4, atol=1e-7)
    assert weights.allclose(torch.ones(6)) == seen["sums to one"]
    # Lengths aside, the words are those of dL/d(what the experts add up to).
    read = lens.as_reading("normalised").readout("W_out")
    assert torch.equal(read.bottom_ids[1], seen["read"].bottom_ids)


def test_pictures_of_a_mixture(both):
    lens, _ = both
    ranks = [text.get_text() for text in lens.figure("spectrum").axes[0].get_legend().get_texts()]
    parts = lens.gradients_of("W_out", 1).values()
    assert len(parts) > 1
    assert f"1 (rank {sum(part.rank() for part in parts)})" in ranks
    assert "expert" in circuits.moved_neurons(lens, "W_out").local_src
    with pytest.raises(ValueError, match="name one of them"):
        lens.gradient("W_out", 1)


def test_experts_that_share_no_vector_are_refused(both):
    lens, _ = both
    broken = dict(lens.gradients.items())
    site = next(s for s in broken if (s.matrix, s.layer) == ("W_out", 1))
    part = broken[site]
    other = torch.flip(part.delta, [1]) * 3
    broken[site] = type(part)(part.x, other, part.prompt, part.pos)
    grads = type(lens.gradients)(
        lens.gradients.losses, lens.gradients.next_logits, lens.gradients.batch, broken
    )
    with pytest.raises(NotImplementedError, match="point different ways"):
        replace(lens, gradients=grads).norms("W_out")
