"""The harness: what it measures equals a slow loop; the model is as before; runs can be resumed."""

import json
import math
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from bwlens.data.prose import read_prose
from bwlens.data.records import Record, Records, read_records
from bwlens.edit import WeightChange, key_statistics
from bwlens.evaluation import harness, measuring, metrics
from bwlens.evaluation.evaluation import COLUMNS, MEASURED, Evaluation
from bwlens.evaluation.generation import Writer
from bwlens.evaluation.harness import Harness, evaluate
from bwlens.evaluation.measuring import Options
from bwlens.evaluation.methods import editing_methods, methods_of, with_statistics
from bwlens.evaluation.prose_perplexity import prose_perplexity, prose_rows
from bwlens.evaluation.questions import answers_of, questions_of
from bwlens.evaluation.table import Table1
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.model.prompts import Edit
from tests import tiny

QUICK = {"generation_every": 0, "perplexity_every": 0, "greedy_tokens": 2, "progress": False}


def record(new=" t17", true=" t9", case_id=0):
    """A made-up record in the tiny tokenizer's words, with answers of one or more tokens."""
    return Record(
        case_id,
        Edit("t20 {} t21", "t5 t6", new, true),
        "made-up",
        paraphrase_prompts=("t8 t5 t6", "t5 t6 t22 t23 t24"),
        neighborhood_prompts=("t20 t7 t21", "t20 t10 t11 t21", "t20 t7 t21"),
        attribute_prompts=("t30 t31",),
        generation_prompts=("t5 t6 t40", "t41"),
        reference_texts=("t50 t51 t52 and t53",),
    )


def nudge(model, edit, scale=0.5, layer=1):
    """A change like any other: the same for each edit with the same words."""
    weight = model.blocks[layer].mlp
    d_mlp, d_model = model.cfg.d_mlp, model.cfg.d_model
    assert weight is not None
    generator = torch.Generator().manual_seed(len(edit.text))
    x = torch.randn(1, d_mlp, generator=generator)
    delta = scale * torch.randn(1, d_model, generator=generator)
    return WeightChange({("W_out", layer): LowRankGradient(x, delta)}, note="nudged")


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.bridge("gpt2", tokenizer)


def count_hooks(model):
    modules = [*model.modules(), *model.original_model.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# Questions and answers.


def slow_answer(model, prompt, target):
    """One prompt, one answer, one token after the other."""
    ids = model.to_tokens(prompt, truncate=False)[0].tolist()
    answer = model.to_tokens(prompt + target, truncate=False)[0].tolist()[len(ids) :]
    nll, right = [], True
    for token in answer:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), return_type="logits")[0, -1].double()
        nll.append(-float(logits.log_softmax(-1)[token]))
        right = right and int(logits.argmax()) == token
        ids.append(token)
    return sum(nll) / len(nll), right


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


@contextmanager
def tokens_read(model):
    """How many tokens each forward pass reads."""
    read = []
    handle = model.embed.register_forward_hook(lambda m, args, out: read.append(args[0].numel()))
    try:
        yield read
    finally:
        handle.remove()


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
    n = 42 if windowed else 20
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


# Methods.


def test_methods_in_any_form():
    (none,) = methods_of("none")
    assert none.function is None
    named = methods_of({"a": nudge, "b": partial(nudge, scale=2.0), "original": None})
    assert [m.name for m in named] == ["a", "b", "original"]
    assert named[1].described()["settings"] == {"scale": 2.0}
    assert named[1].described()["function"].endswith("test_harness.nudge")
    (one,) = methods_of(nudge, {"scale": 3.0})
    assert (one.name, one.settings) == ("nudge", {"scale": 3.0})
    both = methods_of(["none", nudge], {"scale": 3.0})
    assert [m.settings for m in both] == [{}, {"scale": 3.0}]
    each = methods_of({"a": nudge, "b": nudge}, {"b": {"scale": 2.0}})
    assert [m.settings for m in each] == [{}, {"scale": 2.0}]
    assert {"forward_pass_shift", "gradient_step", "fine_tune"} <= set(editing_methods())
    assert methods_of("forward_pass_shift")[0].name == "forward_pass_shift"


def test_a_file_among_the_settings_is_what_it_holds(tmp_path):
    def described(path, holds):
        path.write_bytes(holds)
        return methods_of(nudge, {"scale": path})[0].described()

    first = described(tmp_path / "a", b"one")
    assert described(tmp_path / "b", b"one") == first
    assert methods_of(nudge, {"scale": str(tmp_path / "b")})[0].described() == first
    assert described(tmp_path / "a", b"two") != first


def test_statistics_for_the_methods_that_take_some(demo):
    stories = read_prose("demo")
    first, second = (key_statistics(demo, stories[i:60], cache=False) for i in (0, 1))
    given = methods_of(["none", "rome", "forward_pass_shift", "memit"])
    chosen = with_statistics(given, first)
    assert ["statistics" in one.settings for one in chosen] == [False, True, False, True]
    # A run on disk hangs on what they hold, and on no object.
    described = chosen[1].described()
    assert json.loads(json.dumps(described)) == described
    assert with_statistics(given, dict(first))[1].described() == described
    assert with_statistics(given, second)[1].described() != described
    edit = read_records("demo")[0].edit
    few = methods_of(chosen[1], {"prefixes": (), "steps": 1})[0]
    shipped = methods_of("rome", {"prefixes": (), "steps": 1})[0]
    assert not torch.equal(*(m(demo, edit)["W_out", 2].dense() for m in (few, shipped)))
    with pytest.raises(ValueError, match="no method takes any: none, forward_pass_shift"):
        with_statistics(given[::2], first)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("nonsense", None, "no editing method 'nonsense'; there are none"),
        (nudge, {"speed": 1}, "nudge has no setting 'speed'; it has scale, layer"),
        ({"a": nudge, "b": nudge}, {"scale": 1}, "scale is none of a, b; say whose they are"),
        ("none", {"scale": 1}, "settings belong to one method"),
        ({"a": nudge, "b": nudge}, {"c": {"scale": 1}}, "c is none of a, b"),
        ({"a": nudge, "b": nudge}, {"a": {"speed": 1}}, "a has no setting 'speed'"),
        (nudge, {"speed": {}}, "nudge has no setting 'speed'"),
        ([nudge, nudge], None, "two methods have one name"),
        ([], None, "no method given"),
        (3, None, "expected an editing method"),
        ("gradient_step", None, "gradient_step needs a setting 'lr'"),
    ],
)
def test_methods_that_cannot_be(method, settings, message):
    with pytest.raises(ValueError, match=message):
        methods_of(method, settings)


# The harness.


def test_rows_equal_a_naive_loop(model):
    """A changed copy of the model for each record, one prompt and answer at a time."""
    records = [record(case_id=3), record(" t17 t18", " t9 t30", case_id=4)]
    rows = evaluate(model, nudge, records, **QUICK).rows
    assert list(rows.columns) == COLUMNS
    for asked, (_, row) in zip(records, rows.iterrows(), strict=True):
        copy = nudge(model, asked.edit).edited(model)
        new, true = asked.edit.target_new, asked.edit.target_true

        def ask(prompts, copy=copy, new=new, true=true):
            return [(*slow_answer(copy, p, new), *slow_answer(copy, p, true)) for p in prompts]

        (one,) = ask([asked.edit.text])
        assert row["ES"] == 100.0 * (one[2] > one[0])
        assert row["EM"] == pytest.approx(100 * (math.exp(-one[0]) - math.exp(-one[2])), abs=1e-3)
        assert row["efficacy"] == 100.0 * one[1]
        many = ask(asked.paraphrase_prompts)
        assert row["PS"] == np.mean([100.0 * (t > n) for n, _, t, _ in many])
        assert row["paraphrase"] == np.mean([100.0 * r for _, r, _, _ in many])
        many = ask(asked.neighborhood_prompts)
        assert row["NS"] == pytest.approx(np.mean([100.0 * (t < n) for n, _, t, _ in many]))
        gaps = [100 * (math.exp(-t) - math.exp(-n)) for n, _, t, _ in many]
        assert row["NM"] == pytest.approx(np.mean(gaps), abs=1e-3)
        assert row["neighbourhood"] == pytest.approx(np.mean([100.0 * r for *_, r in many]))
        many = ask(asked.attribute_prompts)
        assert row["AS"] == np.mean([100.0 * (t > n) for n, _, t, _ in many])
        assert (row["case_id"], row["method"], row["note"]) == (asked.case_id, "nudge", "nudged")
        assert row["norm"] == pytest.approx(nudge(model, asked.edit).norm())
        assert row["seconds"] > 0


def test_the_model_is_left_as_it_was(boot, monkeypatch):
    model = boot("gpt2")
    model.train()
    modes = [module.training for module in model.modules()]
    before, luck = state(model), torch.random.get_rng_state()
    found = evaluate(
        model, ["none", nudge], [record()], perplexity_text=["t5 t6 t7 t8 t9 t10 t11 t12 t13 t14"],
        generation_tokens=8, progress=False,
    )  # fmt: skip
    assert_same_state(model, before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), luck)
    assert all(p.grad is None for p in model.parameters())
    row = found["nudge"].rows.iloc[0]
    assert row[["GE", "perplexity", "greedy", "greedy_paraphrase"]].notna().all()
    assert found["none"].rows.iloc[0]["perplexity"] != row["perplexity"]
    assert math.isnan(found["none"].rows.iloc[0]["seconds"])

    def breaks(*args):
        raise ValueError("in the midst of it")

    monkeypatch.setattr(measuring, "answers_of", breaks)
    with pytest.raises(
        ValueError, match=r"nudge cannot run here.* each of the first 1 records.*midst"
    ):
        evaluate(model, nudge, [record()], **QUICK)
    assert_same_state(model, before)


def test_a_step_too_large_is_said(model):
    before = state(model)
    with pytest.raises(ValueError, match="take a smaller step"):
        evaluate(model, partial(nudge, scale=1e38), [record()], **QUICK)
    assert_same_state(model, before)


def test_bos_is_handed_on_to_methods_that_know_it(model):
    told = []

    def knows(model, edit, *, prepend_bos=None):
        told.append(prepend_bos)
        return WeightChange()

    for bos in (None, False, True):
        evaluate(model, {"knows": knows, "nudge": nudge}, [record()], prepend_bos=bos, **QUICK)
    assert told == [None, False, True]


def test_every_so_many_records(model):
    records = [record(case_id=i) for i in range(5)]
    rows = evaluate(
        model, "none", records, perplexity_text=["t5 t6 t7 t8 t9 t10 t11 t12 t13 t14"],
        generation_every=2, generation_tokens=6, perplexity_every=3, greedy_tokens=0,
        progress=False,
    ).rows  # fmt: skip
    assert rows["GE"].notna().tolist() == [True, False, True, False, True]
    assert rows["perplexity"].notna().tolist() == [True, False, False, True, False]
    assert rows["greedy"].isna().all()


def test_one_bad_record_does_not_stop_it(model):
    def fussy(model, edit):
        if edit.target_new == " t18":
            raise ValueError("not this one")
        return nudge(model, edit)

    records = [record(), record(" t18"), record()]
    found = evaluate(model, {"fussy": fussy, "none": None}, records, **QUICK)
    assert found.rows[["item", "method"]].to_numpy().tolist() == [
        [0, "fussy"], [0, "none"], [1, "none"], [2, "fussy"], [2, "none"],
    ]  # fmt: skip
    (failure,) = found.failures
    assert (failure.item, failure.message) == (1, "fussy: not this one")
    assert "1 failures" in repr(found)


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
@pytest.mark.usefixtures("small_parts")
def test_a_method_that_cannot_run_takes_itself_out(tmp_path, model, error):
    records = [record(case_id=i) for i in range(5)]
    calls = []

    def refuses(model, edit):
        calls.append(edit)
        raise error("no statistics [of this] model")

    methods = {"none": None, "refuses": refuses, "nudge": nudge}
    expected = evaluate(model, {"none": None, "nudge": nudge}, records, **QUICK).rows
    alone = evaluate(model, methods, records, **QUICK)
    same(alone.rows, expected)
    (note,) = alone.notes
    assert note.startswith("refuses cannot run here and is left out")
    assert note.endswith(": no statistics [of this] model")
    assert [f.item for f in alone.failures] == [-1]
    table = Table1(alone)
    for text in (" ".join(table.text().split()), table._repr_html_(), table.latex()):
        assert note in text
    assert "edits failed" not in table.text()
    assert len(calls) == (1 if error is NotImplementedError else 5)
    # On disk: carried on, it is not tried again.
    out = tmp_path / "run"
    assert evaluate(model, methods, records, out=out, **QUICK).failures == alone.failures
    (out / "done" / "part-00000.json").unlink()
    calls.clear()
    again = evaluate(model, methods, records, out=out, **QUICK)
    same(again.rows, expected)
    assert (again.failures, calls) == (alone.failures, [])
    with pytest.raises(ValueError, match="refuses cannot run here"):
        evaluate(model, {"refuses": refuses}, records, **QUICK)
    work = Harness(model, methods_of(methods), records, options=Options(0, 8))
    assert work.estimate() > 0
    same(work.run(progress=False).rows.iloc[:2], expected.iloc[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_every": -1}, "expected 0 .never. or more"),
        ({"top_k": 0}, "expected 1 or more"),
        ({"speed": 3}, "unknown option 'speed'; there are generation_every"),
    ],
)
def test_options_that_cannot_be(model, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, "none", [record()], progress=False, **options)


def test_nothing_to_do_and_wrong_things(model):
    with pytest.raises(ValueError, match="no records given"):
        evaluate(model, "none", [], **QUICK)
    with pytest.raises(TypeError, match="wrong returned int; an editing method computes"):
        evaluate(model, {"wrong": lambda model, edit: 3}, [record()], **QUICK)


def test_random_methods_draw_the_same_for_a_record(model):
    def random(model, edit):
        return WeightChange({("W_out", 0): LowRankGradient(torch.rand(1, 64), torch.rand(1, 16))})

    records = [record(case_id=i) for i in range(2)]
    one = evaluate(model, random, records, **QUICK).rows
    two = evaluate(model, ["none", random], records, **QUICK)["random"].rows
    assert one["norm"].tolist() == two["norm"].tolist()
    assert one["norm"][0] != one["norm"][1]


def test_an_estimate(model):
    records = [record(case_id=i) for i in range(6)]
    work = Harness(model, methods_of(["none", nudge]), records, options=Options(5, 8))
    seconds = work.estimate()
    start = time.perf_counter()
    work.run(progress=False)
    assert seconds == pytest.approx(time.perf_counter() - start, rel=3)
    assert seconds > 0


# On disk.


def same(a, b):
    pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(harness, "PART_ROWS", 2)


@pytest.mark.usefixtures("small_parts")
def test_parts_on_disk_hold_the_same_rows(tmp_path, model):
    records = [record(case_id=i) for i in range(5)]
    methods = {"none": None, "nudge": nudge}
    whole = evaluate(model, methods, records, **QUICK)
    out = tmp_path / "run"
    same(whole.rows, evaluate(model, methods, records, out=out, **QUICK).rows)
    done = out / "done"
    assert len(list(done.glob("part-*"))) == 5  # two rows each, one of each method
    # A part without its mark is done again; nothing else is.
    (done / "part-00001.json").unlink()
    stale = {path.name: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    same(whole.rows, evaluate(model, methods, records, out=out, **QUICK).rows)
    fresh = {path.name: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    assert [name for name in fresh if fresh[name] != stale[name]] == ["part-00001.parquet"]
    meta = json.loads((out / "run.json").read_text())
    assert list(meta["settings"]["methods"]) == ["none", "nudge"]
    for changed in (
        {"methods": methods | {"nudge": partial(nudge, scale=2.0)}},
        {"records": [*records[:4], record(" t18", case_id=4)]},
        {"seed": 1},
    ):
        asked = {"methods": methods, "records": records, **QUICK, **changed}
        with pytest.raises(ValueError, match="other settings"):
            evaluate(model, out=out, **asked)


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_run_is_carried_on(tmp_path, model):
    records = [record(case_id=i) for i in range(5)]
    calls = []

    def dies(model, edit):
        calls.append(edit)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return nudge(model, edit)

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, dies, records, out=tmp_path / "run", **QUICK)
    found = evaluate(model, dies, records, out=tmp_path / "run", **QUICK)
    assert len(calls) == 4 + 3
    whole = evaluate(model, {"dies": nudge}, records, **QUICK)
    same(whole.rows, found.rows)


@pytest.mark.usefixtures("small_parts")
def test_processes_share_a_run(tmp_path, model, monkeypatch):
    records = [record(case_id=i) for i in range(5)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        found.append(evaluate(model, nudge, records, out=tmp_path / "run", **QUICK).rows)
    assert [len(rows) for rows in found] == [2, 5]
    monkeypatch.delenv("WORLD_SIZE")
    same(found[1], evaluate(model, nudge, records, **QUICK).rows)


# What was found.


def made_up(**columns):
    n = len(next(iter(columns.values())))
    rows = pd.DataFrame({name: [math.nan] * n for name in MEASURED})
    rows["item"] = rows["case_id"] = range(n)
    rows["method"], rows["note"], rows["relation"], rows["norm"] = "made-up", "", "", 0.0
    for name, values in columns.items():
        rows[name] = values
    return Evaluation(rows[COLUMNS], (), n)


def test_summary():
    found = made_up(ES=[100.0, 0.0], PS=[50.0, 50.0], NS=[100.0, 100.0], GE=[3.0, math.nan])
    table = found.summary.set_index("metric")
    assert table.loc["S", "mean"] == pytest.approx(metrics.score(50.0, 50.0, 100.0))
    assert table.loc["ES", ["mean", "low", "high", "n"]].tolist() == [50.0, 0.0, 100.0, 2]
    assert table.loc["ES", "sd"] == pytest.approx(np.std([100, 0], ddof=1))
    assert table.loc["PS", ["mean", "sd", "low", "high"]].tolist() == [50.0, 0.0, 50.0, 50.0]
    assert table.loc["GE", ["mean", "n"]].tolist() == [3.0, 1]
    assert "perplexity" not in table.index
    assert set(table["method"]) == {"made-up"}
    assert "made-up" in found._repr_html_()


def test_intervals_agree_with_a_loop_of_resamples():
    rng = np.random.default_rng(5)
    values = {name: rng.choice([0.0, 50.0, 100.0], 60, p=[0.2, 0.3, 0.5]) for name in ("ES", "PS")}
    values["NS"] = rng.uniform(40, 100, 60)
    found = made_up(**values).summary.set_index("metric")
    scores = []
    for _ in range(3000):
        drawn = rng.integers(0, 60, 60)
        scores.append(metrics.score(*(float(values[n][drawn].mean()) for n in ("ES", "PS", "NS"))))
    low, high = np.quantile(scores, (0.025, 0.975))
    assert found.loc["S", "low"] == pytest.approx(low, abs=1.5)
    assert found.loc["S", "high"] == pytest.approx(high, abs=1.5)


def test_compare_takes_pairs():
    a = made_up(ES=[100.0, 100.0, 0.0], PS=[90.0, 60.0, 30.0], NS=[80.0] * 3)
    b = made_up(ES=[100.0, 0.0, 0.0], PS=[80.0, 50.0, 20.0], NS=[80.0, 80.0, math.nan])
    table = a.compare(b).set_index("metric")
    # Each pair differs by 10, so there is no doubt about it however the records are drawn.
    assert table.loc["PS", ["difference", "low", "high"]].tolist() == pytest.approx([10.0] * 3)
    assert table.loc["ES", "difference"] == pytest.approx(100 / 3)
    assert table.loc["ES", ["low", "high", "n"]].tolist() == pytest.approx([0.0, 100.0, 3])
    assert table.loc["NS", ["difference", "n"]].tolist() == [0.0, 2]
    both = metrics.score(100.0, 75.0, 80.0) - metrics.score(50.0, 65.0, 80.0)
    assert table.loc["S", ["difference", "n"]].tolist() == pytest.approx([both, 2])
    back = b.compare(a).set_index("metric")
    assert back.loc["PS", "difference"] == pytest.approx(-10.0)


def test_compare_wants_one_method_and_the_same_records(model):
    records = [record(case_id=i) for i in range(2)]
    found = evaluate(model, ["none", nudge], records, **QUICK)
    with pytest.raises(ValueError, match="expected one method on each side, found none, nudge"):
        found.compare(found)
    assert len(found["nudge"].compare(found["none"]))
    with pytest.raises(KeyError, match="'rome' was not evaluated"):
        found["rome"]
    other = evaluate(model, nudge, [record(case_id=7)], **QUICK)
    with pytest.raises(ValueError, match="not of the same records"):
        found["none"].compare(other)


def test_the_demo_as_it_is(demo):
    records = read_records("demo").sample(4)
    assert isinstance(records, Records)
    few = read_prose("demo")[:10]
    found = evaluate(
        demo, "none", records, perplexity_text=few, generation_tokens=12, progress=False
    )
    table = found.summary.set_index("metric")["mean"]
    # It knows its facts, and does not say the new answers.
    assert table["ES"] == 0
    assert table["NS"] == 100
    assert table["efficacy"] == 0
    assert table["neighbourhood"] == 100
    assert table["greedy"] == 0
    assert 20 < table["perplexity"] < 500
    assert table["GE"] > 0


def test_evaluations_made_apart_stand_beside_each_other(model):
    records = [record(case_id=i) for i in range(3)]
    both = evaluate(model, {"none": None, "nudge": nudge}, records, **QUICK)
    apart = [
        evaluate(model, {"none": None}, records, **QUICK),
        evaluate(model, {"nudge": nudge}, records, **QUICK),
    ]
    joined = Evaluation.joined(apart)
    order = ["method", "item"]
    same(
        joined.rows.sort_values(order, ignore_index=True),
        both.rows.sort_values(order, ignore_index=True),
    )
    assert joined.methods == ["none", "nudge"]
    assert joined.n_records == 3
    with pytest.raises(ValueError, match="'none' is in two"):
        Evaluation.joined([*apart, apart[0]])
    others = evaluate(model, {"other": nudge}, [record(case_id=7)] * 3, **QUICK)
    with pytest.raises(ValueError, match="not of the same records"):
        Evaluation.joined([*apart, others])
