"""TransformerLens' way into a Backpack: an adapter, as its plugins bring them.

`pyproject.toml` names it in the entry points `transformer_lens.architectures`. Importing this file
makes transformers know the architecture.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
)
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    JointQKVAttentionBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.supported_architectures.gpt2 import GPT2ArchitectureAdapter

from bwlens.knowledge.backpack.architecture import Backpack as Backpack
from bwlens.knowledge.backpack.architecture import BackpackConfig as BackpackConfig


def _optional(component: Any) -> Any:
    component.optional = True  # the last block has other parts
    return component


class BackpackAdapter(GPT2ArchitectureAdapter):
    """GPT-2's blocks, then the mixing of senses as the last block, whose stream is unembedded."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        # Every layer a Hugging Face config counts, and the mixing.
        self.cfg.n_layers += 1
        block = {
            "ln1": NormalizationBridge(name="ln_1", config=self.cfg),
            "attn": JointQKVAttentionBridge(
                name="attn",
                config=self.cfg,
                submodules={"qkv": LinearBridge(name="c_attn"), "o": LinearBridge(name="c_proj")},
            ),
            "ln2": NormalizationBridge(name="ln_2", config=self.cfg),
            "mlp": MLPBridge(
                name="mlp",
                submodules={"in": LinearBridge(name="c_fc"), "out": LinearBridge(name="c_proj")},
            ),
        }
        self.component_mapping = {
            "embed": EmbeddingBridge(name="backpack.gpt2_model.wte"),
            "pos_embed": PosEmbedBridge(name="backpack.gpt2_model.wpe"),
            "blocks": BlockBridge(
                name="backpack.stack",
                config=self.cfg,
                submodules={name: _optional(part) for name, part in block.items()},
            ),
            "unembed": UnembeddingBridge(name="lm_head"),
        }

    def prepare_model(self, hf_model: Any) -> None:
        """Register the stack, that its blocks can be replaced."""
        super().prepare_model(hf_model)
        backpack = hf_model.backpack
        if not isinstance(backpack.stack, nn.ModuleList):
            backpack.stack = nn.ModuleList(backpack.stack)


# `boot_transformers` looks names up here, where no entry point is put.
SUPPORTED_ARCHITECTURES["Backpack"] = BackpackAdapter
