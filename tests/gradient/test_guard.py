"""Layers whose weight is not what autograd sees are refused before they are read, with figures."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import bwlens
from bwlens.checking import UntrueGradientError
from bwlens.model.sites import available_matrices
from bwlens.model.weights import weight_of
from tests import tiny

TOKENS = torch.tensor([[5, 9, 30, 41]])
MLP = ("gate_proj", "up_proj", "down_proj")


class Quantised(nn.Linear):
    """Rounds its weight to 8 bits in passing, as quantisation-aware training does."""

    def forward(self, input):
        step = self.weight.detach().abs().max() / 127
        rounded = (self.weight / step).round() * step
        return nn.functional.linear(input, self.weight + (rounded - self.weight).detach())


class Rescaled(nn.Linear):
    def forward(self, input):
        return 31 * nn.functional.linear(input, self.weight)


class Ternary(nn.Linear):
    """BitNet's linear, without its compiled parts."""

    def forward(self, input):
        scale = 1 / self.weight.detach().abs().mean()
        rounded = (self.weight * scale).round().clamp(-1, 1) / scale
        steps = 127 / input.detach().abs().amax(-1, keepdim=True)
        x = input + ((input * steps).round() / steps - input).detach()
        return nn.functional.linear(x, self.weight + (rounded - self.weight).detach())


class Packed(nn.Module):
    """Bytes and a scale: linear in what enters, but no weight that could be read."""

    def __init__(self, linear, rounds=False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale, self.rounds = float(linear.weight.detach().abs().max()) / 127, rounds
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input):
        if self.rounds:
            steps = 127 / input.detach().abs().amax(-1, keepdim=True)
            input = input + ((input * steps).round() / steps - input).detach()
        return nn.functional.linear(input, self.weight.to(input) * self.scale)


class Adapted(nn.Module):
    """An adapter as PEFT lays it over a layer."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.low, self.high = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)

    def forward(self, input):
        return self.base_layer(input) + self.high(self.low(input))


def kept(kind):
    """The same weights in a layer of another kind."""

    def make(linear):
        new = kind(linear.in_features, linear.out_features, bias=False)
        new.load_state_dict(linear.state_dict())
        return new

    return make


def swapped(tokenizer, make, which=MLP):
    hf = tiny.hf_model("llama")
    for name, module in list(hf.named_modules()):
        if name.rpartition(".")[2] in which:
            hf.set_submodule(name, make(module))
    return tiny.bridge("llama", tokenizer, hf=hf.eval())


@pytest.mark.parametrize("kind", [Quantised, Rescaled, Ternary])
def test_layers_that_compute_with_another_weight(kind, tokenizer):
    model = swapped(tokenizer, kept(kind))
    for _ in range(2):  # a refusal is no pass
        with pytest.raises(UntrueGradientError, match=rf"{kind.__name__} is not x times.* off by"):
            bwlens.capture(model, TOKENS, 17)
    with pytest.raises(NotImplementedError, match="is not x times its weight"):
        bwlens.backward_lens(model, TOKENS[0], 17)
    assert len(bwlens.capture(model, TOKENS, 17, ("W_O",))) == tiny.LAYERS


def test_bitnet_linears_of_transformers(tokenizer):
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    model = swapped(
        tokenizer, kept(lambda *a, **k: bitnet.AutoBitLinear(*a, online_quant=True, **k))
    )
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(UntrueGradientError, match="AutoBit"),
    ):
        bwlens.capture(model, TOKENS, 17)


def test_packed_weights_are_read_where_the_layer_is_linear(tokenizer):
    model = swapped(tokenizer, Packed)
    grads = bwlens.capture(model, TOKENS, 17)
    effective = model.blocks[1].mlp.out.original_component
    dense = nn.Parameter(effective.weight.float() * effective.scale)
    effective.forward = lambda x: nn.functional.linear(x, dense)
    loss = -model(TOKENS)[0, -1].log_softmax(-1)[17]
    expected = torch.autograd.grad(loss, dense)[0].T
    torch.testing.assert_close(grads["W_out", 1].dense(), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"Packed is neither|quantised"):
        weight_of(model, bwlens.Site("W_out", 1))


def test_packed_weights_that_round_what_enters(tokenizer):
    model = swapped(tokenizer, lambda linear: Packed(linear, rounds=True))
    with pytest.raises(UntrueGradientError, match=r"Packed keeps its weight packed and is not lin"):
        bwlens.capture(model, TOKENS, 17)


def test_layers_quantised_for_inference(tokenizer):
    model = swapped(tokenizer, lambda linear: _dynamic(linear))
    with pytest.raises(NotImplementedError, match=r"packed|off the autograd graph"):
        bwlens.capture(model, TOKENS, 17)


def _dynamic(linear):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        box = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})
    return box[0]


def test_adapters_are_to_be_merged_first(tokenizer):
    model = swapped(tokenizer, Adapted)
    with pytest.raises(UntrueGradientError, match=r"merge_and_unload\(\)"):
        bwlens.capture(model, TOKENS, 17)


class Backwards(torch.autograd.Function):
    """The identity, with a gradient that is not its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return -2 * grads[0]


class Lying(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(Backwards.apply(input), self.weight)


def test_a_gradient_that_is_no_derivative(tokenizer):
    """Every z is x W, but what autograd says above it is not what the loss does."""
    model = swapped(tokenizer, kept(Lying), ("down_proj",))
    with pytest.raises(UntrueGradientError, match=r"step along -delta at W_in of layer 0 changes"):
        bwlens.capture(model, TOKENS, 17)
    with bwlens.checking.trusted():
        assert len(bwlens.capture(model, TOKENS, 17)) == 2 * tiny.LAYERS


@pytest.mark.parametrize("compatibility", [False, True], ids=["raw", "compatible"])
@pytest.mark.parametrize("name", [*tiny.CONFIGS, "granite", "qwen2_moe", "deepseek_v3", "bloom"])
def test_no_true_model_is_refused(name, compatibility, boot):
    model = boot(name, compatibility=compatibility)
    assert len(bwlens.capture(model, TOKENS, 17, available_matrices(model))) >= 4 * tiny.LAYERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma2", "mixtral"])
def test_nor_one_in_half_precision(name, dtype, boot):
    assert bwlens.capture(boot(name, dtype), TOKENS, 17)


def test_a_model_is_asked_once_and_again_where_a_layer_is_another(tokenizer):
    model = tiny.bridge("llama", tokenizer)
    passes, first = [], model.blocks[0].mlp.out.original_component

    def counted(x):
        passes.append(1)
        return nn.functional.linear(x, first.weight)

    first.forward = counted

    def captured():
        passes.clear()
        bwlens.capture(model, TOKENS, 17)
        return len(passes)

    assert captured() > 1
    assert captured() == 1
    linear = model.blocks[2].mlp.out.original_component
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight)
    with pytest.raises(UntrueGradientError, match="W_out of layer 2"):
        captured()


def test_hooks_of_the_user_do_not_run_in_the_probe(boot):
    model, seen = boot("llama"), []
    model.blocks[1].hook_resid_post.add_hook(lambda value, hook: seen.append(value.shape[1]))
    model.blocks[2].register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    bwlens.capture(model, torch.tensor([[5, 9, 30, 41, 7, 8, 10]]), 17)
    assert seen == [7, 7]


def test_pruned_layers_are_read(boot):
    """Pruning computes the weight in a hook, which is the layer's own."""
    model = boot("llama")
    linear = model.blocks[1].mlp.out.original_component
    prune.random_unstructured(linear, "weight", 0.3)
    grads = bwlens.capture(model, TOKENS, 17)
    loss = -model(TOKENS)[0, -1].log_softmax(-1)[17]
    expected = torch.autograd.grad(loss, linear.weight)[0].T
    torch.testing.assert_close(grads["W_out", 1].dense(), expected, rtol=1e-4, atol=1e-6)
