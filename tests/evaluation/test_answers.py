"""Answers, texts and perplexity equal one prompt at a time."""

import math
from types import SimpleNamespace

import pytest
import torch

from bwlens.data.prose import read_prose
from bwlens.data.records import Record
from bwlens.evaluation.generation import Writer
from bwlens.evaluation.harness import evaluate
from bwlens.evaluation.prose_perplexity import prose_perplexity, prose_rows
from bwlens.evaluation.questions import answers_of, questions_of
from bwlens.model.prompts import Edit
from tests import tiny
from tests.evaluation.made_up import QUICK, count_hooks, record, slow_answer, tokens_read

# Questions and answers.


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
@pytest.mark.parametrize(
    ("targets", "batch_tokens"),
    [
        ((" t17", " t9"), 4096),
        ((" t17 t18 t19", " t9"), 11),
        ((" t17", " t17 t9"), 4096),
    ],
)
def test_answers_equal_one_prompt_at_a_time(bridge, name, targets, batch_tokens):
    model, asked = bridge(name), record(*targets)
    found = answers_of(model, questions_of(model, asked), batch_tokens)
    prompts = {
        "rewrite": (asked.edit.text,),
        "paraphrase": asked.paraphrase_prompts,
        "neighbourhood": asked.neighborhood_prompts,
        "attribute": asked.attribute_prompts,
    }
    assert set(found) == set(prompts)
    for kind, texts in prompts.items():
        for side, target in zip(("new", "true"), targets, strict=True):
            slow = [slow_answer(model, text, target) for text in texts]
            nll = getattr(found[kind], f"nll_{side}")
            assert nll.tolist() == pytest.approx([n for n, _ in slow], rel=1e-4, abs=1e-4)
            assert getattr(found[kind], f"right_{side}").tolist() == [r for _, r in slow]


def test_answers_of_a_hooked_transformer(tokenizer):
    if not tiny.HAS_HOOKED_TRANSFORMER:
        pytest.skip("this TransformerLens has no HookedTransformer")
    hooked, bridge = tiny.hooked_transformer("gpt2", tokenizer=tokenizer), None
    bridge = tiny.bridge("gpt2", tokenizer)
    asked = record(" t17 t18", " t9")
    one, two = (answers_of(m, questions_of(m, asked, False)) for m in (hooked, bridge))
    for kind in one:
        torch.testing.assert_close(one[kind].nll_new, two[kind].nll_new, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one[kind].nll_true, two[kind].nll_true, rtol=1e-4, atol=1e-4)
    prompts = [(5, 6, 7), (8,)]
    with tokens_read(hooked) as read:
        sampled = Writer(hooked).sampled(prompts, 9)
    assert read[-8:] == [2] * 8  # each token once
    assert sampled == Writer(bridge).sampled(prompts, 9)


def test_as_few_rows_as_possible(model):
    # Two prompts recur or begin another; one-token answers need no row of their own.
    asked = questions_of(model, record(), False)
    assert len(asked.rows) == 6
    longer = questions_of(model, record(" t17 t18", " t9"), False)
    assert len(longer.rows) == 6  # the new answer's rows hold those of the true one
    both = questions_of(model, record(" t17 t18", " t9 t10"), False)
    assert len(both.rows) == 12


def test_what_is_not_known_is_nan(model):
    asked = Record(0, Edit("t20 {}", "t5", " t17"), neighborhood_prompts=("t6",))
    row = evaluate(model, "none", [asked], **QUICK).rows.iloc[0]
    for name in ("ES", "EM", "PS", "NS", "NM", "neighbourhood", "paraphrase", "GE", "perplexity"):
        assert math.isnan(row[name]), name
    assert row["efficacy"] in (0.0, 100.0)
    blank = evaluate(model, "none", [asked], **QUICK).blank
    assert {"ES", "NS", "GE", "perplexity", "seconds"} <= set(blank)
    assert "efficacy" not in blank


def test_prompts_longer_than_the_context_are_refused(model):
    long = " ".join(["t7"] * 70)
    asked = Record(0, Edit("{} t9", long, " t17"))
    with pytest.raises(ValueError, match="context holds 64"):
        evaluate(model, "none", [asked], **QUICK)


# Writing on.


class Plain:
    """A model that keeps nothing: all of it is read again at each step."""

    def __init__(self, model):
        self._model = model
        self.embed, self.cfg, self.tokenizer = model.embed, model.cfg, model.tokenizer

    def __call__(self, *args, **kwargs):
        return self._model(*args, **kwargs)


def slow_greedy(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), return_type="logits")[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "bloom"])
def test_greedy_text_equals_a_loop(bridge, name):
    model = bridge(name)
    prompts = [(7, 20, 31), (8,), (9, 10, 11, 12, 13)]
    writer = Writer(model)
    said = [slow_greedy(model, prompt, 4) for prompt in prompts]
    for word in dict.fromkeys(words[-1] for words in said if words[-1] >= 4):  # no special ones
        for n in (3, 4):
            found = writer.greedy_contains(prompts, model.tokenizer.decode([word]), n)
            assert found == [word in words[:n] for words in said]


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_each_token_is_read_once(bridge, name):
    """With what a model without a cache says; where there is a window, longer than that."""
    model, windowed = bridge(name), getattr(tiny.CONFIGS[name](), "sliding_window", None)
    n = 42 if windowed else 8
    prompts = [(7, 20, 31), (8, 4), (9, 10, 11, 12, 13)]
    writer, before = Writer(model), count_hooks(model)
    with tokens_read(model) as read:
        found = writer.sampled(prompts, n, seed=5)
    assert read == [3 * 2] + [3] * (n - 3)
    assert count_hooks(model) == before
    assert found == Writer(Plain(model)).sampled(prompts, n, seed=5)


def test_greedy_words_are_whole(demo):
    writer = Writer(demo)
    prompt = tuple(demo.to_tokens("Lionel Messi plays for")[0].tolist())
    assert writer.greedy_contains([prompt], " Barcelona", 3) == [True]
    assert writer.greedy_contains([prompt], " Barcelona", 1) == [True]
    assert writer.greedy_contains([prompt], " Barcel", 3) == [False]
    assert writer.greedy_contains([], " x", 3) == []


def test_sampling_hangs_on_the_seed_alone(demo):
    writer = Writer(demo)
    prompts = [tuple(demo.to_tokens(t)[0].tolist()) for t in ("Once upon a time", "One day, Ann")]
    torch.manual_seed(1)
    first = writer.sampled(prompts, 20, seed=3)
    torch.manual_seed(2)
    assert writer.sampled(prompts, 20, seed=3) == first
    assert writer.sampled(prompts, 20, seed=4) != first
    assert first[0].startswith("Once upon a time")
    assert Writer(Plain(demo)).sampled(prompts, 20, seed=3) == first
    assert len(demo.to_tokens(first[0], prepend_bos=False)[0]) == pytest.approx(20, abs=2)
    # One of the most probable alone is greedy.
    greedy = slow_greedy(demo, prompts[0], 5)
    text = demo.tokenizer.decode([*prompts[0], *greedy])
    assert writer.sampled(prompts[:1], len(prompts[0]) + 5, top_k=1) == [text]


def test_draws_follow_the_probabilities(demo):
    class Loaded(Plain):
        """Says the same four words with the same probabilities, whatever it reads."""

        def __call__(self, tokens, **_):
            return torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(*tokens.shape, -1)

    model = Loaded(demo)
    model.tokenizer = SimpleNamespace(decode=lambda ids, **_: str(ids[-1]))
    drawn = Writer(model).sampled([(1,)] * 4000, 2, top_k=3)
    shares = [drawn.count(str(i)) / 4000 for i in range(4)]
    assert shares == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.03)


# Perplexity.


def test_perplexity_equals_one_sentence_at_a_time(model):
    sentences = ["t5 t6 t7 t8 t9 t10 t11 t12 t13", "t20 t21 t22 t23 t24 t25 t26 t27", "t9"]
    rows = prose_rows(model, sentences, False)
    assert len(rows) == 2
    nll = count = 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row]), return_type="logits")[0].double()
        picked = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row)[1:, None])
        nll, count = nll - float(picked.sum()), count + len(row) - 1
    expected = math.exp(nll / count)
    assert prose_perplexity(model, rows) == pytest.approx(expected, rel=1e-4)
    assert prose_perplexity(model, rows, batch_tokens=1) == pytest.approx(expected, rel=1e-4)


def test_the_papers_protocol(tmp_path, model):
    path = tmp_path / "text.txt"
    path.write_text("= Title =\n" + "\n".join(f"{i} {'word ' * 8}" for i in range(150)))
    sentences = read_prose(path)
    assert len(sentences) == 100
    assert sentences[0].startswith("0 word")
    assert len(prose_rows(model, [" ".join(["t7"] * 300)])[0]) == 64  # the context
    assert read_prose(["a" * 29, "b" * 30, "c" * 31]) == ["b" * 30, "c" * 31]
    with pytest.raises(ValueError, match="no line of 30 characters"):
        read_prose(["short", "shorter"])
    with pytest.raises(ValueError, match="no such file"):
        read_prose(tmp_path / "none.txt")


def test_the_demos_stories():
    sentences = read_prose("demo")
    assert len(sentences) == 100
    assert len(set(sentences)) == 100
    assert sum(map(len, sentences)) > 10_000
