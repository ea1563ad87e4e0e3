"""Slow and obvious: the dense gradient of each matrix from an unbridged Hugging Face model.

`loss.backward()` on the Hugging Face model fills `.grad`; each matrix is then cut out of the
parameter that holds it and turned to [d_in, d_out].
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

_LINEAR = {
    "W_in": ("mlp.up_proj", "mlp.c_fc", "mlp.dense_h_to_4h", "mlp.fc_in", "fc1"),
    "W_gate": ("mlp.gate_proj",),
    "W_out": (
        "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "fc2",
    ),
    "W_Q": ("self_attn.q_proj", "attn.q_proj"),
    "W_K": ("self_attn.k_proj", "attn.k_proj"),
    "W_V": ("self_attn.v_proj", "attn.v_proj"),
    "W_O": (
        "self_attn.o_proj", "attn.c_proj", "attention.dense", "self_attention.dense",
        "attn.out_proj", "self_attn.out_proj",
    ),
}  # fmt: skip


def layers(hf):
    return next(
        getattr(*path)
        for path in (
            (getattr(hf, "transformer", None), "h"),
            (getattr(hf, "gpt_neox", None), "layers"),
            (getattr(getattr(hf, "model", None), "decoder", None), "layers"),
            (getattr(hf, "model", None), "layers"),
        )
        if hasattr(*path)
    )


def dense(hf, matrix, layer, expert=None):
    """dL/dW [d_in, d_out] of one matrix, out of the parameters' `.grad`."""
    block = layers(hf)[layer]
    if expert is not None:
        gate_up = block.mlp.experts.gate_up_proj.grad[expert].T
        half = gate_up.shape[1] // 2
        if matrix == "W_out":
            return block.mlp.experts.down_proj.grad[expert].T
        return gate_up[:, :half] if matrix == "W_gate" else gate_up[:, half:]
    for path in _LINEAR[matrix]:
        try:
            module = block.get_submodule(path)
        except AttributeError:
            continue
        return module.weight.grad if type(module).__name__ == "Conv1D" else module.weight.grad.T
    return _fused(hf.config, block, matrix)


def _fused(config, block, matrix):
    d_model, n_heads = config.hidden_size, config.num_attention_heads
    if hasattr(block, "attn"):  # GPT-2: q, k, v side by side
        index = ("W_Q", "W_K", "W_V").index(matrix)
        return block.attn.c_attn.weight.grad[:, index * d_model : (index + 1) * d_model]
    for name in ("attention", "self_attention"):
        if not hasattr(block, name):
            continue
        # GPT-NeoX, BLOOM: q, k, v within each head
        grad = getattr(block, name).query_key_value.weight.grad.T
        index = ("W_Q", "W_K", "W_V").index(matrix)
        return grad.reshape(d_model, n_heads, 3, -1)[:, :, index].reshape(d_model, d_model)
    if matrix in ("W_in", "W_gate"):  # Phi-3
        gate, up = block.mlp.gate_up_proj.weight.grad.T.chunk(2, dim=1)
        return gate if matrix == "W_gate" else up
    d_head = d_model // n_heads
    widths = [n_heads * d_head] + [config.num_key_value_heads * d_head] * 2
    parts = block.self_attn.qkv_proj.weight.grad.T.split(widths, dim=1)
    return parts[("W_Q", "W_K", "W_V").index(matrix)]


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
    hf.config._experts_implementation = "eager"  # the batched kernels know no float64
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    derives_positions = hf.config.model_type in ("opt", "bloom")
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
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)
