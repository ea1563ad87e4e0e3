"""Small changes of weights, and whether they left anything behind."""

import pytest
import torch

from bwlens import LowRankGradient
from bwlens.edit import WeightChange
from bwlens.model.flows import as_rows
from bwlens.model.passes import run
from bwlens.model.prompts import make_batch
from bwlens.model.sites import available_matrices, find_taps
from bwlens.model.weights import weight_of
from tests import cases, tiny

TOKENS, MASK = cases.padded(cases.PROMPTS)
HOOKED = pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")


def passing(model):
    """x and z of every site as they pass, in rows."""
    taps = find_taps(model, available_matrices(model))
    return {
        site: (as_rows(flow.x), as_rows(flow.z)[:, columns])
        for flow in run(model, make_batch(model, TOKENS).tokens, taps=taps).flows
        for site, columns in flow.parts
    }


def random_change(weight, rank=2, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    return LowRankGradient(
        scale * torch.randn(rank, weight.shape[0], generator=generator),
        torch.randn(rank, weight.shape[1], generator=generator),
    )


def change_of(model, *sites, seed=0, **kwargs):
    return WeightChange(
        {
            s: random_change(weight_of(model, s), seed=seed + i, **kwargs)
            for i, s in enumerate(sites)
        }
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    different = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert different == []


def linear_of(model, layer=1):
    return model.blocks[layer].mlp.out.original_component
