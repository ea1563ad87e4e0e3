"""Tiny models whose road from the last block to the logits is out of the ordinary."""

from __future__ import annotations

from transformers import (
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    GlmConfig,
    GraniteConfig,
    MiniCPM3Config,
    MptConfig,
    NemotronConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhiConfig,
    RecurrentGemmaConfig,
    StableLmConfig,
)

from tests import tiny

_SMALL = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2}
_LLAMA = tiny._LLAMA | {"num_hidden_layers": 2}


def mpt(logit_scale):
    return MptConfig(
        vocab_size=tiny.VOCAB,
        d_model=16,
        n_layers=2,
        n_heads=4,
        max_seq_len=64,
        logit_scale=logit_scale,
        architectures=["MptForCausalLM"],
    )


def opt(**changes):
    settings = {
        "ffn_dim": 24,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 8,
        "do_layer_norm_before": False,
        "dropout": 0.0,
    }
    return OPTConfig(**_SMALL | settings | changes, architectures=["OPTForCausalLM"])


READABLE = {
    # name: config, scale, soft cap, centred
    "mpt": (lambda: mpt(0.5), 1.0, None, True),  # transformers' MPT ignores it
    "mpt_by_name": (lambda: mpt("inv_sqrt_d_model"), 1.0, None, True),
    "cohere": (
        lambda: CohereConfig(**_LLAMA, logit_scale=0.0625, architectures=["CohereForCausalLM"]),
        0.0625,
        None,
        True,
    ),
    "cohere2": (
        lambda: Cohere2Config(**_LLAMA, logit_scale=0.3, architectures=["Cohere2ForCausalLM"]),
        0.3,
        None,
        True,
    ),
    "granite": (
        lambda: GraniteConfig(**_LLAMA, logits_scaling=8.0, architectures=["GraniteForCausalLM"]),
        0.125,
        None,
        False,
    ),
    "minicpm3": (
        lambda: MiniCPM3Config(
            **_LLAMA | {"num_key_value_heads": 4},
            dim_model_base=4,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
            architectures=["MiniCPM3ForCausalLM"],
        ),
        0.25,
        None,
        False,
    ),
    "falcon_h1": (
        lambda: FalconH1Config(
            **_LLAMA,
            lm_head_multiplier=0.75,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            architectures=["FalconH1ForCausalLM"],
        ),
        0.75,
        None,
        False,
    ),
    "recurrent_gemma": (
        lambda: RecurrentGemmaConfig(
            **_LLAMA | {"num_key_value_heads": 1},
            lru_width=16,
            attention_window_size=32,
            logits_soft_cap=5.0,
            block_types=["recurrent", "attention"],
            architectures=["RecurrentGemmaForCausalLM"],
        ),
        1.0,
        5.0,
        False,
    ),
    "nemotron": (
        lambda: NemotronConfig(**_LLAMA, architectures=["NemotronForCausalLM"]),
        1.0,
        None,
        True,
    ),
    "glm": (
        lambda: GlmConfig(**_LLAMA, head_dim=4, architectures=["GlmForCausalLM"]),
        1.0,
        None,
        False,
    ),
    "stablelm": (
        lambda: StableLmConfig(**_LLAMA, architectures=["StableLmForCausalLM"]),
        1.0,
        None,
        True,
    ),
    "phi": (
        lambda: PhiConfig(**_LLAMA | {"num_key_value_heads": 4}, architectures=["PhiForCausalLM"]),
        1.0,
        None,
        True,
    ),
    # Its blocks hand over a list, and no norm follows them.
    "openai_gpt": (
        lambda: OpenAIGPTConfig(
            vocab_size=tiny.VOCAB,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=64,
            architectures=["OpenAIGPTLMHeadModel"],
        ),
        1.0,
        None,
        False,
    ),
    "falcon": (
        lambda: FalconConfig(**_SMALL, num_attention_heads=4, architectures=["FalconForCausalLM"]),
        1.0,
        None,
        True,
    ),
}
