"""A random GPT-2 with a tokenizer of its own, built offline: the same weights for the same seed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The size of the model and of the prompt; by default GPT-2 small and 32 tokens."""

    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    d_vocab: int = 50257
    n_tokens: int = 32

    def __str__(self) -> str:
        return (
            f"{self.n_layers} layers, d_model {self.d_model}, vocabulary {self.d_vocab},"
            f" {self.n_tokens} tokens"
        )


SMALL = Shape()
"""GPT-2 small, as published."""

TINY = Shape(n_layers=2, d_model=32, n_heads=4, d_vocab=997, n_tokens=12)
"""Big enough to show that a benchmark runs."""

TARGET = 7
"""Id of the token whose loss is read."""


def bridge(shape: Shape, seed: int = 0) -> Any:
    """A TransformerBridge around a random GPT-2 of this shape; token i is the word "t{i}"."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

    config = GPT2Config(
        vocab_size=shape.d_vocab,
        n_embd=shape.d_model,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        bos_token_id=shape.d_vocab - 1,
        eos_token_id=shape.d_vocab - 1,
        architectures=["GPT2LMHeadModel"],
    )
    hf = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Drawn here, by name, so that other versions of transformers give the same weights.
        for name, weight in sorted(hf.named_parameters()):
            weight.normal_(0.0, 0.02, generator=generator)
            if weight.ndim == 1 and "ln_" in name and name.endswith("weight"):
                weight.add_(1.0)
    with tempfile.TemporaryDirectory() as folder:
        _save_tokenizer(shape.d_vocab, folder)
        # TransformerLens reads the tokenizer again, from where it came.
        return TransformerBridge.boot_transformers(
            "random/gpt2",
            hf_model=hf.eval(),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            dtype=torch.float32,
            device="cpu",
        ).eval()


def random_tokens(shape: Shape, n_tokens: int, seed: int = 0) -> Tensor:
    """Token ids [n_tokens], drawn at random; neither the target nor BOS."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TARGET + 1, shape.d_vocab - 1, (n_tokens,), generator=generator)


def text(tokens: Tensor) -> str:
    """The words of the tokens."""
    return " ".join(f"t{i}" for i in tokens.tolist())


def _save_tokenizer(d_vocab: int, folder: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    bos = f"t{d_vocab - 1}"
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(d_vocab)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", unk_token="t0", bos_token=bos, eos_token=bos
    ).save_pretrained(folder)
