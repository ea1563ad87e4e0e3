"""Tiny random models of every architecture, built from Hugging Face configs, offline."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 61
LAYERS = 3
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["GPT2LMHeadModel"],
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["GPTNeoXForCausalLM"],
    ),
    "gptj": lambda: GPTJConfig(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["GPTJForCausalLM"],
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        word_embed_proj_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["OPTForCausalLM"],
    ),
    "llama": lambda: LlamaConfig(**_LLAMA, architectures=["LlamaForCausalLM"]),
    "mistral": lambda: MistralConfig(
        **_LLAMA, sliding_window=None, architectures=["MistralForCausalLM"]
    ),
    "qwen2": lambda: Qwen2Config(**_LLAMA, architectures=["Qwen2ForCausalLM"]),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=4, architectures=["Qwen3ForCausalLM"]),
    "gemma2": lambda: Gemma2Config(
        **_LLAMA,
        head_dim=4,
        query_pre_attn_scalar=4,
        sliding_window=32,
        architectures=["Gemma2ForCausalLM"],
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_LLAMA,
        head_dim=4,
        query_pre_attn_scalar=4,
        sliding_window=32,
        architectures=["Gemma3ForCausalLM"],
    ),
    "phi3": lambda: Phi3Config(**_LLAMA, architectures=["Phi3ForCausalLM"]),
    "olmo2": lambda: Olmo2Config(**_LLAMA, architectures=["Olmo2ForCausalLM"]),
    "mixtral": lambda: MixtralConfig(
        **_LLAMA,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        architectures=["MixtralForCausalLM"],
    ),
}


def hf_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random Hugging Face model whose norms and biases are not the identity."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def tokenizer(folder):
    """Words t0, t1, ... as tokens; t0 pads, t1 is BOS. TransformerLens reloads it from disk."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t3"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t3"
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def bridge(name, tokenizer, dtype=torch.float32, compatibility=False, hf=None):
    """A TransformerBridge around a copy of `hf_model(name)`."""
    model = TransformerBridge.boot_transformers(
        f"tiny/{name}",
        hf_model=hf_model(name, dtype) if hf is None else hf,
        tokenizer=tokenizer,
        dtype=dtype,
    )
    if compatibility:
        model.enable_compatibility_mode(disable_warnings=True)
    return model
