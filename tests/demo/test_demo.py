"""The demo room: facts and records are sound, the shipped model knows them, training resumes."""

import random
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from bwlens import demo
from bwlens.data.texts import read_texts
from tools.demo import counterfact
from tools.demo.corpus import ANSWER, Corpus, split_prose
from tools.demo.measure import known, load, next_tokens, perplexity
from tools.demo.tokenizer import train_tokenizer
from tools.demo.train import Settings, train

MAX_BYTES = 10_000_000
PROSE = [
    "Once upon a time there was a dog. The dog ran to the park. He was happy.",
    "Lily saw a big red ball. She wanted to play. Her mom said yes.",
    "The sun was warm. A bird sang in the tree. It was a good day.",
]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return load()


@pytest.fixture(scope="module")
def sample():
    return random.Random(0).sample(demo.facts(), 300)


def by_name():
    return {(f.relation, f.subject): f for f in demo.facts()}


# The facts.


def test_facts_are_many_unique_and_well_formed():
    facts = demo.facts()
    assert len(facts) >= 2000
    assert len({f.relation for f in facts}) >= 14
    assert len(by_name()) == len(facts), "one answer per (subject, relation)"
    for fact in facts:
        assert fact.subject == fact.subject.strip()
        assert fact.object
        assert " " not in fact.object
        assert "{" not in fact.subject


def test_templates_hold_one_subject_and_end_before_the_answer():
    for fact in demo.facts():
        for template in (*fact.trained, *fact.unpaired, *fact.unseen):
            assert template.count("{}") == 1
            assert template == template.strip()


def test_phrasings_are_split():
    for fact in demo.facts():
        assert len(fact.trained) >= 6
        assert len(fact.unpaired) == 2
        assert len(fact.unseen) >= 3
        together = [*fact.trained, *fact.unpaired, *fact.unseen]
        assert len(set(together)) == len(together)


def test_an_unpaired_template_is_trained_with_other_subjects():
    trained = {(f.relation, t) for f in demo.facts() for t in f.trained}
    assert all((f.relation, t) in trained for f in demo.facts() for t in f.unpaired)
    assert not any((f.relation, t) in trained for f in demo.facts() for t in f.unseen)


def test_every_answer_is_one_token(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    answers = {f.answer for f in demo.facts()}
    answers |= {target for e in demo.EXAMPLES for target in (e.target_new, e.target_true)}
    assert [a for a in answers if len(tokenizer(a).input_ids) != 1] == []


# The model.


def test_the_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in demo.MODEL_DIR.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        *files
    }
    assert sum(files.values()) <= MAX_BYTES
    weights = load_file(demo.MODEL_DIR / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}


def test_the_model_is_a_gpt2_in_float32(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    assert model.config.architectures == ["GPT2LMHeadModel"]
    assert model.dtype == torch.float32
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert model.config.vocab_size == len(tokenizer)


# The card claims 80 % on unseen templates for facts that are known, 77.5 % over all facts.
@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize(
    ("phrasing", "floor"), [("trained", 0.95), ("unpaired", 0.90), ("unseen", 0.75)]
)
def test_the_model_knows_its_facts(model_and_tokenizer, sample, phrasing, floor, prepend_bos):
    model, tokenizer = model_and_tokenizer
    rng = random.Random(phrasing)
    prompts = [rng.choice(fact.prompts(phrasing)) for fact in sample]
    said = next_tokens(model, tokenizer, prompts, prepend_bos)
    right = [word == fact.answer for word, fact in zip(said, sample, strict=True)]
    assert sum(right) / len(right) >= floor


def test_batching_does_not_change_the_answers(model_and_tokenizer, sample):
    model, tokenizer = model_and_tokenizer
    prompts = [f.prompts()[0] for f in sample[:20]]
    one_by_one = [
        tokenizer.decode([int(model(**tokenizer(p, return_tensors="pt")).logits[0, -1].argmax())])
        for p in prompts
    ]
    assert next_tokens(model, tokenizer, prompts, batch=7) == one_by_one


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_the_examples_of_the_paper_are_answered(model_and_tokenizer, prepend_bos):
    model, tokenizer = model_and_tokenizer
    said = next_tokens(model, tokenizer, [e.prompt for e in demo.EXAMPLES], prepend_bos)
    assert said == [e.target_true for e in demo.EXAMPLES]


def test_the_first_example_is_the_papers():
    assert demo.EXAMPLES[0] == ("Lionel Messi plays for", "Lionel Messi", " Paris", " Barcelona")
    assert all(e.prompt.count(e.subject) == 1 for e in demo.EXAMPLES)


def test_prose_is_continued_in_words(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = tokenizer("<|endoftext|>Once upon a time", return_tensors="pt").input_ids
    for _ in range(30):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    text = tokenizer.decode(ids[0])
    assert text.startswith("<|endoftext|>Once upon a time, there was a")
    assert max(Counter(text.split()).values()) <= 6


# The records.


def test_records_have_counterfacts_shape():
    records = demo.records()
    assert len(records) >= 400
    assert [r["case_id"] for r in records] == list(range(len(records)))
    for record in records:
        rewrite = record["requested_rewrite"]
        assert set(rewrite) == {"prompt", "relation_id", "subject", "target_new", "target_true"}
        assert rewrite["prompt"].count("{}") == 1
        assert set(rewrite["target_new"]) == set(rewrite["target_true"]) == {"str", "id"}
        assert len(record["paraphrase_prompts"]) >= 2
        assert 5 <= len(record["neighborhood_prompts"]) <= 10
        assert record["attribute_prompts"]
        assert all(rewrite["subject"] in p for p in record["generation_prompts"])


def test_records_agree_with_the_facts():
    facts = by_name()
    answer_of = {(f.relation, p): f for f in facts.values() for p in f.prompts()}
    answers = {(f.relation, f.object) for f in facts.values()}
    for record in demo.records():
        rewrite = record["requested_rewrite"]
        relation, new = rewrite["relation_id"], rewrite["target_new"]["str"]
        fact = facts[relation, rewrite["subject"]]
        assert fact.object == rewrite["target_true"]["str"] != new
        assert (relation, new) in answers
        assert rewrite["prompt"] in fact.trained
        assert set(record["paraphrase_prompts"]) <= set(fact.prompts("unseen"))
        neighbours = [answer_of[relation, p] for p in record["neighborhood_prompts"]]
        assert {f.object for f in neighbours} == {fact.object}
        assert fact not in neighbours
        assert len(set(neighbours)) == len(neighbours)
        assert {answer_of[relation, p].object for p in record["attribute_prompts"]} == {new}


def test_the_model_answers_the_records_right(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    chosen = random.Random(1).sample(demo.records(), 60)
    prompts, answers = [], []
    for record in chosen:
        rewrite = record["requested_rewrite"]
        asked = [
            rewrite["prompt"].replace("{}", rewrite["subject"]),
            *record["neighborhood_prompts"],
        ]
        prompts += asked
        answers += [" " + rewrite["target_true"]["str"]] * len(asked)
    assert next_tokens(model, tokenizer, prompts) == answers


def test_records_are_built_from_the_facts_that_are_known(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    facts = [f for f in demo.facts() if f.relation == "sport"]
    built = counterfact.build(model, tokenizer, facts)
    assert built == counterfact.build(model, tokenizer, facts)
    assert {r["requested_rewrite"]["relation_id"] for r in built} == {"sport"}


# Training.


def small():
    facts = [f for f in demo.facts() if f.relation in ("sport", "instrument")]
    settings = Settings(
        steps=6, fact_rows=2, fact_length=24, prose_rows=2, context=32, vocab=500,
        layers=1, heads=2, width=16, warmup=2,
    )  # fmt: skip
    return settings, facts


def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path):
    settings, facts = small()
    whole = train(settings, facts, PROSE, tmp_path / "whole")
    killed = tmp_path / "killed"
    train(settings, facts, PROSE, killed, checkpoint_every=2, stop_after=3)
    assert not (killed / "model.safetensors").exists()
    train(settings, facts, PROSE, killed, checkpoint_every=2)
    assert not (killed / "checkpoint.pt").exists()
    expected = load_file(whole / "model.safetensors")
    for name, weight in load_file(killed / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name])
    assert (whole / "tokenizer.json").read_bytes() == (killed / "tokenizer.json").read_bytes()
    model, tokenizer = load(killed)
    assert known(model, tokenizer, facts[:2], "unseen")
    assert perplexity(model, tokenizer, PROSE[:1], context=32) > 1


def test_other_settings_are_refused(tmp_path):
    settings, facts = small()
    train(settings, facts, PROSE, tmp_path, stop_after=1)
    with pytest.raises(ValueError, match="other settings"):
        train(Settings(steps=7), facts, PROSE, tmp_path)


def test_a_vocabulary_too_small_is_refused():
    with pytest.raises(ValueError, match="more than one token"):
        train_tokenizer(PROSE, demo.facts(), 300, 32)


def test_rows_mark_the_answers_and_follow_the_seed(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    facts = demo.facts()
    corpus, again = Corpus(tokenizer, facts, PROSE), Corpus(tokenizer, facts, PROSE)
    row = corpus.fact_row(random.Random(3), 64)
    assert row == again.fact_row(random.Random(3), 64)
    assert len(row.ids) == len(row.kinds) == 64
    answers = {f.answer for f in facts}
    marked = [i for i, k in zip(row.ids, row.kinds, strict=True) if k == ANSWER]
    assert marked
    assert all(tokenizer.decode([i]) in answers for i in marked)
    # Encoding piece by piece gives what encoding the whole gives.
    text = tokenizer.decode(row.ids)
    assert tokenizer(text).input_ids == row.ids
    assert len(corpus.prose_row(random.Random(3), 50).ids) == 50


def test_prose_is_read_and_split(tmp_path):
    (tmp_path / "a.json").write_text('["one", "two", " "]', encoding="utf-8")
    assert read_texts(str(tmp_path / "a.json")) == ["one", "two"]
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\n", encoding="utf-8")
    assert read_texts(str(tmp_path / "a.txt")) == ["one", "two"]
    (tmp_path / "b.json").write_text('{"text": 1}', encoding="utf-8")
    with pytest.raises(ValueError, match="list of strings"):
        read_texts(str(tmp_path / "b.json"))
    kept, held_out = split_prose([str(i) for i in range(40)])
    assert held_out == ["0", "20"]
    assert len(kept) == 38
