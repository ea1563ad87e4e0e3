"""The transported reading: delta through a JacobianLens, and what it is refused for."""

from __future__ import annotations

import pytest
import torch

import bwlens
from bwlens.gradient.objectives import NLL
from bwlens.model.head import head_of
from bwlens.reading.readouts import readout

analysis = pytest.importorskip("transformer_lens.tools.analysis")
if not hasattr(analysis, "JacobianLens"):
    pytest.skip("TransformerLens has JacobianLens from 4.3 on", allow_module_level=True)

TOKENS = torch.tensor([5, 9, 30, 41, 8])


def jacobian(layers=(0, 1), width=16, **metadata):
    make = torch.Generator().manual_seed(0)
    matrices = {layer: torch.randn(width, width, generator=make) for layer in layers}
    return analysis.JacobianLens(matrices, n_prompts=1, d_model=width, metadata=metadata)


def test_delta_is_carried_and_then_read(bridge):
    model, J = bridge("llama"), jacobian()
    lens = bwlens.backward_lens(
        model, TOKENS, NLL([17]), reading=["plain", "transported"], jacobian=J, trust=True
    )
    plain, carried = lens.readout(), lens.as_reading("transported").readout()
    for layer in (0, 1):
        rows = torch.stack([J.jacobians[layer] @ d for d in lens.gradient("W_out", layer).delta])
        read = readout(head_of(model), rows)
        assert torch.equal(carried.top_ids[layer], read.top_ids)
        assert not torch.equal(carried.top_ids[layer], plain.top_ids[layer])
    assert torch.equal(carried.top_ids[2], plain.top_ids[2])  # the last layer is where it goes
    assert torch.equal(
        lens.as_reading("transported").readout("W_in").top_ids, lens.readout("W_in").top_ids
    )
    trust = lens.as_reading("transported").trust
    assert trust.reading == "transported"
    assert trust.plausible[2] == lens.trust.plausible[2]
    assert trust.plausible[0] != lens.trust.plausible[0]


def test_a_true_jacobian_gives_the_effect(bridge):
    """Of this prompt's own pass, where the final norm hardly bends: nearer than the plain one."""
    model = bridge("llama")
    blocks = list(model.blocks)
    streams = {}
    handles = [
        block.register_forward_hook(lambda m, a, out, at=at: streams.__setitem__(at, out))
        for at, block in enumerate(blocks)
    ]
    model(TOKENS[None])
    for handle in handles:
        handle.remove()
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    last = first(streams[2])[0, 4]
    J = {}
    for layer in (0, 1):
        rows = [
            torch.autograd.grad(last[i], first(streams[layer]), retain_graph=True)[0][0, 4]
            for i in range(16)
        ]
        J[layer] = torch.stack(rows)
    lens = bwlens.backward_lens(
        model, TOKENS, NLL([17]), reading=["plain", "transported"], trust=True,
        jacobian=analysis.JacobianLens(J, n_prompts=1, d_model=16),
    )  # fmt: skip
    carried = lens.as_reading("transported").trust
    left, before = 1 - carried.vocabulary[:2], 1 - lens.trust.vocabulary[:2]
    assert (left < 0.003).all()
    assert (left < before / 4).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs jacobian=..., a JacobianLens, found None"),
        ({"jacobian": torch.eye(16)}, "needs jacobian="),
        ({"jacobian": jacobian(width=8)}, "fitted for d_model=8, but the model has d_model=16"),
        ({"jacobian": jacobian(model_name="other")}, "fitted for model 'other'"),
        ({"jacobian": jacobian((1,))}, r"no Jacobian of layers \[0\]"),
        ({"jacobian": jacobian(), "matrices": "W_O"}, "W_O writes below that"),
    ],
)
def test_what_cannot_be_carried(options, message, bridge):
    with pytest.raises(ValueError, match=message):
        bwlens.backward_lens(bridge("llama"), TOKENS, NLL([17]), reading="transported", **options)


@pytest.mark.usefixtures("unchecked")
def test_only_raw_bridges_are_carried_through(bridge):
    with pytest.raises(ValueError, match="compatibility mode"):
        bwlens.backward_lens(
            bridge("llama", compatibility=True), TOKENS, NLL([17]), reading="transported",
            jacobian=jacobian(),
        )  # fmt: skip
