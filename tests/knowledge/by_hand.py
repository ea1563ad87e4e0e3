"""Slow and obvious: what a feed-forward part, or one row of it, gives the logit of a token.

On an unbridged Hugging Face model: its weights are set to zero and the block is run again; what is
missing behind the block is what they gave. The final norm's scale is held by giving it vectors of
the length of the last stream.
"""

from contextlib import contextmanager

import torch

from tests import oracle

_NORMS = (
    "post_feedforward_layernorm", "post_mlp_layernorm", "post_feedforward_norm",
)  # fmt: skip
"""Names of the norm behind the feed-forward part, where there is one."""


class ByHand:
    """A Hugging Face model, a prompt and a token."""

    def __init__(self, hf, tokens, target):
        self.hf, self.tokens, self.target = hf.requires_grad_(False), tokens, target
        self.blocks = oracle.layers(hf)
        for config in (hf.config, oracle.config_of(hf)):
            config._experts_implementation = "eager"
        config = oracle.config_of(hf)
        self.cap = getattr(config, "final_logit_softcapping", None) or getattr(
            config, "logits_soft_cap", None
        )
        self.outs = [self.out(layer) for layer in range(len(self.blocks))]
        self.stream = self.outs[-1]
        ones = torch.ones_like(self.stream)
        self.centred = bool(
            (self._score(self.stream + ones) - self._score(self.stream)).abs() < 1e-5
        )
        self.zero = self._score(0 * self.stream)

    def out(self, layer):
        """What leaves a block at the last position."""
        seen = []
        handle = self.blocks[layer].register_forward_hook(lambda m, a, o: seen.append(_first(o)))
        self.hf(self.tokens, use_cache=False)
        handle.remove()
        return seen[0].reshape(-1, seen[0].shape[-1])[-1].clone()

    def _score(self, stream):
        """The token's logit above the mean of all, before the cap, with another last stream."""

        def hook(module, args, output):
            new = _first(output).clone()
            new.reshape(-1, new.shape[-1])[-1] = stream
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = self.blocks[-1].register_forward_hook(hook)
        logits = self.hf(self.tokens, use_cache=False).logits[0, -1]
        handle.remove()
        if self.cap:
            logits = self.cap * (logits / self.cap).atanh()
        return logits[self.target] - logits.mean()

    def score(self):
        return self._score(self.stream)

    def share(self, vector):
        """What a vector in the last stream gives."""
        c = self._length(self.stream) / self._length(vector)
        return (self._score(c * vector) - self.zero) / c

    def _length(self, v):
        return (v - v.mean() if self.centred else v).norm()

    def given(self, layer, row=None, expert=None, what=("weight", "bias")):
        """What all of W_out (or one row of it) gives, by what is missing without it."""
        with self.without(layer, row, expert, what):
            less = self.out(layer)
        return self.share(self.outs[layer] - less)

    def normed(self, layer):
        """Whether the product passes a norm before it enters the stream."""
        return any(hasattr(self.blocks[layer], name) for name in _NORMS)

    def given_by_row(self, neuron):
        """What one row gives; behind a norm, with its scale held: that of the whole product."""
        layer, row, expert = neuron
        if not self.normed(layer):
            return self.given(layer, row, expert, ("weight",))
        with self.without(layer, row, expert, ("weight",)):
            part = self._product(layer)
        part = self._product(layer) - part
        norm = next(
            getattr(self.blocks[layer], n) for n in _NORMS if hasattr(self.blocks[layer], n)
        )
        product = self._product(layer)
        scale = product.norm() / part.norm()
        return self.share(norm(scale * part) / scale)

    def _product(self, layer):
        """What enters the norm behind the feed-forward part."""
        norm = next(
            getattr(self.blocks[layer], n) for n in _NORMS if hasattr(self.blocks[layer], n)
        )
        seen = []
        handle = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        self.hf(self.tokens, use_cache=False)
        handle.remove()
        return seen[0].reshape(-1, seen[0].shape[-1])[-1].clone()

    @contextmanager
    def without(self, layer, row=None, expert=None, what=("weight", "bias")):
        held = []
        for tensor in self._parameters(layer, row, expert, what):
            held.append((tensor, tensor.clone()))
            tensor.zero_()
        try:
            yield
        finally:
            for tensor, before in held:
                tensor.copy_(before)

    def _parameters(self, layer, row, expert, what):
        block = self.blocks[layer]
        plain = oracle._module(block, oracle._LINEAR["W_out"])
        mlp = oracle._module(block, ("mlp", "shared_mlp"))
        plain = plain or oracle._module(mlp, ("output_linear",)) if mlp is not None else plain
        shared = oracle._module(block, oracle._SHARED)
        shared = None if shared is None else oracle._module(shared, ("down_proj", "output_linear"))
        experts = oracle._module(block, oracle._EXPERTS)
        modules = [] if isinstance(expert, int) else [plain if shared is None else shared]
        for module in modules:
            for name in what if module is not None else ():
                tensor = getattr(module, name, None)
                if tensor is None:
                    continue
                if row is not None and name == "weight":
                    tensor = tensor[row] if type(module).__name__ == "Conv1D" else tensor[:, row]
                yield tensor
        if experts is not None and expert != "shared" and hasattr(experts, "down_proj"):
            stack = experts.down_proj
            stack = stack if expert is None else stack[expert]
            yield stack if row is None else stack[:, row]


def _first(output):
    return output[0] if isinstance(output, tuple) else output
