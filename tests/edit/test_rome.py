"""ROME stores v* under k*, as cheaply as can be for the text's keys, and leaves the model alone."""

import pytest
import torch

from bwlens import Edit, Site
from bwlens.edit._rome import rome
from bwlens.edit.counting import key_statistics
from bwlens.edit.keys import contexts_of, keys_of
from bwlens.edit.value import ValueSearch, ValueSettings, prefixes_of
from bwlens.model.prompts import make_batch
from bwlens.model.weights import weight_of
from tests import oracle, tiny

EDIT = Edit("{} t9 t30 t41", subject="t5 t6", target_new=" t17")
PREFIXES = ("t20 t21", "t50 t40 t8 t11")
TEXTS = [" ".join(f"t{4 + (7 * i + 3 * j * j) % 57}" for j in range(40)) for i in range(12)]
W_OUT = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj"}


def search(settings, prefixes, prepend_bos=None):
    return ValueSearch(settings, prefixes, "subject", prepend_bos)


def statistics(model):
    return key_statistics(model, TEXTS, cache=False)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "olmo2", "opt", "phi3"])
def test_the_constraint_holds(name, boot):
    model, site = boot(name), Site("W_out", 1)
    held, before = statistics(model), state(model)
    change = rome(model, EDIT, layer=1, steps=5, prefixes=PREFIXES, statistics=held)
    assert list(change) == [site]
    assert change[site].n == 1
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    contexts = contexts_of(model, [EDIT], PREFIXES, "subject", None)
    key = contexts.at(keys_of(model, contexts.batch, ["W_out"], 1)[site])[0].mean(0)
    settings = ValueSettings(steps=5)
    value = search(settings, PREFIXES).values(model, [EDIT], site)[0]
    torch.testing.assert_close(value.key, key)
    weight = weight_of(model, site)
    target = key @ weight.read() + value.delta
    with change.applied(model):
        torch.testing.assert_close(key @ weight.read(), target, rtol=1e-4, atol=1e-4)
    assert value.losses == change.details["losses"][0]


@pytest.mark.parametrize("keys", ["mean", "plain", "mixed"])
def test_which_key_reaches_the_value(keys, boot):
    model, site = boot("llama"), Site("W_out", 1)
    held = statistics(model)
    change = rome(model, EDIT, layer=1, steps=3, prefixes=PREFIXES, statistics=held, keys=keys)
    (value,) = search(ValueSettings(steps=3), PREFIXES).values(model, [EDIT], site)
    mean, plain = value.key, value.plain_key
    contexts = contexts_of(model, [EDIT], (), "subject", None)
    alone = contexts.at(keys_of(model, contexts.batch, ["W_out"], 1)[site])[0, 0]
    torch.testing.assert_close(plain, alone)
    assert not torch.allclose(mean, plain, rtol=1e-2)
    reached = {"mean": mean, "plain": plain, "mixed": plain}[keys]
    torch.testing.assert_close(reached @ change[site].dense(), value.delta, rtol=1e-4, atol=1e-5)
    whitened = {"mean": mean, "plain": plain, "mixed": mean}[keys].double()
    u = change[site].x[0].double() @ held[site].second_moment
    cosine = torch.nn.functional.cosine_similarity(u, whitened, dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)


def test_smallest_of_all_solutions(boot):
    """Against constrained least squares, min tr(D^T C D) with k D = r, from its KKT system."""
    model, site = boot("gpt2"), Site("W_out", 1)
    held = statistics(model)
    change = rome(model, EDIT, layer=1, steps=3, prefixes=(), statistics=held)
    value = search(ValueSettings(steps=3), ()).values(model, [EDIT], site)[0]
    moment, key = held[site].second_moment, value.key.double()
    n = len(key)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n], system[:n, n], system[n, :n] = moment, key, key
    right = torch.zeros(n + 1, value.delta.numel(), dtype=torch.float64)
    right[n] = value.delta.double()
    best = torch.linalg.solve(system, right)[:n]
    torch.testing.assert_close(change[site].dense().double(), best, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", sorted(W_OUT))
def test_the_value_against_adam_by_hand(name, boot):
    """The same loss, written out on an unbridged copy, one prompt at a time."""
    model, hf = boot(name), tiny.hf_model(name).requires_grad_(False)
    settings = ValueSettings(steps=4, clamp=0.4)
    value = search(settings, PREFIXES, False).values(model, [EDIT], Site("W_out", 1))[0]
    texts = ["t5 t6 t9 t30 t41", *(f"{p} t5 t6 t9 t30 t41" for p in PREFIXES)]
    rows = [[int(word[1:]) for word in text.split()] for text in texts]
    positions = [1, 3, 5, 1]
    rows.append(make_batch(model, "t5 t6 is a", prepend_bos=False).tokens[0].tolist())
    delta = torch.zeros(16, requires_grad=True)
    at, sizes = [0], []

    def hook(module, args, out):
        sizes.append(out[0, at[0]].detach().norm())
        out = out.clone()
        out[0, at[0]] += delta
        return out

    oracle.layers(hf)[1].get_submodule(W_OUT[name]).register_forward_hook(hook)
    adam, original, losses = torch.optim.Adam([delta], lr=0.5), None, []
    for step in range(5):
        ends = []
        for row, position in zip(rows, positions, strict=True):
            at[0] = position
            ends.append(hf(torch.tensor([row])).logits[0, -1].log_softmax(-1))
        original = ends[-1].detach() if original is None else original
        nll = -sum(end[17] for end in ends[:3]) / 3
        kl = (ends[-1].exp() * (ends[-1] - original)).sum()
        loss = nll + 0.0625 * kl + 0.5 * delta.norm() / sizes[0] ** 2
        losses.append(float(loss.detach()))
        if step == 4:
            break
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        adam.step()
        with torch.no_grad():
            delta *= min(1.0, float(0.4 * sizes[0] / delta.norm()))
    assert value.losses == pytest.approx(losses, rel=1e-3)
    torch.testing.assert_close(value.delta, delta.detach(), rtol=1e-3, atol=1e-3)


def test_the_divergence_is_the_new_models_from_the_original(demo):
    """KL(new || original), where it is large enough for the other direction to be far off."""
    model, site = demo, Site("W_out", 2)
    edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
    # The first step is the same, as the divergence is flat at the start.
    with_it, without = (
        search(ValueSettings(1, 3.0, kl_factor, clamp=9.0), ()).values(model, [edit], site)[0]
        for kl_factor in (1.0, 0.0)
    )
    torch.testing.assert_close(with_it.delta, without.delta, rtol=1e-3, atol=1e-3)
    tokens = model.to_tokens("Lionel Messi is a", prepend_bos=False)
    last = model.to_tokens("Lionel Messi", prepend_bos=False).shape[1] - 1

    def shift(module, args, out):
        out = out.clone()
        out[0, last] += with_it.delta
        return out

    with torch.no_grad():
        original = model(tokens)[0, -1].log_softmax(-1)
        handle = model.blocks[2].mlp.out.register_forward_hook(shift)
        new = model(tokens)[0, -1].log_softmax(-1)
        handle.remove()
    right = float((new.exp() * (new - original)).sum())
    reverse = float((original.exp() * (original - new)).sum())
    assert right != pytest.approx(reverse, rel=0.1)
    assert with_it.losses[1] - without.losses[1] == pytest.approx(right, rel=1e-2)


def test_several_in_turn(boot):
    model = boot("gpt2")
    held, other = statistics(model), Edit("{} t8", subject="t7", target_new=" t23 t44")
    settings = {"layer": 1, "steps": 3, "prefixes": (), "statistics": held}
    both = rome(model, [EDIT, other], **settings)
    first = rome(model, EDIT, **settings)
    with first.applied(model):
        second = rome(model, other, **settings)
    expected = (first + second)["W_out", 1].dense()
    torch.testing.assert_close(both["W_out", 1].dense(), expected)


def test_prefixes_are_the_models_own_and_always_the_same(boot):
    model, again = boot("gpt2"), boot("gpt2")
    torch.manual_seed(1)
    found = prefixes_of(model, None)
    state_before = torch.get_rng_state()
    assert prefixes_of(again, None) == found
    assert torch.equal(torch.get_rng_state(), state_before)
    assert len(found) == 20
    assert prefixes_of(model, ["a"]) == ("a",)


def test_bad_input(boot):
    model = boot("gpt2")
    held = statistics(model)
    with pytest.raises(ValueError, match="at least one step"):
        rome(model, EDIT, layer=1, steps=0, statistics=held)
    with pytest.raises(ValueError, match="layer 9"):
        rome(model, EDIT, layer=9, statistics=held)
    with pytest.raises(ValueError, match="key statistics"):
        rome(model, EDIT, layer=1)
    with pytest.raises(NotImplementedError, match="mixture"):
        rome(boot("mixtral"), EDIT, layer=1, statistics=held)
    with pytest.raises(ValueError, match="lr=inf"):
        rome(model, EDIT, layer=1, lr=float("inf"), statistics=held)


def test_the_model_is_restored_after_an_exception(boot, monkeypatch):
    model = boot("gpt2")
    held, before = statistics(model), state(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    monkeypatch.setattr("bwlens.edit.aims.Aims.of_target", lambda self, words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rome(model, EDIT, layer=1, prefixes=(), statistics=held)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_flips_an_answer_of_the_demo_model(demo):
    edit = Edit("{} plays for", subject="Lionel Messi", target_new=" Paris")
    change = rome(demo, edit, layer=4, position="last", prefixes=())
    with change.applied(demo), torch.no_grad():
        answer = int(demo("Lionel Messi plays for")[0, -1].argmax())
    assert demo.tokenizer.decode([answer]) == " Paris"


def test_no_such_key(boot, unchecked):
    with pytest.raises(ValueError, match="keys must be 'mean', 'plain' or 'mixed', found 'first'"):
        rome(boot("gpt2"), EDIT, layer=1, keys="first")
