"""The Backpack language model (Hewitt et al., ACL 2023), and variants that test what its k does.

A word has k sense vectors C(x)_l, which depend on the word alone; a GPT-2 that reads the text says
how much of each goes where. With weights alpha [k, n, n],

    o_i = scale * sum_j sum_l alpha[l, i, j] C(x_j)_l,    logits_i = E o_i

so that every logit is a sum over (word, sense). Modules and weights have the names of the
published checkpoints. This file needs torch and transformers alone.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2Model
from transformers.activations import ACT2FN
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.pytorch_utils import Conv1D


class BackpackConfig(GPT2Config):
    """GPT-2's settings, which the network of the weights has, and those of the senses.

    Args:
        num_senses: k, how many mixings, and senses a word; it divides `n_embd`.
        sense_intermediate_scale: the width of the senses' last MLP, in units of `n_embd`.
        shared_senses: one sense a word (one store), mixed k times: the senses are tied.
        signed_weights: alpha = softmax_j(|s|) tanh(s), of either sign, instead of softmax_j(s).
        output_scale: what the sum is multiplied by; the published model's weights total k.
        n_changed: how many words have senses of their own instead of the network's.

    Raises:
        ValueError: `num_senses` does not divide `n_embd`.
    """

    model_type = "backpack"

    def __init__(
        self,
        num_senses: int = 16,
        sense_intermediate_scale: int = 4,
        shared_senses: bool = False,
        signed_weights: bool = False,
        output_scale: float = 1.0,
        n_changed: int = 0,
        **kwargs: Any,
    ):
        self.num_senses = num_senses
        self.sense_intermediate_scale = sense_intermediate_scale
        self.shared_senses = shared_senses
        self.signed_weights = signed_weights
        self.output_scale = output_scale
        self.n_changed = n_changed
        kwargs.setdefault("use_cache", False)  # a weight looks at every hidden state, not at keys
        kwargs["architectures"] = kwargs.get("architectures") or ["Backpack"]
        super().__init__(**kwargs)
        if num_senses < 1 or self.n_embd % num_senses:
            raise ValueError(
                f"num_senses={num_senses} does not divide n_embd={self.n_embd}: the weights' "
                "queries and keys are cut into num_senses equal parts. Choose a divisor"
            )

    @property
    def num_stores(self) -> int:
        """How many vectors a word has: k, or one that all k mixings share."""
        return 1 if self.shared_senses else self.num_senses


class SenseMLP(nn.Module):
    """Two affine maps with the activation between them."""

    def __init__(self, config: BackpackConfig, width: int, out: int):
        super().__init__()
        self.c_fc = Conv1D(width, config.n_embd)
        self.c_proj = Conv1D(out, width)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n_embd] to [..., out]."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class SenseBlock(nn.Module):
    """A residual MLP without attention: a word's senses know nothing of its neighbours."""

    def __init__(self, config: BackpackConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = SenseMLP(config, 4 * config.n_embd, config.n_embd)
        self.resid_dropout1 = nn.Dropout(config.resid_pdrop)
        self.resid_dropout2 = nn.Dropout(config.resid_pdrop)

    def forward(self, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The normed stream and the stream itself to the stream behind, normed."""
        residual = self.resid_dropout1(normed) + residual
        return self.ln_2(self.resid_dropout2(self.mlp(self.ln_1(residual))) + residual)


class SenseNetwork(nn.Module):
    """Words' embeddings [b, n, d] to their senses [b, stores, n, d].

    Attributes:
        changed: Tokens that have the senses of `own` instead of the network's [m]; None for none.
        own: These senses [m, stores, d].
    """

    changed: torch.Tensor | None
    own: torch.Tensor | None

    def __init__(self, config: BackpackConfig):
        super().__init__()
        self.stores = config.num_stores
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.block = SenseBlock(config)
        self.ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        width = config.sense_intermediate_scale * config.n_embd
        self.final_mlp = SenseMLP(config, width, self.stores * config.n_embd)
        m = config.n_changed
        blank = torch.zeros(m, self.stores, config.n_embd) if m else None
        self.register_buffer("changed", torch.zeros(m, dtype=torch.long) if m else None)
        self.register_buffer("own", blank)

    def forward(self, embedded: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """`tokens` [b, n] are needed where words have senses of their own."""
        residual = self.dropout(embedded)
        senses = self.final_mlp(self.block(self.ln(residual), residual))
        senses = senses.unflatten(-1, (self.stores, -1)).transpose(-3, -2)
        if self.changed is None or self.own is None:
            return senses
        if tokens is None:
            raise ValueError(
                f"the senses of {len(self.changed)} words are changed, and which words these are"
                " is known by their tokens: give input_ids, not inputs_embeds, or undo the change"
            )
        is_word = tokens[..., None] == self.changed  # [b, n, m]
        own = torch.einsum("bnm,mkd->bknd", is_word.to(senses.dtype), self.own.to(senses.dtype))
        return torch.where(is_word.any(-1)[:, None, :, None], own, senses)


class SenseWeights(nn.Module):
    """Hidden states [b, n, d] to the weights alpha [b, k, to, from]; nothing looks ahead."""

    def __init__(self, config: BackpackConfig):
        super().__init__()
        self.num_senses, self.signed = config.num_senses, config.signed_weights
        self.c_attn = nn.Linear(config.n_embd, 2 * config.n_embd)

    def forward(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """`padding` [b, n] is true or 1 where there is a token."""
        q, k = self.c_attn(hidden).unflatten(-1, (2, self.num_senses, -1)).unbind(dim=-3)
        scores = torch.einsum("bihd,bjhd->bhij", q, k / math.sqrt(k.shape[-1]))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if padding is not None:
            # Padding may look at itself, so that no row of weights is empty.
            itself = torch.eye(len(allowed), dtype=torch.bool, device=scores.device)
            allowed = allowed & (padding.bool()[:, None, None, :] | itself)
        sizes = scores.abs() if self.signed else scores
        weights = sizes.masked_fill(~allowed, float("-inf")).softmax(-1)
        if self.signed:
            weights = weights * scores.tanh()
        return weights.to(hidden.dtype)


class SenseMixing(nn.Module):
    """The block above GPT-2's: its stream and the words [b, n, d] to the mixed senses [b, n, d]."""

    def __init__(self, config: BackpackConfig, ln_f: nn.Module):
        super().__init__()
        self.ln_f = ln_f
        self.sense_weight_net = SenseWeights(config)
        self.sense_network = SenseNetwork(config)
        self.scale = config.output_scale

    def forward(
        self,
        stream: torch.Tensor,
        embedded: torch.Tensor,
        padding: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`padding` [b, n] is 1 where there is a token; `tokens` are the words' ids."""
        weights = self.sense_weight_net(self.ln_f(stream), padding)
        senses = self.sense_network(embedded, tokens)
        if senses.shape[1] < weights.shape[1]:  # one store: its mixings may be added up first
            weights = weights.sum(1, keepdim=True)
        # One product over (sense, word), which holds no [b, k, to, d].
        return self.scale * (weights.transpose(1, 2).flatten(2) @ senses.flatten(1, 2))


class BackpackModel(nn.Module):
    """All but the unembedding: token ids to the mixed senses [b, n, d].

    Attributes:
        stack: GPT-2's blocks and the `SenseMixing` above them, in the order that they run.
    """

    def __init__(self, config: BackpackConfig):
        super().__init__()
        self.config = config
        self.gpt2_model = GPT2Model(config)
        mixing = SenseMixing(config, self.gpt2_model.ln_f)
        self.sense_network, self.sense_weight_net = mixing.sense_network, mixing.sense_weight_net
        # A list registers no module: weights are saved under the published names alone.
        self.stack: Any = [*self.gpt2_model.h, mixing]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As GPT-2 takes them; words that have senses of their own need `input_ids`."""
        gpt2 = self.gpt2_model
        embedded = gpt2.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(embedded.shape[1], device=embedded.device)[None]
        stream = gpt2.drop(embedded + gpt2.wpe(position_ids))
        mask = self._mask(stream, attention_mask)
        *blocks, mixing = self.stack
        for block in blocks:
            out = block(stream, attention_mask=mask, use_cache=False)
            stream = out if isinstance(out, torch.Tensor) else out[0]
        return mixing(stream, embedded, attention_mask, input_ids)

    def _mask(self, stream: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor | None:
        """What GPT-2's attention adds to its scores [b, 1, to, from]; None where torch knows it."""
        if padding is None and getattr(self.config, "_attn_implementation", "") == "sdpa":
            return None
        n = stream.shape[1]
        allowed = torch.ones(n, n, dtype=torch.bool, device=stream.device).tril()[None, None]
        if padding is not None:
            allowed = allowed & padding.bool()[:, None, None, :]
        least = torch.finfo(stream.dtype).min
        return torch.zeros_like(allowed, dtype=stream.dtype).masked_fill(~allowed, least)


class Backpack(GPT2PreTrainedModel, GenerationMixin):
    """The Backpack with its unembedding, which is the embedding.

    >>> config = BackpackConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=2, num_senses=4)
    >>> model = Backpack(config)
    >>> model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 50])
    """

    config_class = BackpackConfig
    base_model_prefix = "backpack"
    _tied_weights_keys = {"lm_head.weight": "backpack.gpt2_model.wte.weight"}  # noqa: RUF012
    # The published checkpoints name the embeddings twice.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"(word|position)_embeddings\.weight", r"attn\.(masked_)?bias",
    ]  # fmt: skip

    def __init__(self, config: BackpackConfig):
        super().__init__(config)
        self.backpack = BackpackModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The words' embedding, which is the unembedding."""
        return self.backpack.gpt2_model.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.backpack.gpt2_model.wte = value

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits, and the mean loss if `labels` [b, n] are given (-100: not counted)."""
        logits = self.lm_head(self.backpack(input_ids, attention_mask, position_ids, inputs_embeds))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            )
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """The whole text again for every token: weights are not cached."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


AutoConfig.register("backpack", BackpackConfig)
AutoModelForCausalLM.register(BackpackConfig, Backpack)
