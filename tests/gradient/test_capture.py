"""x^T delta is an unbridged Hugging Face model's gradient, for each architecture and matrix."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import bwlens
from bwlens.model.sites import available_matrices
from tests import cases, oracle, tiny

TOKENS = torch.tensor([[5, 9, 30, 41], [7, 8, 3, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_matrix_against_hugging_face(name, dtype, boot):
    model, hf = boot(name, dtype), tiny.hf_model(name, dtype)
    with oracle.TrueFloat64() if dtype is torch.float64 else nullcontext():
        cases.check_every_matrix(model, hf, cases.TOLERANCE[dtype])


def test_trained_model_on_a_real_prompt(stories):
    """Llama with grouped queries, trained, on text; its target has three tokens."""
    prompt, target = "Once upon a time, there was a little girl named", " Lucy"
    hf = stories.hugging_face()
    ids, answer = stories.ids(prompt), stories.ids(prompt + target)
    assert answer[: len(ids)] == ids
    tokens, mask, loss = cases.teacher_forced_nll("right", [ids], [answer[len(ids) :]])
    oracle.backward(hf, tokens, mask, loss)
    grads = bwlens.capture(stories.bridge, prompt, target, bwlens.MATRICES)
    assert grads.batch.targets == (tuple(answer[len(ids) :]),)
    assert len(grads) == 7 * 5
    for site, gradient in grads.items():
        expected = oracle.dense(hf, site.matrix, site.layer)
        assert oracle.relative_error(gradient.dense(), expected) <= 1e-5


# Whether or not gradients are on.


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_frozen_parameters(name, boot):
    model = boot(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    cases.check_every_matrix(model, tiny.hf_model(name), 1e-5, sides=("right",))


def test_under_no_grad(bridge):
    model = bridge("gpt2")
    outside = bwlens.capture(model, TOKENS, 17)
    with torch.no_grad():
        inside = bwlens.capture(model, TOKENS, 17)
        assert not torch.is_grad_enabled()
    same(inside, outside)


def test_inference_mode_is_refused(bridge):
    model = bridge("gpt2")  # shared, and not to be made in this mode
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.no_grad.* is fine"):
        bwlens.capture(model, TOKENS, 17)


# Parts of a model.


def same(found, expected, tolerance=0.0):
    """Every site of one is in the other, with equal rows."""
    assert set(found) <= set(expected)
    largest = max(float(g.delta.norm()) for g in expected.values())
    for site, gradient in found.items():
        other = expected[site]
        assert torch.equal(gradient.pos, other.pos)
        assert float((gradient.x - other.x).norm()) <= tolerance * float(other.x.norm()), site
        error = float((gradient.delta - other.delta).norm())
        assert error <= tolerance * (float(other.delta.norm()) + largest), site


@pytest.mark.parametrize("layers", [[1], 1, [-1], [0, 2], range(1, 3), (-3,), [2, -1]])
def test_layers_are_the_full_run_s(layers, bridge):
    model = bridge("llama")
    some, full = bwlens.capture(model, TOKENS, 17, layers=layers), bwlens.capture(model, TOKENS, 17)
    named = [layers] if isinstance(layers, int) else layers
    assert sorted({site.layer for site in some}) == sorted({n % tiny.LAYERS for n in named})
    same(some, full, 1e-6)
    assert torch.equal(some.losses, full.losses)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_matrices_alone_are_the_full_run_s(name, bridge):
    model = bridge(name)
    matrices = available_matrices(model)
    full = bwlens.capture(model, TOKENS, 17, matrices)
    for matrix in matrices:
        alone = bwlens.capture(model, TOKENS, 17, [matrix])
        assert set(alone) == {site for site in full if site.matrix == matrix}
        same(alone, full, 1e-6)
    order = tuple(reversed(matrices))
    assert list(dict.fromkeys(s.matrix for s in bwlens.capture(model, TOKENS, 17, order))) == [
        *order
    ]


@pytest.mark.parametrize(("layers", "reached"), [([1], {1, 2}), ([2], {2}), (None, {0, 1, 2})])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_backward_pass_stops_at_the_lowest_layer(layers, reached, frozen, boot):
    """A gradient reaches what a block gives only if that lies above a matrix asked for."""
    model = boot("gpt2")
    model.requires_grad_(not frozen)
    seen = set()

    def watch(layer):
        def hook(module, args, output):
            tensor = output[0] if isinstance(output, tuple) else output
            tensor.register_hook(lambda grad: seen.add(layer))

        return hook

    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(watch(layer))
    with bwlens.checking.trusted():  # whose own passes would be seen as well
        bwlens.capture(model, TOKENS, 17, layers=layers)
    assert seen == reached


# Batches.


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_a_batch_is_its_prompts_one_by_one(name, bridge):
    model = bridge(name)
    matrices = available_matrices(model)
    token = st.integers(0, tiny.VOCAB - 1)
    pairs = st.tuples(
        st.lists(token, min_size=1, max_size=7), st.lists(token, min_size=1, max_size=3)
    )

    # Shrinking a failure would take minutes.
    phases = (Phase.explicit, Phase.generate)

    @settings(max_examples=10, deadline=None, derandomize=True, database=None, phases=phases)
    @given(st.lists(pairs, min_size=1, max_size=4), st.sampled_from(["left", "right"]))
    def check(drawn, side):
        prompts, targets = [p for p, _ in drawn], [t for _, t in drawn]
        tokens, mask = cases.padded(prompts, side)
        batch = bwlens.capture(model, tokens, bwlens.NLL(targets), matrices, attention_mask=mask)
        for index, (prompt, target) in enumerate(drawn):
            alone = bwlens.capture(model, torch.tensor(prompt), bwlens.NLL(target), matrices)
            part = batch.for_prompt(index)
            assert set(part) == set(alone)
            same(part, alone, 1e-5)
            assert all(gradient.prompts == [index] for gradient in part.values())
            torch.testing.assert_close(part.losses, alone.losses, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(part.next_logits, alone.next_logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(part.batch.tokens, alone.batch.tokens)
            assert part.batch.targets == alone.batch.targets

    check()


def test_texts_are_their_tokens(bridge):
    model = bridge("gpt2")
    texts, bos = ["t5 t9 t30", "t7 t8 t14 t12"], 1
    for first, prepend_bos in (([bos], True), ([bos], None), ([], False)):
        tokens, mask = cases.padded([[*first, 5, 9, 30], [*first, 7, 8, 14, 12]])
        a = bwlens.capture(model, texts, " t17", prepend_bos=prepend_bos)
        b = bwlens.capture(model, tokens, 17, attention_mask=mask)
        same(a, b)
        assert a.batch.targets == ((17,), (17,))


# What comes back.


def test_gradients_are_a_mapping(bridge):
    grads = bwlens.capture(bridge("gpt2"), TOKENS, 17)
    assert len(grads) == len(list(grads)) == 2 * tiny.LAYERS
    assert grads["W_in", 1] is grads[bwlens.Site("W_in", 1)]
    assert ("W_in", 1) in grads
    assert bwlens.Site("W_out", 2) in grads
    assert ("W_Q", 1) not in grads
    assert "W_in" not in grads
    assert [str(site) for site in grads][:2] == ["W_in of layer 0", "W_out of layer 0"]
    assert repr(grads) == "Gradients(W_in, W_out; layers 0-2; 2 prompts, 8 tokens)"
    assert grads["W_in", 0].prompt.tolist() == [0] * 4 + [1] * 4
    assert grads["W_in", 0].pos.tolist() == [0, 1, 2, 3] * 2
    for tensor in (grads.losses, grads.next_logits, grads["W_in", 0].x, grads["W_in", 0].delta):
        assert tensor.grad_fn is None
        assert not tensor.requires_grad


def test_what_was_not_captured_says_what_was(bridge):
    grads = bwlens.capture(bridge("gpt2"), TOKENS, 17, layers=[1])
    with pytest.raises(KeyError, match=r"W_in of layer 2 was not captured; .*layers \[1\]"):
        grads["W_in", 2]
    with pytest.raises(KeyError, match="W_Q of layer 1 was not captured; there are W_in, W_out"):
        grads["W_Q", 1]
    with pytest.raises(KeyError, match=r"write grads\['W_in', 3\]"):
        grads["W_in"]
    with pytest.raises(IndexError, match="prompt 2 asked for, but the batch has 2"):
        grads.for_prompt(2)
    assert grads.for_prompt(-1).batch.tokens.tolist() == [TOKENS[1].tolist()]


def test_an_expert_without_tokens_is_left_out(bridge):
    """One token goes to two of the four experts."""
    grads = bwlens.capture(bridge("mixtral"), torch.tensor([5]), 17, layers=0)
    used = sorted({site.expert for site in grads})
    assert len(used) == 2
    assert ("W_in", 0, used[0]) in grads
    unused = next(expert for expert in range(4) if expert not in used)
    with pytest.raises(KeyError, match=rf"expert {unused} was not captured; tokens were sent to"):
        grads["W_in", 0, unused]
    with pytest.raises(KeyError, match="name one of them"):
        grads["W_in", 0]


def test_next_logits_are_the_model_s_own(bridge):
    model = bridge("llama")
    prompts, mask = cases.padded(cases.PROMPTS, "left")
    grads = bwlens.capture(model, prompts, bwlens.NLL(cases.TARGETS), attention_mask=mask)
    with torch.no_grad():
        for row, prompt in zip(grads.next_logits, cases.PROMPTS, strict=True):
            torch.testing.assert_close(row, model(torch.tensor([prompt]))[0, -1])


# Precision and place.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_models(name, dtype, tolerance, boot):
    model, half = boot(name), boot(name, dtype)
    matrices = available_matrices(model)
    expected, found = (bwlens.capture(m, TOKENS, 17, matrices) for m in (model, half))
    for site, gradient in found.items():
        assert gradient.dtype is torch.float32
        assert oracle.relative_error(gradient.dense(), expected[site].dense()) < tolerance, site


def test_small_gradients_survive_float16(boot, monkeypatch):
    """A loss 2^16 times smaller has gradients as much smaller, not zeros, in float16."""
    model = boot("gpt2", torch.float16)
    nll = bwlens.NLL(17)

    class Small:
        target = 17

        def __call__(self, logits, batch):
            return nll(logits, batch) / 2**16

    def error():
        small, large = (bwlens.capture(model, TOKENS, loss) for loss in (Small(), nll))
        return max(oracle.relative_error(small[s].delta * 2**16, large[s].delta) for s in large)

    assert error() < 0.02
    monkeypatch.setattr("bwlens.model.losses._HALF_SCALE", {})
    assert error() > 0.1


def test_storage(bridge):
    model = bridge("gpt2")
    plain = bwlens.capture(model, TOKENS, 17)["W_in", 0]
    assert (plain.dtype, plain.device.type) == (torch.float32, "cpu")
    for dtype in (torch.bfloat16, torch.float64):
        stored = bwlens.capture(model, TOKENS, 17, device="cpu", dtype=dtype)["W_in", 0]
        assert (stored.dtype, stored.device.type) == (dtype, "cpu")
        assert torch.equal(stored.x, plain.x.to(dtype))
    away = bwlens.capture(model, TOKENS, 17, device="meta")["W_in", 0]
    assert {away.x.device.type, away.delta.device.type, away.pos.device.type} == {"meta"}
