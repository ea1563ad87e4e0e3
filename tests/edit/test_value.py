"""A value's search, in one batch and from the key's token on, gives what the plain one gives."""

from dataclasses import replace

import pytest
import torch

from bwlens import Edit, Site
from bwlens.edit.aims import Aims
from bwlens.edit.keys import contexts_of, shift_of
from bwlens.edit.value import ValueSearch, ValueSettings
from bwlens.model.passes import run
from bwlens.model.sites import find_taps
from tests import tiny

EDITS = [
    Edit("{} t9 t30 t41", subject="t5 t6", target_new=" t17"),
    Edit("{} t8", subject="t7", target_new=" t23 t44"),
    Edit("t12 t3 t4 {} t21 t50 t9", subject="t33", target_new=" t9"),
]
PREFIXES = ("t20 t21", "t50 t40 t8 t11")
NAMES = ["gpt2", "llama", "gemma2", "gpt_neox", "opt", "qwen3", "bloom", "mpt", "gemma4", "exaone4"]


def plain_words(model, contexts, site, shifts):
    """Every word's log-probability at every position, in a pass of everything."""
    (tap,) = find_taps(model, site.matrix, site.layer)
    rows = shifts.repeat_interleave(contexts.n, 0)
    added = shift_of(tap, contexts.batch, contexts.rows, rows)
    graph = shifts.requires_grad
    words = run(model, contexts.batch.tokens, additions=[added], graph=graph).logits
    return words.float().log_softmax(-1)


def the_same(model, name=""):
    contexts = contexts_of(model, EDITS, PREFIXES, "subject", None)
    site = Site("W_out", 0)
    aims = Aims(model, contexts, site)
    shifts = torch.randn(
        3, aims.outputs.shape[-1], generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    with torch.enable_grad():
        log_p = aims.of_target(aims.words(shifts))[aims.mask]
        words = plain_words(model, contexts, site, shifts)
        last, targets = contexts.batch.last.tolist(), contexts.batch.targets
        expected = torch.stack(
            [words[i, last[i] + k, t] for i, ids in enumerate(targets) for k, t in enumerate(ids)]
        )
        slopes = [torch.autograd.grad(some.sum(), [shifts])[0] for some in (log_p, expected)]
    torch.testing.assert_close(log_p, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_from_the_keys_on_is_the_plain_one(name, boot):
    the_same(boot(name))


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_in_compatibility_mode_too(name, boot):
    the_same(boot(name, compatibility=True))


@pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no such class")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_of_a_hooked_transformer_too(name, tokenizer):
    the_same(tiny.hooked_transformer(name, tokenizer=tokenizer))


def test_where_the_user_changes_an_mlp_by_position(boot):
    """The user's own hook sees every token, though the search needs only some."""
    model = boot("llama")
    seen = []

    def last_token(output, hook):
        seen.append(output.shape[:2])
        return torch.cat([output[:, :-1], 2 * output[:, -1:]], 1)

    with model.hooks(fwd_hooks=[("blocks.2.mlp.hook_out", last_token)]):
        the_same(model)
    assert len(set(seen)) == 1


@pytest.mark.parametrize("of_stream", [False, True])
def test_several_in_one_batch_are_as_each_by_itself(of_stream, boot):
    model = boot("gpt2")
    site, settings = Site("W_out", 1), {"of_stream": of_stream}
    search = ValueSearch(ValueSettings(4, 2e-3, weight_decay=0.0), PREFIXES, "subject", None)
    third = min(value.losses[2] for value in search.values(model, EDITS, site, **settings))
    search = ValueSearch(
        replace(search.settings, stop_loss=third + 1e-5), PREFIXES, "subject", None
    )
    together = search.values(model, EDITS, site, **settings)
    for edit, value in zip(EDITS, together, strict=True):
        (alone,) = search.values(model, [edit], site, **settings)
        torch.testing.assert_close(value.key, alone.key)
        torch.testing.assert_close(value.delta, alone.delta, rtol=1e-4, atol=1e-5)
        assert value.losses == pytest.approx(alone.losses, rel=1e-5)
    # One ends before the others, which go on.
    assert sorted(len(value.losses) for value in together) == [3, 5, 5]
