"""Shares of the logit: against weights set to zero in an unbridged copy."""

from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch

from bwlens.knowledge import neurons
from tests import oracle, tiny
from tests.architectures import ARCHITECTURES
from tests.knowledge.by_hand import ByHand

TOKENS = torch.tensor([[5, 9, 30, 41, 17, 8]])
TARGET = 17

NO_SHARES = {
    "modernbert_decoder": "no scaled and capped unembedding of its last stream",
    "opt_350m": "a projection stands between",
    "deepseek_v4": "several residual streams",
    "openai_gpt": "does not hand on its stream as it is",
    "rwkv": "does not hand on its stream as it is",
    "gemma4": "neither linear nor a norm of its product alone",
    "gemma4_moe": "experts beside another feed-forward part",
    "granite_moe_hybrid": "experts beside another feed-forward part",
    "gpt_oss": "no feed-forward part",
    "llama4": "transposed or interleaved",
    "zamba2": "no feed-forward part",
}
"""Why the logit of some models is no sum over rows that bwlens can give."""


@pytest.mark.filterwarnings("ignore:Hook alias .* did not resolve:UserWarning")
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [*tiny.CONFIGS, *ARCHITECTURES])
def test_rows_and_bias_are_what_the_mlp_gives(name, boot):
    architecture = ARCHITECTURES.get(name)
    for line, why in architecture.not_on.items() if architecture else ():
        if version("transformer_lens").startswith(line):
            pytest.skip(f"not on TransformerLens {line}: {why}")
    narrow = architecture is not None and architecture.float32_only
    dtype, tolerance = (torch.float32, 2e-4) if narrow else (torch.float64, 1e-9)
    with nullcontext() if narrow else oracle.TrueFloat64():
        model = boot(name, dtype)
        if name in NO_SHARES:
            with pytest.raises((NotImplementedError, ValueError), match=NO_SHARES[name]):
                neurons(model, TOKENS, TARGET)
            return
        by_hand = ByHand(tiny.hf_model(name, dtype), TOKENS, TARGET)
        result = neurons(model, TOKENS, TARGET, top_k=2)
        close = {"abs": tolerance, "rel": tolerance}
        assert result.logit == pytest.approx(float(by_hand.score()), **close)
        assert result.layers
        for at, layer in enumerate(result.layers):
            whole, rows = float(by_hand.given(layer)), 0.0
            for site, shares in zip(result.stores, result.shares, strict=True):
                rows += float(shares.sum()) if site.layer == layer else 0.0
            assert float(result.mlps[at]) == pytest.approx(whole, **close)
            if not by_hand.normed(layer):
                weights = float(by_hand.given(layer, what=("weight",)))
                assert rows == pytest.approx(weights, **close)
            assert rows + float(result.biases[at]) == pytest.approx(whole, **close)
        for row in result.rows[::3][:2]:
            expected = by_hand.given_by_row(row.neuron)
            assert row.share == pytest.approx(float(expected), **close), row.neuron


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
def test_half_precision_gives_the_same_shares_to_its_rounding(name, dtype, boot):
    whole, half = (neurons(boot(name, one), TOKENS, TARGET) for one in (torch.float32, dtype))
    assert half.stores == whole.stores
    one, other = torch.cat(half.shares), torch.cat(whole.shares)
    assert float((one - other).norm() / other.norm()) < 4 * torch.finfo(dtype).eps
