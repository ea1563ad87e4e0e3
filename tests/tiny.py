"""Tiny random models of every architecture, built from Hugging Face configs, offline."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from unittest import mock

import torch
import transformer_lens
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
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
    T5Config,
)

from tests.architectures import ARCHITECTURES, BASE, REFUSED, VOCAB

HAS_HOOKED_TRANSFORMER = find_spec("transformer_lens.HookedTransformer") is not None
"""TransformerLens 3.9 has it, 4 does not."""

LAYERS = 3
_LLAMA = BASE | {"num_hidden_layers": LAYERS}

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


_SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": LAYERS}

FURTHER: dict[str, Callable[[], PretrainedConfig]] = {
    name: architecture.config for name, architecture in (ARCHITECTURES | REFUSED).items()
}
"""Architectures that most tests leave out; what is read of them stands in `architectures`."""

OUT_OF_SCOPE: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(
        **_SMALL,
        num_attention_heads=4,
        intermediate_size=24,
        architectures=["BertForMaskedLM"],
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    ),
}
"""Models that are no decoders."""


def hf_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random Hugging Face model whose norms and biases are not the identity."""
    return hf_of((CONFIGS | FURTHER | OUT_OF_SCOPE)[name](), dtype, seed)


def hf_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0):
    """The same of any config."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    architecture = getattr(transformers, config.architectures[0])
    model = architecture._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def tokenizer(folder):
    """Words t4, t5, ... as tokens after four special ones. TransformerLens reloads it from disk."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    names = [*special, *(f"t{i}" for i in range(len(special), VOCAB))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    pad, bos, eos, unk = special
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def bridge(name, tokenizer, dtype=torch.float32, compatibility=False, hf=None):
    """A TransformerBridge around a copy of `hf_model(name)`."""
    # For multimodal models TransformerLens would install torchvision by itself.
    with mock.patch("subprocess.check_call", side_effect=OSError("no installing in tests")):
        model = TransformerBridge.boot_transformers(
            f"tiny/{name}",
            hf_model=hf_model(name, dtype) if hf is None else hf,
            tokenizer=tokenizer,
            dtype=dtype,
        )
    if compatibility:
        with warnings.catch_warnings():
            # Phi-3 folds its norms elsewhere, OLMo 2 has none to fold.
            warnings.filterwarnings("ignore", ".*does not support fold_ln", UserWarning)
            model.enable_compatibility_mode(disable_warnings=True)
    return model


class Stories:
    """A trained Llama of 260 thousand parameters in a folder, with its SentencePiece tokenizer."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.bridge = TransformerBridge.boot_transformers(
            self.folder, hf_model=self.hugging_face(), tokenizer=self.tokenizer
        )

    def hugging_face(self):
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def ids(self, text):
        return self.tokenizer(text)["input_ids"]


def hooked_transformer(name, processed=False, tokenizer=None, dtype=torch.float32, hf=None):
    """A HookedTransformer with the weights of `hf_model(name)`: gpt2, llama, gemma2 or mixtral.

    Built by hand, as its own loader asks a model hub. `processed` folds norms and centres weights
    as `HookedTransformer.from_pretrained` does; otherwise the weights are the raw ones.
    """
    from transformer_lens.pretrained import weight_conversions

    hf = hf_model(name, dtype) if hf is None else hf
    settings = _hooked_settings(name, hf.config)
    settings["normalization_type"] += "Pre" if processed else ""
    cfg = transformer_lens.HookedTransformerConfig(
        **settings, dtype=dtype, device="cpu", init_weights=False
    )
    model = _hooked(cfg, tokenizer)
    convert = getattr(weight_conversions, f"convert_{name.replace('gemma2', 'gemma')}_weights")
    state = {key: weight.detach().clone() for key, weight in convert(hf, cfg).items()}
    if processed:
        model.load_and_process_state_dict(
            state,
            center_writing_weights=name == "gpt2",  # RMSNorm does not subtract a mean
            center_unembed=name != "gemma2",  # its soft cap is no softmax's shift
        )
    else:
        model.load_state_dict(state, strict=False)
    return model.eval()


def attention_only():
    """A HookedTransformer without MLPs."""
    torch.manual_seed(0)
    return _hooked(
        transformer_lens.HookedTransformerConfig(
            n_layers=LAYERS, d_model=16, d_head=4, n_ctx=64, d_vocab=VOCAB, attn_only=True
        )
    )


def _hooked(cfg, tokenizer=None):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        return transformer_lens.HookedTransformer(cfg, tokenizer=tokenizer)


def _hooked_settings(name, config):
    settings = {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "d_head": config.hidden_size // config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "original_architecture": config.architectures[0],
    }
    if name == "gpt2":
        return settings | {
            "d_mlp": 4 * config.hidden_size,
            "act_fn": config.activation_function,
            "eps": config.layer_norm_epsilon,
            "normalization_type": "LN",
        }
    settings |= {
        "d_mlp": config.intermediate_size,
        "act_fn": getattr(config, "hidden_act", None) or config.hidden_activation,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": settings["d_head"],
        "rotary_base": config.rope_parameters["rope_theta"],
        "n_key_value_heads": config.num_key_value_heads,
    }
    if name == "gemma2":
        settings |= {
            "attn_scale": config.query_pre_attn_scalar**0.5,
            "attn_scores_soft_cap": config.attn_logit_softcapping,
            "output_logits_soft_cap": config.final_logit_softcapping,
            "use_local_attn": True,
            "window_size": config.sliding_window,
            "attn_types": [
                "local" if kind == "sliding_attention" else "global" for kind in config.layer_types
            ],
            "use_normalization_before_and_after": True,
        }
    if name == "mixtral":
        settings |= {
            "num_experts": config.num_local_experts,
            "experts_per_token": config.num_experts_per_tok,
            "norm_topk_prob": True,
        }
    return settings
