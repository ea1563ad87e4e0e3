"""Conversations as tokens, by the tokenizer's template."""

import pytest

import bwlens

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {% if m.role == 'tool' %}"
    "{{ raise_exception('no tools') }}{% endif %}{{ m.content }} <eos>{% endfor %}"
    "{% if add_generation_prompt %} t60{% endif %}"
)


@pytest.fixture
def model(boot, monkeypatch):
    model = boot("gpt2")
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    return model


def test_the_template_s_own_tokens(model):
    asked = [{"role": "user", "content": "t5 t9"}, {"role": "assistant", "content": "t7"}]
    assert bwlens.chat(model, "t5 t9").tolist() == [1, 5, 9, 2, 60]
    assert bwlens.chat(model, asked).tolist() == [1, 5, 9, 2, 7, 2, 60]
    ended = bwlens.chat(model, asked, add_generation_prompt=False)
    assert ended.tolist() == [1, 5, 9, 2, 7, 2]
    lens = bwlens.backward_lens(model, bwlens.chat(model, "t5"), "t17", prepend_bos=True)
    assert lens.token_ids == (1, 5, 2, 60)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "expected messages such as .* found \\[\\]"),
        ([{"role": "user"}], "expected messages .* found {'role': 'user'}"),
        (["t5"], "expected messages .* found 't5'"),
        ([{"role": "tool", "content": "t5"}], "does not take these messages: no tools"),
    ],
)
def test_messages_that_are_none(messages, error, model, unchecked):
    with pytest.raises(ValueError, match=error):
        bwlens.chat(model, messages)


def test_no_template(boot):
    with pytest.raises(ValueError, match="has no chat template"):
        bwlens.chat(boot("gpt2"), "t5")
