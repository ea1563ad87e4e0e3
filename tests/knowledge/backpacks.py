"""Tiny random Backpacks, and the architecture written down slowly."""

import torch
from transformers import AutoTokenizer

from bwlens.demo import MODEL_DIR
from bwlens.knowledge import Backpack, BackpackConfig

ARMS = {
    "published": {},
    "k = 1": {"num_senses": 1},
    "one store": {"shared_senses": True},
    "signed": {"signed_weights": True},
    "wide, scaled": {"sense_intermediate_scale": 7, "output_scale": 3.0},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
}


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    config = {
        "vocab_size": 5000, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 2,
        "num_senses": 4, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    return Backpack(BackpackConfig(**{**config, **settings})).eval()


def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def bridge(model, dtype=torch.float64):
    from transformer_lens.model_bridge import TransformerBridge

    made = TransformerBridge.boot_transformers(
        "tiny", hf_model=model.to(dtype), tokenizer=tokenizer(), dtype=dtype
    )
    return made.eval()


def slowly(model, ids):
    """logits_i = E sum_j sum_l alpha[l, i, j] C(x_j)_l, word by word and sense by sense."""
    config, inner = model.config, model.backpack
    h = inner.gpt2_model(torch.tensor([ids])).last_hidden_state[0]
    E = inner.gpt2_model.wte.weight
    net, k = inner.sense_network, config.num_senses
    act = torch.nn.GELU(approximate="tanh")
    q, key = inner.sense_weight_net.c_attn(h).chunk(2, dim=-1)
    size = config.n_embd // k

    def mlp(part, x):
        hidden = act(x @ part.c_fc.weight + part.c_fc.bias)
        return hidden @ part.c_proj.weight + part.c_proj.bias

    def C(token):
        e = E[token]
        r = net.ln(e) + e
        out = mlp(net.final_mlp, net.block.ln_2(mlp(net.block.mlp, net.block.ln_1(r)) + r))
        return out.repeat(k) if config.shared_senses else out

    rows = []
    for i in range(len(ids)):
        o = torch.zeros(config.n_embd, dtype=E.dtype)
        for sense in range(k):
            cut = slice(sense * size, (sense + 1) * size)
            s = torch.stack([q[i, cut] @ key[j, cut] / size**0.5 for j in range(i + 1)])
            alpha = s.abs().softmax(0) * s.tanh() if config.signed_weights else s.softmax(0)
            for j in range(i + 1):
                vectors = C(ids[j]).reshape(k, config.n_embd)
                o = o + config.output_scale * alpha[j] * vectors[sense]
        rows.append(E @ o)
    return torch.stack(rows)
