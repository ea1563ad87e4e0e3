"""What is added to patterns is added, wherever the model computes them, and gone on leaving."""

import pytest
import torch

import bwlens
from bwlens.attention.patching import without_heads
from tests import tiny

PROMPTS = [[5, 9, 30, 41, 8], [12, 33, 6, 21, 50]]
PROMPT = torch.tensor([[7, 8, 44, 3, 19]])


def maps_of(model, prompts=PROMPTS, **settings):
    return bwlens.reversed_attention(model, prompts, [17, 23], **settings)


def logits(model, prompt=PROMPT):
    with torch.no_grad():
        return model(prompt)


@pytest.mark.parametrize("kind", ["reversed", "forward"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_patching_is_transformer_lens_own_hook_s(name, kind, boot):
    model = boot(name)
    maps, before = maps_of(model), logits(model)
    added = 20.0 * getattr(maps, kind).mean(0)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(tiny.LAYERS)]
    with torch.no_grad():
        expected = model.run_with_hooks(
            PROMPT,
            fwd_hooks=[(n, lambda a, hook, at=i: a + added[at]) for i, n in enumerate(names)],
        )
    with bwlens.attention_patching(model, maps, 20.0, kind=kind):
        mine = logits(model)
    torch.testing.assert_close(mine, expected)
    assert not torch.equal(before, expected)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["bloom", "falcon", "gpt_oss", "jamba", "opt"])
def test_alpha_moves_the_loss_as_r_says(name, boot):
    """To first order, by alpha * <dL/dA, R>: down for a negative alpha, elsewhere up."""
    model = boot(name)
    maps = bwlens.reversed_attention(model, PROMPTS[0], 17)

    def loss(alpha):
        with bwlens.attention_patching(model, maps, alpha):
            return -logits(model, torch.tensor(PROMPTS[:1]))[0, -1].log_softmax(-1)[17]

    small = 1e-2 / float(maps.reversed.abs().max())
    assert loss(-small) < maps.losses[0] < loss(small)
    torch.testing.assert_close(loss(0.0), maps.losses[0])


def test_chosen_heads_alone(boot):
    model = boot("llama")
    maps = maps_of(model)
    with bwlens.attention_patching(model, maps, 5.0, heads=[(1, 2)]):
        one = bwlens.reversed_attention(model, PROMPT, 17)
    plain = bwlens.reversed_attention(model, PROMPT, 17)
    assert torch.equal(one.map(0, 1, kind="forward"), plain.map(0, 1, kind="forward"))
    with bwlens.attention_patching(model, maps, 5.0, heads=[(1, 2)]):
        cached = logits(model)
    some = bwlens.reversed_attention(model, PROMPTS, [17, 23], layers=1, heads=2)
    with bwlens.attention_patching(model, some, 5.0):
        assert torch.equal(logits(model), cached)


def test_segments_align_prompts_of_other_lengths(bridge):
    model = bridge("gpt2")
    short = bwlens.reversed_attention(model, [[5, 9, 30], [12, 33, 6, 21]], [17, 23])
    names = [["first", "middle", "last"], ["first", "middle", "middle", "last"]]
    onto = ["first", "middle", "middle", "last", "else"]
    place = (1, 3)
    a, b = (short.map(*place, prompt=i) for i in (0, 1))
    last_first = (a[2, 0] + b[3, 0]) / 2
    middles = (a[1, 1] + b[1, 1] + b[2, 1] + b[2, 2]) / 4
    expected = torch.zeros(5, 5)
    expected[3, 0] = last_first
    expected[1, 1] = expected[2, 1] = expected[2, 2] = middles
    expected[0, 0] = (a[0, 0] + b[0, 0]) / 2
    expected[3, 3] = (a[2, 2] + b[3, 3]) / 2
    expected[1:3, 0] = (a[1, 0] + b[1, 0] + b[2, 0]) / 3
    expected[3, 1:3] = (a[2, 1] + b[3, 1] + b[3, 2]) / 3
    seen = []
    with (
        bwlens.attention_patching(model, short, 2.0, heads=[place], segments=names, onto=onto),
        torch.no_grad(),
    ):
        model.run_with_hooks(
            PROMPT, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda a, hook: seen.append(a[0, 3]))]
        )  # fmt: skip
    plain = bwlens.reversed_attention(model, PROMPT, 17).map(*place, kind="forward")
    torch.testing.assert_close(seen[0] - plain, 2.0 * expected)


def test_bad_patching(bridge):
    model = bridge("gpt2")
    uneven = bwlens.reversed_attention(model, [[5, 9, 30], [12, 33, 6, 21]], [17, 23])
    for settings, message in [
        ({}, "3 to 4 tokens; a mean needs one length"),
        ({"segments": [["a"] * 3, ["a"] * 4]}, "segments and onto go together"),
        ({"segments": [["a"] * 3, ["a"] * 5], "onto": ["a"]}, r"names \[3, 5\] tokens"),
    ]:
        patching = bwlens.attention_patching(model, uneven, 1.0, **settings)
        with pytest.raises(ValueError, match=message), patching:
            pass
    maps = maps_of(model)
    with (
        pytest.raises(ValueError, match=r"has \(3, 3\) queries and keys, but the maps .*\(5, 5\)"),
        bwlens.attention_patching(model, maps, 1.0),
    ):
        logits(model, PROMPT[:, :3])
    with pytest.raises(ValueError, match="alpha is nan"), bwlens.attention_patching(
        model, maps, float("nan")
    ):  # fmt: skip
        pass
    with pytest.raises(KeyError, match="head 9"), bwlens.attention_patching(
        model, maps, 1.0, heads=[(0, 9)]
    ):  # fmt: skip
        pass
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "qwen3_5_full_attention"])
def test_without_heads_is_w_o_without_their_rows(name, boot):
    model, heads = boot(name), [(0, 1), (1, 0), (1, 3)]
    weights = {layer: bwlens.capture(model, PROMPT, 17, "W_O", layer) for layer, _ in heads}
    with without_heads(model, heads):
        mine = logits(model)
    for layer, head in heads:
        width = weights[layer]["W_O", layer].x.shape[1] // 4
        part = slice(head * width, (head + 1) * width)
        stored = model.blocks[layer].attn.o.original_component.weight.data
        (stored if name == "gpt2" else stored.T)[part] = 0  # Conv1D keeps [d_in, d_out]
    torch.testing.assert_close(mine, logits(model))


def test_each_prompt_of_a_batch_may_lose_its_own_heads(bridge):
    model = bridge("llama")
    rows = [[(0, 1)], [(1, 2), (2, 2)], []]
    with without_heads(model, rows):
        together = logits(model, PROMPT.expand(3, -1))
    for index, heads in enumerate(rows):
        with without_heads(model, heads):
            torch.testing.assert_close(together[index], logits(model)[0])


def test_words_say_what_a_head_reads_and_writes(bridge):
    model = bridge("llama")
    frame = bwlens.head_words(model, PROMPTS[0], 17, 4, top_k=3)
    maps = bwlens.reversed_attention(model, PROMPTS[0], 17)
    assert list(zip(frame["layer"], frame["head"], strict=True)) == maps.strongest(4)
    cache = model.run_with_cache(torch.tensor(PROMPTS[:1]))[1]
    for _, row in frame.iterrows():
        r = maps.map(row["layer"], row["head"])
        assert row["R"] == pytest.approx(float(r.flatten()[r.abs().argmax()]))
        query, key = divmod(int(r.abs().argmax()), 5)
        assert [row["query"], row["key"]] == [f"t{PROMPTS[0][i]}" for i in (query, key)]
        z = cache[f"blocks.{row['layer']}.attn.hook_z"].reshape(5, 4, -1)[query, row["head"]]
        w_o = model.blocks[row["layer"]].attn.o.original_component.weight.T.reshape(4, -1, 16)
        top = bwlens.readout(model, (z @ w_o[row["head"]])[None].detach(), 3).top_ids[0]
        assert row["writes"] == [f"t{i}" if i > 3 else row["writes"][k] for k, i in enumerate(top)]
        assert len(row["asked"]) == len(row["effect"]) == 3
