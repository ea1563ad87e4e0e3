"""Architectures beyond those of `tiny.CONFIGS`: one tiny random model each, and what is read of it.

`ARCHITECTURES` is what the README's table says: a matrix that the Hugging Face model has (see
`oracle.matrices`) is read exactly, or stands in `unread` with words of the reason that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PretrainedConfig

VOCAB = 61
LAYERS = 2
"""Of most models here; some hybrids have three, so that attention is not in the last."""
BASE: dict[str, Any] = {
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
_HYBRID = BASE | {"num_hidden_layers": 3}
_SMALL = {key: BASE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
_ENDS = {key: BASE[key] for key in ("bos_token_id", "eos_token_id")}
_GPT = _ENDS | {"vocab_size": VOCAB, "n_embd": 16, "n_layer": LAYERS, "n_head": 4}
_FALCON = _ENDS | _SMALL | {"num_attention_heads": 4}
_MIXTURE = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
_GROUPED = {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1}
# Queries, keys and values through a bottleneck.
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_LLAVA = {
    "text_config": BASE | {"model_type": "llama"},
    "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
    "image_token_index": 60,
}
_BY_LATENT = "no such matrix"
_MLP, _QKV = ("W_in", "W_gate", "W_out"), ("W_Q", "W_K", "W_V")


@dataclass(frozen=True)
class Architecture:
    """A model and what bwlens says of it.

    Attributes:
        config: Makes the Hugging Face config.
        unread: Matrices that are there but not read, and words of the reason.
        not_on: Version prefixes of TransformerLens that cannot run it, and why.
        float32_only: Why it does not run in float64, where it does not.
    """

    config: Callable[[], PretrainedConfig]
    unread: Mapping[str, str] = field(default_factory=dict)
    not_on: Mapping[str, str] = field(default_factory=dict)
    float32_only: str = ""


def _of(kind: str, architecture: str | None = None, **settings: Any) -> Architecture:
    return _with({}, kind, architecture, **settings)


def _with(
    more: dict[str, Any], kind: str, architecture: str | None = None, **settings: Any
) -> Architecture:
    def config() -> PretrainedConfig:
        made = getattr(transformers, f"{kind}Config")(**settings)
        made.architectures = [architecture or f"{kind.removesuffix('Text')}ForCausalLM"]
        return made

    return Architecture(config, **more)


def _unread(names: tuple[str, ...], why: str) -> dict[str, Any]:
    return {"unread": dict.fromkeys(names, why)}


_COHERE = {"not_on": {"3.": "its logits differ from Hugging Face's by 3e-4 there"}}
_NO_DELTA_NET = {"not_on": {"3.": "its gated delta net asks transformers for what 5.24 has not"}}

ARCHITECTURES: dict[str, Architecture] = {
    # Dense.
    "apertus": _of("Apertus", **BASE),
    "arcee": _of("Arcee", **BASE),
    "bloom": _of("Bloom", **_SMALL, n_head=4),
    "cohere": _with(_COHERE, "Cohere", **BASE),
    "cohere2": _with(_COHERE, "Cohere2", **BASE),
    "ernie4_5": _of("Ernie4_5", **BASE),
    "exaone4": _of("Exaone4", **BASE),
    "falcon": _of("Falcon", **_FALCON, multi_query=True, parallel_attn=True, bias=False),
    "falcon_rw": _of("Falcon", **_FALCON, multi_query=False, parallel_attn=False, alibi=True),
    "gemma": _of("Gemma", **BASE, head_dim=4),
    "gemma4": _of(
        "Gemma4Text", **BASE, head_dim=4, global_head_dim=4, sliding_window=32,
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=4,
    ),
    "glm": _of("Glm", **BASE, head_dim=4),
    "glm4": _of("Glm4", **BASE, head_dim=4),
    "gpt_bigcode": _of("GPTBigCode", **_GPT, n_positions=64, multi_query=True),
    "gpt_neo": _of(
        "GPTNeo", **_SMALL | _ENDS, num_heads=4, max_position_embeddings=64, intermediate_size=24,
        attention_types=[[["global", "local"], 1]],
    ),
    # Scales of the embedding, the residual contributions, the attention and the logits.
    "granite": _of(
        "Granite", **BASE, embedding_multiplier=3.0, residual_multiplier=0.4,
        attention_multiplier=0.5, logits_scaling=2.0,
    ),
    "hunyuan_v1_dense": _with(
        {"not_on": {"3.": "its rotary embedding differs from Hugging Face's there"}},
        "HunYuanDenseV1", **BASE, head_dim=4,
    ),
    "jais2": _of("Jais2", **BASE),
    "ministral3": _of("Ministral3", **BASE),
    "modernbert_decoder": _with(
        _unread(("W_in",), "gives 48 columns, but W_out takes 24"),
        "ModernBertDecoder", **{k: v for k, v in BASE.items() if k != "num_key_value_heads"},
        cls_token_id=1, sep_token_id=2,
    ),
    "mpt": _of("Mpt", vocab_size=VOCAB, d_model=16, n_layers=LAYERS, n_heads=4, max_seq_len=64),
    "nanochat": _of("NanoChat", **BASE),
    "nemotron": _of("Nemotron", **BASE),
    "olmo": _of("Olmo", **BASE),
    "olmo3": _of("Olmo3", **BASE),
    "openai_gpt": _of("OpenAIGPT", "OpenAIGPTLMHeadModel", **_GPT, n_positions=64),
    "opt_350m": _of(  # the stream is wider than the embedding, norms stand after the sublayers
        "OPT", **BASE, ffn_dim=24, dropout=0.0, word_embed_proj_dim=8, do_layer_norm_before=False,
    ),
    "phi": _of("Phi", **BASE),
    "seed_oss": _of("SeedOss", **BASE, head_dim=4),
    "smollm3": _of("SmolLM3", **BASE),
    "stablelm": _of("StableLm", **BASE, partial_rotary_factor=0.5),
    "starcoder2": _of("Starcoder2", **BASE),
    "vaultgemma": _of("VaultGemma", **BASE, head_dim=4, sliding_window=32),
    "xglm": _with(
        {"float32_only": "its mask is made for float32"},
        "XGLM", vocab_size=VOCAB, d_model=16, ffn_dim=24, num_layers=LAYERS, attention_heads=4,
        max_position_embeddings=64,
    ),
    "youtu": _of("Youtu", **BASE | _LATENT),
    # Mixtures of experts.
    "afmoe": _of(
        "Afmoe", **BASE, **_MIXTURE, head_dim=4, num_experts=4, num_shared_experts=1,
        num_dense_layers=1,
    ),
    "deepseek_v2": _of("DeepseekV2", **BASE | _LATENT, **_MIXTURE, **_GROUPED, n_shared_experts=1),
    "deepseek_v2_lite": _with(
        _unread(("W_Q",), _BY_LATENT), "DeepseekV2", **BASE | _LATENT | {"q_lora_rank": None},
        **_MIXTURE, **_GROUPED, n_shared_experts=1,
    ),
    "deepseek_v4": _of("DeepseekV4", **BASE, n_routed_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _of("DeepseekV3", **BASE | _LATENT, **_MIXTURE, **_GROUPED),
    "ernie4_5_moe": _of(
        "Ernie4_5_Moe", **BASE, moe_intermediate_size=12, moe_num_experts=4, moe_k=2,
        moe_num_shared_experts=1, moe_layer_start_index=1,
    ),
    "flex_olmo": _of("FlexOlmo", **BASE, num_experts=4, num_experts_per_tok=2),
    "gemma4_moe": _of(
        "Gemma4Text", **BASE, head_dim=4, global_head_dim=4, sliding_window=32,
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=4, enable_moe_block=True,
        num_experts=4, top_k_experts=2, moe_intermediate_size=12,
    ),
    "glm4_moe": _of("Glm4Moe", **BASE, **_MIXTURE, **_GROUPED, head_dim=4),
    "glm4_moe_lite": _of("Glm4MoeLite", **BASE | _LATENT, **_MIXTURE, **_GROUPED),
    "glm_moe_dsa": _of(
        "GlmMoeDsa", **BASE | _LATENT, **_MIXTURE, **_GROUPED, index_topk=8, index_head_dim=8,
        index_n_heads=2,
    ),
    "gpt_oss": _with(
        _unread(_MLP, "GptOssExperts keeps its experts' weights in")
        | {"float32_only": "its experts' product knows no float64"}, "GptOss", **BASE, head_dim=4,
        num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * LAYERS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "granite_moe": _of("GraniteMoe", **BASE, num_local_experts=4, num_experts_per_tok=2),
    "laguna": _of("Laguna", **BASE, **_MIXTURE, head_dim=4, num_experts=4),
    "llama4": _with(
        _unread(_MLP, r"Llama4TextExperts keeps .* \(transposed"), "Llama4Text", **BASE, head_dim=4,
        intermediate_size_mlp=24, num_local_experts=4, num_experts_per_tok=1, moe_layers=[1],
    ),
    "minimax_m2": _of(
        "MiniMaxM2", **BASE, head_dim=4, num_local_experts=4, num_experts_per_tok=2
    ),
    "olmoe": _of("Olmoe", **BASE, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _of(
        "Qwen2Moe", **BASE, **_MIXTURE, shared_expert_intermediate_size=20, num_experts=4
    ),
    "qwen3_moe": _of("Qwen3Moe", **BASE, **_MIXTURE, head_dim=4, num_experts=4),
    # Hybrids: some layers have attention, others something else in its place.
    "bamba": _of("Bamba", **BASE, **_MAMBA, attn_layer_indices=[1], mamba_n_groups=1),
    "falcon_h1": _of("FalconH1", **BASE, **_MAMBA, head_dim=4, mamba_d_ssm=32),
    "granite_moe_hybrid": _of(
        "GraniteMoeHybrid", **_HYBRID, **_MAMBA, num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=20, layer_types=["mamba", "attention", "mamba"],
        position_embedding_type="rope",
    ),
    "granite_moe_hybrid_dense": _of(
        "GraniteMoeHybrid", **BASE, **_MAMBA, num_local_experts=0, shared_intermediate_size=20,
        layer_types=["attention"] * LAYERS, position_embedding_type="rope",
    ),
    "jamba": _of(
        "Jamba", **BASE, num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8,
        mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "lfm2": _of("Lfm2", **_HYBRID, layer_types=["conv", "full_attention", "conv"]),
    "lfm2_moe": _of(
        "Lfm2Moe", **BASE, **_MIXTURE, num_experts=4, num_dense_layers=1,
        layer_types=["conv", "full_attention"],
    ),
    "nemotron_h": _of(
        "NemotronH", **{k: v for k, v in BASE.items() if k != "num_hidden_layers"}, **_MIXTURE,
        head_dim=4, layers_block_type=["mamba", "attention", "moe", "mlp"], mamba_num_heads=4,
        mamba_head_dim=8, ssm_state_size=8, n_groups=1, n_routed_experts=4,
        moe_shared_expert_intermediate_size=12,
    ),
    "olmo_hybrid": _of("OlmoHybrid", **BASE, **_DELTA_NET),
    # Queries with gates in one projection.
    "qwen3_5": _with(_NO_DELTA_NET, "Qwen3_5Text", **BASE, **_DELTA_NET, head_dim=4),
    "qwen3_5_full_attention": _of(
        "Qwen3_5Text", **BASE, head_dim=4, layer_types=["full_attention"] * LAYERS
    ),
    "qwen3_5_moe": _with(
        _NO_DELTA_NET, "Qwen3_5MoeText", **BASE, **_MIXTURE, **_DELTA_NET, head_dim=4,
        shared_expert_intermediate_size=20, num_experts=4,
    ),
    "qwen3_next": _with(
        _NO_DELTA_NET, "Qwen3Next", **BASE, **_MIXTURE, **_DELTA_NET, head_dim=4,
        shared_expert_intermediate_size=20, num_experts=4,
    ),
    "recurrent_gemma": _of(
        "RecurrentGemma", **BASE, lru_width=16, head_dim=4, attention_window_size=32,
        block_types=["recurrent", "attention"],
    ),
    # Its feed-forward part; in place of attention it has a recurrence.
    "rwkv": _of(
        "Rwkv", **_SMALL, attention_hidden_size=16, intermediate_size=24, context_length=64
    ),
    "zamba2": _with(
        _unread(_MLP, "no such matrix"), "Zamba2", **_HYBRID | {"num_key_value_heads": 4},
        mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=8, hybrid_layer_ids=[1],
        layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1, adapter_rank=4,
    ),
    # Multimodal wrappers, read as text.
    "gemma3_multimodal": _of(
        "Gemma3", "Gemma3ForConditionalGeneration",
        text_config=BASE | {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 32},
        vision_config=_VISION, mm_tokens_per_image=4, image_token_index=60, boi_token_index=59,
        eoi_token_index=58,
    ),
    "idefics3": _of(
        "Idefics3", "Idefics3ForConditionalGeneration",
        text_config=BASE | {"model_type": "llama"}, vision_config=_VISION, image_token_id=60,
    ),
    "llava": _of("Llava", "LlavaForConditionalGeneration", **_LLAVA),
    "llava_next": _of("LlavaNext", "LlavaNextForConditionalGeneration", **_LLAVA),
    "mistral3": _of(
        "Mistral3", "Mistral3ForConditionalGeneration",
        text_config=BASE | {"model_type": "mistral"},
        vision_config=_VISION | {"model_type": "pixtral", "head_dim": 4}, image_token_index=60,
    ),
}  # fmt: skip

REFUSED: dict[str, Architecture] = {
    "mamba": _of("Mamba", **_SMALL),
    "mamba2": _of("Mamba2", **_SMALL, num_heads=4, head_dim=8, state_size=8, n_groups=1),
    "falcon_mamba": _of("FalconMamba", **_SMALL, state_size=8),
    "jetmoe": _of(
        "JetMoe", **{k: v for k, v in BASE.items() if k != "num_attention_heads"}, kv_channels=4,
        num_local_experts=4, num_experts_per_tok=2,
    ),
}  # fmt: skip
"""Models without a matrix that bwlens knows."""

TRANSFORMER_LENS_CANNOT = {
    "falcon with new_decoder_architecture": "TransformerLens does not load it",
    "codegen": "TransformerLens cannot run it with transformers 5.24",
    "opt with do_layer_norm_before=False": "TransformerLens cannot run it without a projection",
    "granite_moe_shared, helium, persimmon, phimoe": "TransformerLens does not know them",
}
"""Seen by hand with TransformerLens 4.3."""


def table() -> str:
    """What docs/results/architectures.md says: python -m tests.architectures > that page."""
    from tests import tiny

    exact = sorted([*tiny.CONFIGS, *(n for n, a in ARCHITECTURES.items() if not a.unread)])
    rows = [("exact: every matrix of attention and MLP that is there", ", ".join(exact))]
    for name, architecture in sorted(ARCHITECTURES.items()):
        if architecture.unread:
            rows.append((f"in part: not {', '.join(architecture.unread)}", name))
    rows.append(("refused: no matrix that bwlens knows", ", ".join(sorted(REFUSED))))
    out = [
        "# Architectures",
        "",
        "One tiny random model of each is compared with an unbridged Hugging Face copy, matrix by",
        "matrix (`tests/model/test_architectures.py`, `tests/gradient/test_capture.py`).",
        "In hybrids the attention and MLP layers are read; recurrences have no such matrices.",
        "Queries that share a projection with gates are read without them; W_Q, W_K and W_V made",
        "through a bottleneck (DeepSeek, GLM 4 lite, Youtu) are no single matrix and not read.",
        'The expert that all tokens of a mixture pass is `"shared"`: `grads["W_in", 3, "shared"]`.',
        "",
        "| read | architectures |",
        "|---|---|",
        *(f"| {what} | {names} |" for what, names in rows),
        "",
    ]
    for name, architecture in ARCHITECTURES.items():
        for line, why in architecture.not_on.items():
            out.append(f"- {name}: not compared on TransformerLens {line.rstrip('.')}, as {why}.")
    out += [f"- {name}: {why}." for name, why in TRANSFORMER_LENS_CANNOT.items()]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    print(table(), end="")
