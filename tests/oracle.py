"""Slow and obvious: the dense gradient of each matrix from an unbridged Hugging Face model.

`loss.backward()` on the Hugging Face model fills `.grad`; each matrix is then cut out of the
parameter that holds it and turned to [d_in, d_out]. Where it lies is written down by hand here, and
shares nothing with bwlens' own search.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

_LINEAR = {
    "W_in": (
        "mlp.up_proj", "mlp.c_fc", "mlp.dense_h_to_4h", "mlp.fc_in", "mlp.fc1", "fc1",
        "ffn.up_proj", "feed_forward.up_proj", "feed_forward.w3", "mlp_block.up_proj",
        "mixer.up_proj", "mlp.Wi", "feed_forward.key",
    ),
    "W_gate": (
        "mlp.gate_proj", "feed_forward.gate_proj", "feed_forward.w1", "mlp_block.gate_proj",
    ),
    "W_out": (
        "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2", "fc2",
        "ffn.down_proj", "feed_forward.down_proj", "feed_forward.w2", "mlp_block.down_proj",
        "mixer.down_proj", "mlp.Wo", "feed_forward.value",
    ),
    "W_O": (
        "self_attn.o_proj", "attn.c_proj", "attention.dense", "self_attention.dense",
        "attn.out_proj", "self_attn.out_proj", "self_attn.dense", "attn.attention.out_proj",
        "attn.Wo", "mixer.o_proj", "temporal_block.o_proj",
        "shared_transformer.self_attn.o_proj",
    ),
} | {
    matrix: tuple(
        f"{part}.{letter}_proj"
        for part in (
            "self_attn", "attn", "attn.attention", "mixer", "temporal_block",
            "shared_transformer.self_attn",
        )
    )
    for matrix, letter in (("W_Q", "q"), ("W_K", "k"), ("W_V", "v"))
}  # fmt: skip
_EXPERTS = (
    "mlp.experts", "feed_forward.experts", "block_sparse_moe.experts", "mixer.experts", "experts",
)  # fmt: skip
_SHARED = (
    "mlp.shared_expert", "mlp.shared_experts", "feed_forward.shared_expert",
    "mixer.shared_experts", "shared_mlp",
)  # fmt: skip


def layers(hf):
    """The decoder's blocks."""
    for path in (
        "transformer.h", "transformer.blocks", "gpt_neox.layers", "model.decoder.layers",
        "rwkv.blocks", "model.layers", "model.language_model.layers", "model.text_model.layers",
    ):  # fmt: skip
        try:
            return hf.get_submodule(path)
        except AttributeError:
            continue
    raise LookupError(f"no blocks in {type(hf).__name__}")


def config_of(hf):
    return hf.config.get_text_config()


def _module(block, paths):
    for path in paths:
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    return None


def dense(hf, matrix, layer, expert=None):
    """dL/dW [d_in, d_out] of one matrix, out of the parameters' `.grad`; None if there is none."""
    config, block = config_of(hf), layers(hf)[layer]
    if isinstance(expert, int):
        return _of_an_expert(_module(block, _EXPERTS), matrix, expert)
    if expert == "shared":
        if _module(block, ("experts",)) is not None:  # Gemma 4's stand beside the MLP
            return _of_an_mlp(block.mlp, matrix)
        return _of_an_mlp(_module(block, _SHARED), matrix)
    module = _module(block, _LINEAR[matrix])
    if module is not None:
        grad = module.weight.grad
        grad = grad if type(module).__name__ == "Conv1D" else grad.T
        width = _gated_width(config)
        if matrix == "W_Q" and width is not None:  # in each head the query, then its gate
            return grad.reshape(len(grad), -1, 2, width)[:, :, 0].flatten(1)
        return grad
    if matrix in ("W_in", "W_gate", "W_out"):
        return _of_an_mlp(
            _module(block, ("mlp", "shared_mlp", "shared_transformer.feed_forward")), matrix
        )
    return _fused_attention(config, block, matrix)


def _gated_width(config):
    return config.head_dim if config.model_type.startswith(("qwen3_5", "qwen3_next")) else None


def _of_an_expert(experts, matrix, expert):
    if experts is None or not hasattr(experts, "down_proj"):
        return None
    if matrix == "W_out":
        return experts.down_proj.grad[expert].T
    if hasattr(experts, "up_proj"):
        return experts.up_proj.grad[expert].T if matrix == "W_in" else None
    gate, up = experts.gate_up_proj.grad[expert].T.chunk(2, dim=1)
    return gate if matrix == "W_gate" else up


def _of_an_mlp(mlp, matrix):
    """Gate, up and down, or gate and up in one."""
    if mlp is None:
        return None
    names = {
        "W_in": ("up_proj",),
        "W_gate": ("gate_proj",),
        "W_out": ("down_proj", "output_linear"),
    }
    own = _module(mlp, names[matrix])
    if own is not None:
        return own.weight.grad.T
    both = _module(mlp, ("gate_up_proj", "input_linear"))
    if both is None:
        return None
    gate, up = both.weight.grad.T.chunk(2, dim=1)
    return gate if matrix == "W_gate" else up


def _fused_attention(config, block, matrix):
    if matrix == "W_O" or not hasattr(config, "num_attention_heads"):  # RWKV has none
        return None
    index = ("W_Q", "W_K", "W_V").index(matrix)
    d_model, n_heads = config.hidden_size, config.num_attention_heads
    d_head = d_model // n_heads
    one_key_head = [d_model, d_head, d_head]
    module = _module(block, ("attn.c_attn",))
    if module is not None:  # GPT-2: side by side; BigCode: with one head of keys and values
        grad = module.weight.grad
        if type(module).__name__ == "Conv1D":
            return grad.chunk(3, dim=1)[index]
        return grad.T.split(one_key_head, dim=1)[index]
    module = _module(block, ("attn.Wqkv",))
    if module is not None:  # MPT: side by side
        return module.weight.grad.T.chunk(3, dim=1)[index]
    module = _module(block, ("attention.query_key_value", "self_attention.query_key_value"))
    if module is not None:
        grad = module.weight.grad.T
        if getattr(config, "multi_query", False):  # Falcon
            return grad.split(one_key_head, dim=1)[index]
        # GPT-NeoX, BLOOM, Falcon's first: q, k, v within each head
        return grad.reshape(d_model, n_heads, 3, -1)[:, :, index].reshape(d_model, d_model)
    module = _module(block, ("self_attn.qkv_proj",))
    if module is not None:  # Phi-3
        widths = [d_model] + [config.num_key_value_heads * d_head] * 2
        return module.weight.grad.T.split(widths, dim=1)[index]
    return None


def matrices(hf):
    """Every (matrix, layer, expert) whose gradient is there and not zero, after `backward`."""
    found = set()
    for layer, block in enumerate(layers(hf)):
        experts = _module(block, _EXPERTS)
        stack = getattr(experts, "down_proj", None)
        numbers = range(len(stack)) if stack is not None else ()
        shared = _of_an_mlp(_module(block, _SHARED), "W_out") is not None
        shared |= _module(block, ("experts",)) is not None
        for matrix in _LINEAR:
            who = [None]
            if matrix in ("W_in", "W_gate", "W_out") and experts is not None:
                who = [*numbers, *(["shared"] if shared else [])]
            for expert in who:
                grad = dense(hf, matrix, layer, expert)
                if grad is not None and grad.any():
                    found.add((matrix, layer, expert))
    return found


def folded(hf, matrix, layer):
    """Gain and bias that weight processing moved out of a matrix's input into the weights.

    Both are to be applied to the processed input to get the raw one.
    """
    block = layers(hf)[layer]
    before_attention = ("ln_1", "input_layernorm", "self_attn_layer_norm")
    before_mlp = (
        "pre_feedforward_layernorm",
        "final_layer_norm",
        "ln_2",
        "post_attention_layernorm",
    )
    if matrix == "W_out" or not any(hasattr(block, name) for name in before_attention):
        return 1.0, 0.0  # OLMo 2 has norms after its sublayers only
    if matrix == "W_O":
        return 1.0, _constant_value(hf.config, block, _first(block, before_attention))
    mlp = matrix in ("W_in", "W_gate")
    norm = _first(block, (*before_mlp, "ln_1") if mlp else before_attention)
    gain = norm.weight.detach() + (1.0 if "Gemma" in type(norm).__name__ else 0.0)
    bias = getattr(norm, "bias", None)
    return gain, 0.0 if bias is None else bias.detach()


def _first(block, names):
    return next(getattr(block, name) for name in names if hasattr(block, name))


def _constant_value(config, block, norm):
    """The values that a norm's bias and b_V make, for each head [n_heads * d_head].

    They are the same at every position, and attention weights sum to 1, so they pass unchanged.
    """
    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        constant = torch.zeros_like(norm.weight) if bias is None else bias
        if hasattr(block, "attention"):
            qkv = block.attention.query_key_value(constant)
            return qkv.reshape(config.num_attention_heads, 3, -1)[:, 2].flatten()
        attention = block.attn if hasattr(block, "attn") else block.self_attn
        if hasattr(attention, "c_attn"):
            return attention.c_attn(constant[None])[0].chunk(3)[2]
        if not hasattr(attention, "v_proj"):
            return 0.0  # Phi-3: no biases at all
        value = attention.v_proj(constant)
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    per_head = value.reshape(groups, -1)
    return per_head.repeat_interleave(config.num_attention_heads // groups, 0).flatten()


def backward(hf, tokens, attention_mask, loss):
    """Fill `.grad` from the summed losses; positions count the real tokens only."""
    hf.zero_grad()
    for config in (hf.config, config_of(hf)):
        config._experts_implementation = "eager"  # the batched kernels know no float64
    padded_left = not attention_mask[:, 0].all()
    derives_positions = hf.config.model_type in ("opt", "bloom") or not padded_left
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if derives_positions else {"position_ids": positions}
    logits = hf(tokens, attention_mask=attention_mask, use_cache=False, **extra).logits
    losses = loss(logits)
    losses.sum().backward()
    return losses.detach()


def relative_error(found, expected):
    scale = torch.linalg.norm(expected.double())
    return float(torch.linalg.norm(found.double() - expected.double()) / scale.clamp(min=1e-30))


class TrueFloat64(TorchFunctionMode):
    """Models cast norms and softmaxes to float32, a float64 model's too; in here they stay float64.

    Without it a float64 model computes to float32's precision, and a copy that casts elsewhere
    differs by as much.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        for given in args:
            if given is torch.float32:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if not kwargs:
            return func(*args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)
