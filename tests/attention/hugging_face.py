"""R from an unbridged Hugging Face model: the gradient of the patterns that it gives out itself.

dL/dS = A * (dA - rowsum(A * dA)), the softmax's Jacobian; R = dL/dS * scale, the scale written down
here by hand. Soft caps are left out: those of the tiny models are far above their scores.
"""

from __future__ import annotations

import torch

from tests import oracle

WIDTHS = {
    "ernie4_5": 128, "ministral3": 128, "vaultgemma": 256, "deepseek_v4": 512,
    **dict.fromkeys(
        (
            "youtu", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "glm4_moe_lite",
            "glm_moe_dsa",
        ),
        8,
    ),
    **dict.fromkeys(
        (
            "gpt_neo", "gemma4", "gemma4_moe", "granite_moe", "granite_moe_hybrid",
            "granite_moe_hybrid_dense",
        ),
        1,
    ),
}  # fmt: skip
"""1 / scale^2 where it is not 4, the width of a head."""


def reversed_attention(hf, name, tokens, mask, loss):
    """R and A of every layer that has a pattern [batch, head, query, key]."""
    hf.zero_grad()
    for config in (hf.config, oracle.config_of(hf)):
        config._experts_implementation = "eager"
    padded_left = not mask[:, 0].all()
    derives = hf.config.model_type in ("opt", "bloom") or not padded_left
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if derives else {"position_ids": positions}
    out = hf(tokens, attention_mask=mask, use_cache=False, output_attentions=True, **extra)
    patterns = [a for a in out.attentions if a is not None]
    gradients = torch.autograd.grad(loss(out.logits).sum(), patterns)
    scale = WIDTHS.get(name, 4) ** -0.5
    return [
        (scale * jacobian(a, da), a.detach()) for a, da in zip(patterns, gradients, strict=True)
    ]


def jacobian(pattern, gradient):
    return pattern.detach() * (gradient - (pattern.detach() * gradient).sum(-1, keepdim=True))
