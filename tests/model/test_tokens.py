"""What tokens say by themselves, and where a subject stands, for real tokenizers."""

from types import SimpleNamespace

import pytest

from bwlens.model.tokens import subject_positions, text_to_ids, token_offsets, token_texts
from tests import tiny


@pytest.fixture(scope="module")
def gpt2(gpt2_tokenizer):
    """A tiny model with GPT-2's byte-level tokenizer, which is all that is asked of it here."""
    return tiny.bridge("gpt2", gpt2_tokenizer)


def held(model, prompt, subject, **kwargs):
    """The tokens that hold a subject, as they read."""
    ids = text_to_ids(model, prompt, kwargs.get("prepend_bos"))
    where = subject_positions(model, prompt, subject, **kwargs)
    return token_texts(model.tokenizer, [ids[index] for index in where])


# What a token says.


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Lionel Messi plays", ["L", "ion", "el", " Messi", " plays"]),
        ("a\tb\n\nc  d", ["a", "\t", "b", "\n", "\n", "c", " ", " d"]),
        ("naïve café", ["na", "ïve", " café"]),
        ("日", [r"\xe6\x97", r"\xa5"]),
        (" 👩", [r" \xf0\x9f\x91", r"\xa9"]),
        (
            "“No” I’d",
            [r"\xe2\x80", r"\x9c", "No", r"\xe2\x80", r"\x9d", " I", r"\xe2\x80", r"\x99", "d"],
        ),
        ("<|endoftext|>x", ["<|endoftext|>", "x"]),
        ("", []),
    ],
    ids=repr,
)
def test_byte_level_tokens(text, tokens, gpt2):
    assert token_texts(gpt2.tokenizer, text_to_ids(gpt2, text, False)) == tokens


def test_ids_past_the_tokenizer_s_own(gpt2):
    assert token_texts(gpt2.tokenizer, [50256, 50257]) == ["<|endoftext|>", "<50257>"]


def test_every_byte_level_token_can_be_read(gpt2):
    """None shows a replacement sign, and those of whole characters join to their text."""
    texts = token_texts(gpt2.tokenizer, range(50257))
    pieces = gpt2.tokenizer.convert_ids_to_tokens(range(50257))
    own = "\u00ef\u00bf\u00bd"  # the bytes of the replacement sign itself, in byte-level letters
    for text, piece in zip(texts, pieces, strict=True):
        assert text
        assert ("\ufffd" in text) == (own in piece)
    whole = gpt2.tokenizer.decode([3666, 1438, 318], clean_up_tokenization_spaces=False)
    assert "".join(token_texts(gpt2.tokenizer, [3666, 1438, 318])) == whole == "My name is"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Once upon a time", ["<s>", " Once", " upon", " a", " time"]),
        ("a little girl", ["<s>", " a", " little", " g", "ir", "l"]),
        ("Hi\n\nLily", ["<s>", " H", "i", "\n", "\n", "L", "ily"]),
        ("é", ["<s>", " ", "é"]),
        ("日", ["<s>", " ", r"\xe6", r"\x97", r"\xa5"]),
    ],
    ids=repr,
)
def test_sentencepiece_tokens(text, tokens, stories):
    assert token_texts(stories.tokenizer, stories.ids(text)) == tokens


# Where a subject stands.


@pytest.mark.parametrize("prepend_bos", [False, True, None])
@pytest.mark.parametrize(
    ("prompt", "subject", "tokens"),
    [
        ("Lionel Messi plays for", "Lionel Messi", ["L", "ion", "el", " Messi"]),
        ("Obama grew up in", "Obama", ["Obama"]),
        ("The mother tongue of Obama", "Obama", [" Obama"]),
        ("The wife of Lionel Messi", "Lionel Messi", [" Lionel", " Messi"]),
        ("Paris", "Paris", ["Paris"]),
        ("Rome, Rome and Rome is", "Rome", [" Rome"]),
        ("Beyoncé sings", "Beyoncé", ["Bey", "on", "cé"]),
        ("In 日本 they", "日本", [r" \xe6", r"\x97", r"\xa5", r"\xe6\x9c", r"\xac"]),
        ("The man 👩 is", "👩", [r" \xf0\x9f\x91", r"\xa9"]),
        ("New  York is", "New  York", ["New", " ", " York"]),
        ("a\nb\n is", "a\nb", ["a", "\n", "b"]),
        ("Messi's team", "Messi", ["Mess", "i"]),
    ],
    ids=repr,
)
def test_subject_positions(prompt, subject, tokens, prepend_bos, gpt2):
    assert held(gpt2, prompt, subject, prepend_bos=prepend_bos) == tokens


def test_the_last_occurrence_counts(gpt2):
    prompt = "Rome, Rome and Rome is"
    assert subject_positions(gpt2, prompt, "Rome", False) == (5,)
    assert subject_positions(gpt2, prompt, "Rome", True) == (6,)
    assert subject_positions(gpt2, "Rome and then", "Rome", False) == (0, 1)


def test_part_of_a_word_is_its_token(gpt2):
    """A token that holds only part of the subject's text holds the subject, too."""
    assert held(gpt2, "The Obamas live", "Oba", prepend_bos=False) == [" Ob", "amas"]
    assert held(gpt2, "The Obamas live", "mas", prepend_bos=False) == ["amas"]


@pytest.mark.parametrize("prepend_bos", [False, True, None])
def test_subjects_in_sentencepiece(prepend_bos, stories):
    """The space put before the first word belongs to no subject."""
    model = stories.bridge
    for prompt, subject, tokens in (
        ("Lily likes", "Lily", [" Lily"]),
        ("Once Lily", "Lily", [" Lily"]),
        ("é is", "é", ["é"]),
        ("the 日 is", "日", [r"\xe6", r"\x97", r"\xa5"]),
        ("a little girl saw", "little girl", [" little", " g", "ir", "l"]),
    ):
        assert held(model, prompt, subject, prepend_bos=prepend_bos) == tokens


def test_offsets(gpt2):
    assert token_offsets(gpt2, "Obama grew  up", False) == [(0, 5), (6, 10), (10, 10), (12, 14)]
    assert token_offsets(gpt2, "Obama", True) == [(0, 0), (0, 5)]
    assert token_offsets(gpt2, "日", False) == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("prompt", "subject"), [("Obama grew", "Messi"), ("Obama grew", ""), ("Obama grew", " ")]
)
def test_a_subject_that_is_not_there(prompt, subject, gpt2):
    with pytest.raises(ValueError, match=f"the subject '{subject}' does not occur in the prompt"):
        subject_positions(gpt2, prompt, subject)


def test_tokenizers_without_offsets(gpt2):
    slow = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False))
    with pytest.raises(NotImplementedError, match="SimpleNamespace gives no character offsets; lo"):
        token_offsets(slow, "Obama", None)
    odd = SimpleNamespace(tokenizer=gpt2.tokenizer, to_tokens=lambda *a, **k: gpt2.to_tokens("x"))
    with pytest.raises(NotImplementedError, match=r"do not match .*; pass prepend_bos=False"):
        token_offsets(odd, "Obama", None)


def test_long_texts_are_not_cut(gpt2):
    """The model's context is 64 tokens; a prompt past it is refused elsewhere, never shortened."""
    assert len(text_to_ids(gpt2, " word" * 100, True)) == 101
