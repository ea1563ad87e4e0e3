"""A bridge whose weights were processed: folding changes what enters a matrix, nothing else.

Gradients are compared with those of the raw Hugging Face copy. W_out's needs no change. What
enters the other MLP and attention matrices is turned back into the raw input first, by the norm's
own gain and bias (x_raw = gain * x_folded + bias); W_O's by the constant value that processing
moves into W_O's bias.
"""

from dataclasses import replace

import pytest
import torch

import bwlens
from tests import cases, oracle, tiny


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_matrix_against_hugging_face(name, boot):
    hf = tiny.hf_model(name)

    def as_raw(gradient, site):
        gain, bias = oracle.folded(hf, site.matrix, site.layer)
        return replace(gradient, x=gradient.x * gain + bias)

    model = boot(name, compatibility=True)
    cases.check_every_matrix(model, hf, 1e-5, sides=("left",), as_raw=as_raw)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_folded_input_is_the_norm_without_gain_and_bias(name, boot):
    """The other direction, where it is seen that a folded W_in really gets another x."""
    tokens = torch.tensor([cases.PROMPTS[0]])
    raw, processed = (
        bwlens.capture(boot(name, compatibility=on), tokens, 17, ("W_in", "W_out"))
        for on in (False, True)
    )
    for site, gradient in raw.items():
        other = processed[site]
        assert oracle.relative_error(other.delta, gradient.delta) < 1e-5
        changed = oracle.relative_error(other.x, gradient.x)
        assert changed < 1e-5 if site.matrix == "W_out" else changed > 0.1
