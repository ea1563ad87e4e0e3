"""Prompts and targets as tokens, and what is said of those that cannot be."""

import numpy as np
import pytest
import torch

import bwlens
from bwlens.model.prompts import make_batch, one_prompt
from bwlens.model.targets import MissingBlank
from tests import cases, tiny

# Batches.


def test_texts(bridge):
    batch = make_batch(bridge("gpt2"), ["t5 t9", "t7 t8 t13"], " t17 t23", prepend_bos=False)
    assert batch.tokens.tolist() == [[5, 9, 17, 0], [7, 8, 13, 17]]
    assert batch.mask.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.lengths.tolist() == [3, 4]
    assert batch.prompt_lengths.tolist() == [2, 3]
    assert batch.last.tolist() == [1, 2]
    assert batch.targets == ((17, 23), (17, 23))
    assert batch.others == ()
    assert (len(batch), batch.n_rows) == (2, 7)


def test_bos_is_the_model_s_own_default(bridge):
    model = bridge("gpt2")
    tokens = {
        bos: make_batch(model, "t5 t9", prepend_bos=bos).tokens for bos in (None, True, False)
    }
    assert tokens[True].tolist() == [[1, 5, 9]]
    assert tokens[False].tolist() == [[5, 9]]
    assert torch.equal(tokens[None], model.to_tokens("t5 t9"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_moved_to_the_right(side, bridge):
    tokens, mask = cases.padded(cases.PROMPTS, side)
    for dtype in (torch.long, torch.int32, torch.bool):
        batch = make_batch(bridge("gpt2"), tokens, attention_mask=mask.to(dtype))
        rows = zip(batch.tokens, batch.mask, strict=True)
        assert [row[keep].tolist() for row, keep in rows] == cases.PROMPTS
        assert not batch.tokens[~batch.mask].any()


def test_what_the_mask_leaves_out_is_not_looked_at(bridge):
    """Loss functions' -100 may stand at padding."""
    tokens, mask = torch.tensor([[5, 9, -100], [7, 8, 4]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = make_batch(bridge("gpt2"), tokens, attention_mask=mask)
    assert batch.tokens.tolist() == [[5, 9, 0], [7, 8, 4]]


def test_tokens_without_a_mask_are_taken_as_they_are(bridge):
    """A padding token may be part of a prompt, as GPT-2's is its BOS."""
    batch = make_batch(bridge("gpt2"), torch.tensor([0, 5, 0]))
    assert batch.tokens.tolist() == [[0, 5, 0]]
    assert bool(batch.mask.all())


def test_a_target_is_what_it_adds_to_its_prompt(stories):
    """Alone it would begin with a space of its own, in SentencePiece."""
    model, prompt, target = stories.bridge, "Once upon a time, there was a little", " girl"
    batch = make_batch(model, [prompt, "a"], target)
    both = stories.ids(prompt + target)
    for ids in batch.targets:
        assert [*stories.ids(prompt), *ids] == both
    assert batch.tokens[0].tolist() == both[:-1]


def test_a_target_that_merges_with_its_prompt(stories):
    """Where prompt and target share a token, the target's own tokens follow the prompt's."""
    model, prompt = stories.bridge, "Once upon a ti"
    alone = stories.ids(prompt)
    for target in ("me", "me, there was"):
        assert stories.ids(prompt + target)[: len(alone)] != alone
        with pytest.warns(MissingBlank, match="right after 'Once upon a ti': if it is a word of"):
            batch = make_batch(model, prompt, target)
        assert batch.tokens[0, : len(alone)].tolist() == alone
        assert batch.targets[0] == tuple(stories.ids(target)[1:])


# Tokens in other forms.


@pytest.mark.parametrize(
    "prompt",
    [
        torch.tensor([5, 9, 30]),
        torch.tensor([[5, 9, 30]]),
        np.array([5, 9, 30]),
        np.array([[5, 9, 30]], dtype=np.uint16),
        [5, 9, 30],
        (5, 9, 30),
        [np.int64(5), 9, 30],
        [[5, 9, 30]],
        [torch.tensor([5, 9, 30])],
    ],
    ids=str,
)
def test_one_prompt_of_tokens(prompt, bridge):
    """Whatever holds them; [1, pos], as `to_tokens` gives them, is one prompt with one target."""
    for target, ids in ((17, [17]), ([17, 23], [17, 23]), ([[17, 23]], [17, 23]), ("t17", [17])):
        batch = make_batch(bridge("gpt2"), prompt, target)
        assert batch.tokens.tolist() == [[5, 9, 30, *ids[:-1]]]
        assert batch.targets == (tuple(ids),)
    assert one_prompt(prompt).tolist() == [5, 9, 30]


def test_one_prompt_is_one(unchecked):
    assert one_prompt("t5 t9") == "t5 t9"
    for several in (TOKENS, ["t5", "t6"], [[5, 6], [7]], TOKENS.tolist()):
        with pytest.raises(ValueError, match=r"expected one prompt, .* found 2 prompts"):
            one_prompt(several)
    with pytest.raises(ValueError, match=r"expected one prompt, .* found None"):
        one_prompt(None)


def test_lists_of_tokens_may_have_any_lengths(bridge):
    batch = make_batch(bridge("gpt2"), [[5, 9], [7, 8, 13]], np.array([17, 23]))
    assert batch.tokens.tolist() == [[5, 9, 0], [7, 8, 13]]
    assert batch.targets == ((17,), (23,))


def test_a_written_bos_is_the_only_one(bridge):
    model = bridge("gpt2")
    with pytest.warns(UserWarning, match="a text begins with '<bos>' already"):
        assert make_batch(model, "<bos> t5", prepend_bos=True).tokens.tolist() == [[1, 5]]
    assert make_batch(model, "<bos> t5", prepend_bos=False).tokens.tolist() == [[1, 5]]
    assert make_batch(model, "<bos> <bos> t5", prepend_bos=False).tokens.tolist() == [[1, 1, 5]]


# Words that the tokenizer does not have.


def test_a_prompt_of_unknown_words_is_refused(bridge):
    with pytest.raises(ValueError, match=r"knows no word of prompt 1, 'The end': .* '<unk><unk>'"):
        make_batch(bridge("gpt2"), ["t5 t9", "The end"], prepend_bos=False)


def test_unknown_words_in_a_prompt_are_said(bridge):
    with pytest.warns(UserWarning, match="does not know 'Paris' in prompt 0, 't5 Paris t9'"):
        batch = make_batch(bridge("gpt2"), "t5 Paris t9", prepend_bos=False)
    assert batch.tokens.tolist() == [[5, 3, 9]]
    assert make_batch(bridge("gpt2"), "t5 <unk>", prepend_bos=False).tokens.tolist() == [[5, 3]]


def test_an_unknown_target_is_refused(bridge):
    with pytest.raises(ValueError, match=r"the target of prompt 0 is 't5 Paris', but .* 'Paris'"):
        make_batch(bridge("gpt2"), "t5", "t5 Paris")


# Blanks before targets.


@pytest.fixture
def bpe(gpt2_tokenizer):
    """A tiny model with GPT-2's tokenizer, which marks where a word begins."""
    hf = tiny.hf_model("gpt2")
    hf.resize_token_embeddings(len(gpt2_tokenizer), mean_resizing=False)
    return tiny.bridge("gpt2", gpt2_tokenizer, hf=hf)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("Lionel Messi plays for", " Paris"),
        ("Lionel Messi plays for ", "Paris"),
        ("Lionel Messi plays for", "."),
        ('He said "', "Paris"),
        ("1/", "2"),
        ("法国的首都是", "巴黎"),
    ],
)
def test_targets_that_are_right_as_they_are(prompt, target, bpe):
    make_batch(bpe, prompt, target)
    make_batch(bpe, bpe.to_tokens(prompt), target)


def test_a_missing_blank_is_warned_of_and_not_added(bpe):
    prompts, targets = ["Messi plays for", "Obama grew up in", "I like"], ["Paris", " Rome", "Bach"]
    alone = [tuple(bpe.to_tokens(text, prepend_bos=False)[0].tolist()) for text in targets]
    for given in (prompts, [bpe.to_tokens(p)[0].tolist() for p in prompts]):
        with pytest.warns(MissingBlank) as seen:
            batch = make_batch(bpe, given, targets)
        (one,) = seen
        assert "write ' Paris' (and 1 more targets so)" in str(one.message)
        assert list(batch.targets) == alone


def test_a_tokenizer_without_blanks_is_not_warned_of(bridge):
    make_batch(bridge("gpt2"), "t5", "t17")


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_a_run_warns_once_of_all_blanks(bpe):
    edits = [bwlens.Edit("{} is from", name, "Rome", "Paris") for name in ("Messi", "Obama")]
    with pytest.warns(MissingBlank) as seen:
        bwlens.experiments.gradient_rank(bpe, edits)
    (one,) = seen
    assert "write ' Rome' (and 3 more targets so)" in str(one.message)
    records = [bwlens.Record(0, edit) for edit in edits]
    with pytest.warns(MissingBlank) as seen:
        bwlens.evaluate(bpe, "none", records, perplexity_every=0, generation_every=0)
    assert [one.category for one in seen].count(MissingBlank) == 1


# Long prompts.


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_tables_of_positions_end(name, bridge):
    with pytest.raises(ValueError, match=r"prompt 1 has 65 tokens, but .* holds 64; shorten it"):
        make_batch(bridge(name), [[5], [5] * 65])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bloom"])
def test_models_without_a_table_read_on(name, boot):
    model = boot(name)
    tokens = torch.full((model.cfg.n_ctx + 3,), 5)
    with pytest.warns(UserWarning, match=f"longer than the {model.cfg.n_ctx} tokens"):
        grads = bwlens.capture(model, tokens, 17, layers=0)
    assert grads["W_out", 0].delta.shape[0] == len(tokens)


def test_a_model_that_does_not_read_on(boot, monkeypatch):
    """MPT's biases end with its context, though no table says so."""
    model = boot("llama")
    monkeypatch.setattr(model, "forward", lambda *a, **k: torch.zeros(65) + torch.zeros(64))
    with pytest.raises(ValueError, match=r"prompt 0 has 65 tokens, .* cannot read so many \(.*65"):
        make_batch(model, torch.full((65,), 5))


# Bad input. `unchecked` is a user without run-time checks of the signatures.

TOKENS = torch.tensor([[5, 9, 30], [7, 8, 13]])


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        ("", "prompt 0 is empty; give it some text"),
        (["t5", ""], "prompt 1 is empty"),
        ([], r"expected a prompt, a list of prompts or a tensor of token ids, found \[\]"),
        ([5, "t9"], r"tensor of token ids, found \[5, 't9'\]"),
        ([5, 6.5], r"tensor of token ids, found \[5, 6\.5\]"),
        ([True, False], r"tensor of token ids, found \[True, False\]"),
        ([[5, 9], []], r"tensor of token ids, found \[\[5, 9\], \[\]\]"),
        ([5, 61], "prompt 0: token id 61 is outside the vocabulary of 61"),
        ([[5], [6, 61]], "prompt 1: token id 61 is outside the vocabulary of 61"),
        (np.array([5.0, 6.0]), "expected token ids .* found torch.float64"),
        (np.array(["t5", 6], dtype=object), "tensor of token ids, found array"),
        (None, "tensor of token ids, found None"),
        (torch.empty(0, dtype=torch.long), r"found torch.int64 of shape \(0,\)"),
        (torch.tensor(5), r"expected token ids \[pos\] or \[batch, pos\], .* of shape \(\)"),
        (TOKENS[None], r"of shape \(1, 2, 3\)"),
        (TOKENS.float(), "expected token ids .* found torch.float32"),
        (TOKENS.bool(), "expected token ids .* found torch.bool"),
        (torch.tensor([5, 61]), "prompt 0: token id 61 is outside the vocabulary of 61"),
        (torch.tensor([[5, 6], [5, -1]]), "prompt 1: token id -1 is outside"),
        (torch.ones(65, dtype=torch.long), "prompt 0 has 65 tokens, but .* context holds 64; sho"),
        (["t5", "t6 " * 64], "prompt 1 has 65 tokens"),
    ],
    ids=str,
)
def test_bad_prompts(prompts, error, bridge, unchecked):
    with pytest.raises(ValueError, match=error):
        bwlens.capture(bridge("gpt2"), prompts, 17)


def test_a_target_can_be_too_long_for_the_context(bridge):
    prompt = torch.full((63,), 5)
    assert len(bwlens.capture(bridge("gpt2"), prompt, [17, 23], layers=0)) == 2
    with pytest.raises(ValueError, match="prompt 0 has 65 tokens"):
        bwlens.capture(bridge("gpt2"), prompt, [17, 23, 9])


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("", "the target of prompt 0 is empty; name a word, as in ' Paris'"),
        (" ", "the target of prompt 0 is empty"),
        ([[], [5]], "the target of prompt 0 is empty"),
        ([5], r"found 1 targets for 2 prompts; give one for all, or one each"),
        ([5, 6, 7], "found 3 targets for 2 prompts; .* several token ids is a list of its own"),
        ([5, 61], "target of prompt 1: token id 61 is outside the vocabulary of 61"),
        (-1, "target of prompt 0: token id -1 is outside"),
        ([5, 6.5], r"the target of prompt 1 is 6\.5; expected text, a token id or several"),
        ([[5], ["t6"]], r"the target of prompt 1 is \['t6'\]; expected"),
        (torch.tensor([5.0, 6.0]), r"the target of prompt 0 is tensor\(5\.\); expected"),
    ],
    ids=str,
)
def test_bad_targets(target, error, bridge, unchecked):
    with pytest.raises(ValueError, match=error):
        bwlens.capture(bridge("gpt2"), TOKENS, target)
    with pytest.raises(ValueError, match=error.replace("target", "other")):
        bwlens.capture(bridge("gpt2"), TOKENS, bwlens.LogitDifference(5, target))


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        ([[1, 0, 1], [1, 1, 1]], "attention_mask of prompt 0 has a gap; only padding on the left"),
        ([[1, 1, 1], [0, 0, 0]], "prompt 1 is empty: its attention_mask is all zero"),
        ([[1, 1], [1, 1]], r"shape \(2, 2\), the tokens \(2, 3\); they must be the same"),
        ([1, 1, 1], r"attention_mask has shape \(3,\)"),
    ],
)
def test_bad_masks(mask, error, bridge, unchecked):
    with pytest.raises(ValueError, match=error):
        bwlens.capture(bridge("gpt2"), TOKENS, 17, attention_mask=torch.tensor(mask))


def test_a_mask_goes_with_tokens(bridge):
    mask = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(
        ValueError, match="attention_mask goes with token prompts of one length; texts"
    ):
        bwlens.capture(bridge("gpt2"), "t5 t6 t7", 17, attention_mask=mask)


def test_texts_need_a_tokenizer(boot):
    model = boot("gpt2")
    model.tokenizer = None
    for prompts, target in (("t5", 17), (torch.tensor([5]), " t17")):
        with pytest.raises(ValueError, match="no tokenizer; pass tokens instead of text"):
            bwlens.capture(model, prompts, target)
    assert len(bwlens.capture(model, torch.tensor([5]), 17)) == 6


# Edits.


def test_edit():
    edit = bwlens.Edit("{} plays for", "Lionel Messi", " Paris", " Barcelona")
    assert edit.text == "Lionel Messi plays for"
    assert bwlens.Edit("{} is", subject="a {b}", target_new=" x").text == "a {b} is"
    assert edit == bwlens.Edit("{} plays for", "Lionel Messi", " Paris", " Barcelona")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            ("plays for", "Messi", " Paris"),
            "'plays for' has 0 places {} for the subject; write exa",
        ),
        (("{} and {}", "Messi", " Paris"), "has 2 places {}"),
        (("{subject} is", "Messi", " Paris"), "has 0 places"),
        (("{} plays", "", " Paris"), "subject is empty; an edit needs some text there"),
        (("{} plays", "Messi", " "), "target_new is empty"),
        (("{} plays", "Messi", " Paris", ""), "target_true is empty"),
    ],
)
def test_malformed_edits(fields, error):
    with pytest.raises(ValueError, match=error):
        bwlens.Edit(*fields)
