"""How results/memory.csv is made: what a lens takes beside the weights, at its peak.

    python docs/scripts/memory.py            # a quarter of an hour of one core, 8 GB

Bytes that torch's allocator had handed out at once during a call, less what was there before. On a
CPU, where attention and the allocator are not a GPU's: an order of magnitude, not a promise.
SmolLM2 in float32, and a random model of the shape of Llama 3.2 1B in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import bwlens
from benchmarks.measure import peak_bytes

RESULTS = Path(__file__).parents[1] / "results"
TOKENS = (16, 128, 512)


def billion() -> Any:
    """A random model of 1.24 billion parameters; its tokenizer is the demo's, and not used."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
        max_position_embeddings=4096, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    hf = AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    return TransformerBridge.boot_transformers(
        "random/llama",
        hf_model=hf,
        tokenizer=AutoTokenizer.from_pretrained(bwlens.demo.MODEL_DIR),
        dtype=torch.bfloat16,
        device="cpu",
    ).eval()


def rows(name: str, model: Any, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """Peaks of each call on prompts of so many tokens, in MiB."""
    weights = sum(p.numel() * p.element_size() for p in model.original_model.parameters())
    made = []
    for n in tokens:
        prompt = torch.arange(100, 100 + n)
        lens = partial(bwlens.backward_lens, model, prompt, [7])
        calls: dict[str, Callable[[], Any]] = {
            "capture": lambda prompt=prompt: bwlens.capture(model, prompt, [7], ("W_in", "W_out")),
            "backward_lens": lens,
            "trust=True": partial(lens, trust=True),
            'reading="effect", positions="last"': partial(
                lens, reading="effect", positions="last", matrices="W_out"
            ),
        }
        for call, made_by in calls.items():
            if n > TOKENS[1] and call not in ("capture", "backward_lens"):
                continue
            peak = peak_bytes(made_by)
            made.append(
                {"model": name, "weights": weights / 2**20, "tokens": n, "call": call,
                 "beside": peak / 2**20}
            )  # fmt: skip
            print(made[-1], flush=True)
    return made


def main() -> None:
    """Measure both, or the one that is named."""
    made = rows("SmolLM2-135M, float32", bwlens.load_model("smollm2"), TOKENS)
    made += rows("Llama 3.2 1B's shape, bfloat16", billion(), TOKENS[:2])
    pd.DataFrame(made).round(0).to_csv(RESULTS / "memory.csv", index=False)


if __name__ == "__main__":
    sys.exit(main())
