"""A pass leaves the model as it was found, and sees the tensors that really pass."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import bwlens
from bwlens.model.passes import run
from bwlens.model.sites import Point, available_matrices
from tests import oracle, tiny

TOKENS = torch.tensor([[5, 9, 30, 41], [7, 8, 13, 12]])
KINDS = ["gpt2", "gpt2 processed", "llama", "mixtral"]
KINDS += ["hooked gpt2", "hooked mixtral"] if tiny.HAS_HOOKED_TRANSFORMER else []


# The model is left as it was found.


@pytest.fixture
def lively(tokenizer):
    """A model in training mode with dropout, part frozen, with gradients and hooks of its own."""

    def make(kind):
        name = kind.replace(" processed", "").replace("hooked ", "")
        hf = tiny.hf_model(name)
        for module in hf.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        if "hooked" in kind:
            model = tiny.hooked_transformer(name, tokenizer=tokenizer, hf=hf)
        else:
            model = tiny.bridge(name, tokenizer, compatibility="processed" in kind, hf=hf)
        model.train()
        model.blocks[1].eval()
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 3 != 0)
            if index % 2:
                parameter.grad = torch.full_like(parameter, 0.25)
        fired = []
        point = model.blocks[1].hook_resid_post
        point.add_hook(lambda tensor, hook: fired.append("forward"))
        point.add_hook(lambda tensor, hook: fired.append("backward"), dir="bwd")
        model.blocks[0].register_forward_hook(lambda *_: fired.append("plain"))
        model.blocks[2].mlp.register_forward_pre_hook(lambda *_: fired.append("before"))
        model(TOKENS)
        fired.clear()
        return model, fired

    return make


def modules_of(model):
    wrapped = getattr(model, "original_model", None)
    return dict.fromkeys([*model.modules(), *(wrapped.modules() if wrapped is not None else ())])


def snapshot(model):
    """All that a pass could change."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    found = {
        "random numbers": torch.get_rng_state(),
        "gradients on": torch.is_grad_enabled(),
        "cfg": repr(vars(model.cfg)),
        "config": None if config is None else repr(sorted(vars(config).items(), key=str)),
    }
    for name, parameter in model.named_parameters():
        found[f"{name}, weight"] = parameter.detach().clone()
        found[f"{name}, grad"] = None if parameter.grad is None else parameter.grad.clone()
        found[f"{name}, its identity"] = id(parameter), id(parameter.grad)
        found[f"{name}, requires_grad"] = parameter.requires_grad
    for name, buffer in model.named_buffers():
        found[f"{name}, buffer"] = buffer.clone()
    for index, module in enumerate(modules_of(model)):
        where = f"{index} ({type(module).__name__})"
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str | type(None)):
                found[f"{where}, {key}"] = value
            elif "hooks" in key:
                found[f"{where}, {key}"] = list(value.items() if hasattr(value, "items") else value)
    return found


def assert_unchanged(model, before):
    after = snapshot(model)
    assert set(after) == set(before)
    for what, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), after[what].nan_to_num()), what
        else:
            assert after[what] == value, what


def raises(logits, batch):
    raise RuntimeError("the user's own")


def not_a_number(logits, batch):
    return logits.sum((1, 2)) * float("nan")


SWITCHED = ["hook_mlp_in", "hook_q_input", "attn.hook_result"]
ENTRIES = {
    "capture": lambda model, loss: bwlens.capture(model, TOKENS, loss, available_matrices(model)),
    "vjps": lambda model, loss: bwlens.vjps(
        model, TOKENS, loss, [f"blocks.1.{name}" for name in SWITCHED]
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_model_changes(kind, entry, lively):
    model, fired = lively(kind)
    torch.manual_seed(3)
    before = snapshot(model)
    ENTRIES[entry](model, 17)
    assert_unchanged(model, before)
    assert set(fired) == {"forward", "backward", "plain", "before"}
    for objective, error in ((raises, "the user's own"), (not_a_number, "loss of prompt 0 is nan")):
        with pytest.raises((RuntimeError, ValueError), match=error):
            ENTRIES[entry](model, objective)
        assert_unchanged(model, before)
    with torch.no_grad():
        ENTRIES[entry](model, 17)
        assert not torch.is_grad_enabled()
    assert_unchanged(model, before)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_poisoned_weight_is_named_by_its_loss(entry, lively):
    model, _ = lively("llama")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "down_proj" in n)[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"loss of prompt 0 is nan; .* Check the model's weights"):
        ENTRIES[entry](model, 17)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_gives_the_results_of_eval_mode(kind, lively):
    model, _ = lively(kind)
    matrices = available_matrices(model)
    training = bwlens.capture(model, TOKENS, 17, matrices)
    model.eval()
    evaluated = bwlens.capture(model, TOKENS, 17, matrices)
    assert torch.equal(training.losses, evaluated.losses)
    for site, gradient in evaluated.items():
        assert torch.equal(training[site].x, gradient.x)
        assert torch.equal(training[site].delta, gradient.delta)


def test_modules_keep_nothing_of_a_pass(boot):
    """Attention keeps its last pattern, with the whole graph behind it: what was there stays."""
    for name in ("gpt2", "bloom", "falcon", "gpt_bigcode"):
        model = boot(name)
        bwlens.capture(model, TOKENS, 17)
        copy.deepcopy(model)
    with torch.no_grad():
        model(TOKENS)
    kept = {m: m._pattern for m in model.modules() if getattr(m, "_pattern", None) is not None}
    assert kept
    ENTRIES["capture"](model, 17)
    bwlens.vjps(model, TOKENS, 17, "blocks.1.hook_resid_mid")
    assert all(module._pattern is pattern for module, pattern in kept.items())


def test_threads_take_turns(boot):
    """Each capture on one model sees its own pass, also where a hook captures within a pass."""
    model = boot("llama")
    texts = [torch.tensor([[5, 9, 30, 41]]), torch.tensor([[7, 8, 13]])]
    expected = [bwlens.capture(model, text, 17) for text in texts]
    model.blocks[0].register_forward_hook(lambda *_: time.sleep(0.001))  # let others in

    def capture(index):
        return bwlens.capture(model, texts[index % 2], 17)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(capture, range(24)))
        plain = pool.submit(lambda: [model(texts[0]) for _ in range(5)])
        found.append(capture(0))
        plain.result()
    for index, grads in enumerate(found):
        for site, gradient in expected[index % 2].items():
            assert torch.equal(grads[site].x, gradient.x)
            assert torch.equal(grads[site].delta, gradient.delta)
    assert not any(m._forward_hooks for m in model.blocks[1].mlp.modules())


def test_threads_share_the_modes_of_a_model(lively):
    """One thread's end must not bring dropout back into the pass of another."""
    model, _ = lively("gpt2")
    expected = bwlens.capture(model, TOKENS, 17)
    model.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.001))
    before = snapshot(model)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: bwlens.capture(model, TOKENS, 17), range(24)))
    for grads in found:
        assert torch.equal(grads["W_out", 2].x, expected["W_out", 2].x)
        assert torch.equal(grads["W_in", 0].delta, expected["W_in", 0].delta)
    assert_unchanged(model, before)


def test_a_capture_within_a_pass_of_its_own_thread(boot):
    model = boot("llama")
    inner = []

    def objective(logits, batch):
        inner.append(bwlens.capture(model, TOKENS, 17, layers=2))
        return bwlens.NLL(17)(logits, batch.__class__(**vars(batch) | {"targets": ((17,),) * 2}))

    outer = bwlens.capture(model, TOKENS, objective, layers=2)
    assert torch.equal(outer["W_in", 2].delta, inner[0]["W_in", 2].delta)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("part", ["mlp", "self_attn", "down_proj"])
def test_dynamically_quantised_models_are_refused(part, tokenizer):
    """Where only some weights are packed, the gradients of others would lack a part."""
    hf = tiny.hf_model("llama")
    names = {n for n, m in hf.named_modules() if isinstance(m, nn.Linear) and part in n}
    torch.ao.quantization.quantize_dynamic(hf, names, dtype=torch.qint8, inplace=True)
    model = tiny.bridge("llama", tokenizer, hf=hf)
    for entry in ENTRIES.values():
        with pytest.raises(
            NotImplementedError, match=r"is quantised: .*Linear computes with packed"
        ):
            entry(model, 17)


# What passes is what is seen.


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize(
    "name", ["mlp.hook_post", "mlp.hook_pre", "hook_resid_mid", "hook_mlp_out", "attn.hook_z"]
)
def test_hooks_that_edit_activations_are_respected(name, processed, boot):
    """The gradient is the one that `backward()` leaves in the weights of the edited model."""
    model = boot("gpt2", compatibility=processed)
    untouched = bwlens.capture(model, TOKENS, 17, ("W_out", "W_O"), 1)

    def edit(tensor, hook):
        return tensor * 0.8 + torch.linspace(-1, 1, tensor.shape[-1])

    model.hook_dict[f"blocks.1.{name}"].add_hook(edit)
    logits = model(TOKENS)
    (-logits[:, -1].log_softmax(-1)[:, 17]).sum().backward()
    edited = bwlens.capture(model, TOKENS, 17, ("W_in", "W_out", "W_Q", "W_K", "W_V", "W_O"), 1)
    block = model.blocks[1]
    out = block.mlp.out.original_component.weight.grad
    assert oracle.relative_error(edited["W_out", 1].dense(), out) < 1e-5
    out = block.attn.o.original_component.weight.grad
    assert oracle.relative_error(edited["W_O", 1].dense(), out) < 1e-5
    matrix = "W_O" if name == "attn.hook_z" else "W_out"
    assert oracle.relative_error(edited[matrix, 1].dense(), untouched[matrix, 1].dense()) > 0.01


def test_an_edit_of_x_is_the_x(bridge, boot):
    """hook_post is what enters W_out: zeroed, it is zero; W_in's gradient is then zero, too."""
    model = boot("llama")
    model.hook_dict["blocks.1.mlp.hook_post"].add_hook(lambda tensor, hook: tensor * 0)
    grads = bwlens.capture(model, TOKENS, 17)
    assert not grads["W_out", 1].x.any()
    assert grads["W_out", 1].delta.any()
    assert not grads["W_in", 1].delta.any()
    assert grads["W_in", 2].delta.any()


@pytest.mark.parametrize("flag", ["use_attn_result", "use_split_qkv_input", "use_attn_in"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_flags_of_the_user_do_not_change_results(name, flag, boot, bridge):
    model, plain = boot(name), bridge(name)
    getattr(model, f"set_{flag}")(True)
    matrices = available_matrices(model)
    found, expected = (bwlens.capture(m, TOKENS, 17, matrices) for m in (model, plain))
    for site, gradient in expected.items():
        assert oracle.relative_error(found[site].dense(), gradient.dense()) < 1e-5, site


# The loss must be one.


def test_an_objective_may_not_read_padding(bridge):
    tokens = torch.tensor([[5, 9, 30, 41], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    def everywhere(logits, batch):
        return logits.square().mean((1, 2))

    def where_real(logits, batch):
        return (logits.square().mean(-1) * batch.mask).sum(1)

    model = bridge("gpt2")
    with pytest.raises(ValueError, match=r"W_in of layer 0: the objective reads .* batch\.mask"):
        bwlens.capture(model, tokens, everywhere, attention_mask=mask)
    assert len(bwlens.capture(model, tokens, where_real, attention_mask=mask)) == 6
    assert len(bwlens.capture(model, tokens, everywhere)) == 6


def bad_objectives():
    yield "shape ()", lambda logits, batch: logits.mean(), r"shape \(\); expected one loss per pr"
    yield "per token", lambda logits, batch: logits.mean(-1), r"shape \(2, 4\); .* shape \(2,\)"
    yield "no tensor", lambda logits, batch: 1.5, r"the objective returned 1\.5; expected one loss"
    yield "detached", lambda logits, batch: logits.detach().mean((1, 2)), r"without \.detach\(\)"
    yield "constant", lambda logits, batch: torch.ones(2), "is cut off from the model"
    yield "infinite", lambda logits, batch: logits.mean((1, 2)) / 0, "loss of prompt 0 is -?inf"


@pytest.mark.parametrize(
    ("objective", "error"), [pytest.param(*case[1:], id=case[0]) for case in bad_objectives()]
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_malformed_loss_says_what_it_is(objective, error, entry, boot, unchecked):
    model = boot("gpt2")
    model(TOKENS)
    before = snapshot(model)
    with pytest.raises(ValueError, match=error):
        ENTRIES[entry](model, objective)
    assert_unchanged(model, before)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_loss_that_does_not_depend_on_a_layer(frozen, boot):
    """A hook cuts the graph above layer 1, whose gradient is then no zero, but none."""
    model = boot("gpt2")
    model.requires_grad_(not frozen)
    model.hook_dict["blocks.1.hook_resid_post"].add_hook(lambda tensor, hook: tensor.detach())
    with pytest.raises(
        ValueError, match=r"does not depend on W_in of layer 0|cut off from the model"
    ):
        bwlens.capture(model, TOKENS, 17)
    if not frozen:
        assert len(bwlens.capture(model, TOKENS, 17, layers=2)) == 2
        with pytest.raises(ValueError, match=r"does not depend on blocks\.0\.hook_resid_post"):
            bwlens.vjps(model, TOKENS, 17, "blocks.0.hook_resid_post")


def test_a_loss_that_reads_too_little(boot):
    """Logits of a model whose last block is cut off say nothing about that block."""
    model = boot("gpt2")
    kept = {}
    model.blocks[1].register_forward_hook(lambda m, a, out: kept.update(out=out))

    def early(logits, batch):
        out = kept["out"][0] if isinstance(kept["out"], tuple) else kept["out"]
        return out.square().sum((1, 2))

    assert len(bwlens.capture(model, TOKENS, early, layers=[0, 1])) == 4
    with pytest.raises(ValueError, match=r"depend on W_in of layer 2, so .* ask for other"):
        bwlens.capture(model, TOKENS, early)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_may_end_within_the_model(kind, lively):
    """The same numbers up to there, nothing above runs, and the model is left as it was."""
    model, _ = lively(kind)
    tokens = torch.tensor([[5, 6, 7, 8]])
    point = Point(model.blocks[1], "output")
    whole = run(model, tokens, points=[point])
    above = []
    handle = model.blocks[2].register_forward_hook(lambda *_: above.append(1))
    hooks = [len(part._forward_hooks) for part in model.modules()]
    part = run(model, tokens, points=[point], until=model.blocks[1])
    assert not above
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    handle.remove()
    torch.testing.assert_close(part.seen[point][0], whole.seen[point][0], rtol=0, atol=0)
    assert part.logits.shape[1] == 0
    torch.testing.assert_close(run(model, tokens).logits, whole.logits, rtol=0, atol=0)
