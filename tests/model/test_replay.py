"""Replays: a pass taken up from a layer and a position is the whole pass."""

from __future__ import annotations

import pytest
import torch

from bwlens.model.replay import Replay
from bwlens.model.sites import find_taps
from tests import tiny


@pytest.mark.parametrize("name", [*tiny.CONFIGS, "openai_gpt", "falcon_h1", "gpt_neo", "falcon_rw"])
def test_a_replay_is_the_pass_itself(name, bridge):
    """Also from a layer on, where the blocks below give what they gave."""
    model = bridge(name)
    tokens = torch.tensor([5, 9, 30, 41, 8])
    with torch.no_grad():
        expected = model(tokens[None], return_type="logits")[0]
    replay = Replay(model, tokens, [1, 4])
    torch.testing.assert_close(replay.logits, expected[[1, 4]], rtol=1e-4, atol=1e-4)
    last = len(model.blocks) - 1
    tap = find_taps(model, ["W_O"], last)[0]
    nothing = torch.zeros(3, 5, 16)
    for layer in (0, last):
        found, before = replay({tap.z: nothing}, layer)
        torch.testing.assert_close(found, expected[[1, 4]].expand(3, -1, -1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(before, expected[[1, 4]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*tiny.CONFIGS, "openai_gpt", "falcon_h1", "gpt_neo", "falcon_rw"])
def test_later_positions_alone_are_as_they_are_after_the_earlier(name, bridge):
    """What is added at a position on changes what it does in the whole prompt, and no more."""
    model, tokens = bridge(name), torch.tensor([5, 9, 30, 41, 8, 3])
    tap = find_taps(model, ["W_O"], 1)[0]
    added = torch.zeros(3, 6, 16)
    added[:, 3:] = torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(0))
    whole, replay = (Replay(model, tokens, [1, 3, 5]) for _ in range(2))
    expected, _ = whole({tap.z: added}, 1)
    for layer in (0, 1):
        found, before = replay({tap.z: added}, layer, 3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(before, whole.logits, rtol=1e-4, atol=1e-5)
    assert replay.takes_earlier or name not in tiny.CONFIGS


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_later_positions_alone_within_a_window(name, boot):
    """Attention that looks no further back than three tokens does not with what is kept either."""
    config = tiny.CONFIGS[name]()
    config.sliding_window = 3
    model = boot(name, hf=tiny.hf_of(config))
    tokens = torch.tensor([5, 9, 30, 41, 8, 3, 11, 22])
    with torch.no_grad():
        expected = model(tokens[None], return_type="logits")[0]
        far = model(torch.cat([tokens[1:2], tokens[1:]])[None], return_type="logits")[0]
    assert name != "mistral" or torch.allclose(far[7], expected[7], atol=1e-5)  # beyond its reach
    replay, tap = Replay(model, tokens, [7]), find_taps(model, ["W_O"], 1)[0]
    torch.testing.assert_close(replay.logits, expected[[7]], rtol=1e-4, atol=1e-5)
    added = torch.zeros(2, 8, 16)
    added[:, 6:] = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0))
    whole, _ = replay({tap.z: added}, 1)
    alone, _ = replay({tap.z: added}, 1, 6)
    assert replay.takes_earlier
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)


def test_a_model_that_forgets_what_it_was_given_runs_whole_prompts(boot):
    """Attention that leaves earlier keys and values out is found out by the logits."""
    model, tokens = boot("llama"), torch.tensor([5, 9, 30, 41, 8])
    tap = find_taps(model, ["W_O"], 1)[0]
    added = torch.zeros(1, 5, 16)
    added[:, 4] = 1.0
    replay = Replay(model, tokens, [4])
    expected, _ = replay({tap.z: added}, 1)
    model.blocks[2].attn._update_kv_cache = lambda k, v, **kwargs: (k, v)
    found, _ = replay({tap.z: added}, 1, 4)
    torch.testing.assert_close(found, expected)
    assert not replay.takes_earlier
