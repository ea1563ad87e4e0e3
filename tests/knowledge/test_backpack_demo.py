"""The shipped Backpack knows its facts, fits into 6 MB, and can be read and checked."""

import random

import pytest
import torch

import bwlens
from bwlens import demo, knowledge
from bwlens.model.prompts import make_batch


@pytest.fixture(scope="module")
def model():
    return bwlens.load_model("backpack-demo")


def share_right(model, facts, phrasing):
    prompts = [(prompt, f.answer) for f in facts for prompt in f.prompts(phrasing)]
    batch = make_batch(model, [prompt for prompt, _ in prompts])
    with torch.no_grad():
        logits = model(batch.tokens)[torch.arange(len(batch)), batch.last]
    said = [model.tokenizer.decode([i]) for i in logits.argmax(-1).tolist()]
    return sum(s == answer for s, (_, answer) in zip(said, prompts, strict=True)) / len(prompts)


def test_it_knows_the_facts_that_it_was_trained_on(model):
    some = random.Random(0).sample(demo.facts(), 40)
    assert share_right(model, some, "trained") >= 0.95
    assert share_right(model, some, "unseen") >= 0.6


def test_it_is_small():
    assert sum(file.stat().st_size for file in demo.BACKPACK_DIR.iterdir()) <= 6e6


def test_it_is_what_bwlens_says_of_it(model):
    report = bwlens.check(model)
    assert {finding.verdict for finding in report.findings} == {"ok"}, report


def test_its_senses_can_be_read(model):
    read = knowledge.senses(model, " dog", top_k=10)
    words = [{model.tokenizer.decode([i]) for i in row} for row in read.top_ids.tolist()]
    assert any({" cat", " dogs"} <= sense for sense in words)


def test_an_answer_comes_from_the_senses_of_subject_and_relation(model):
    one = knowledge.contributions(model, "Nigeria has its capital in", " Abuja", " Accra")
    assert set(one.frame["word"].head(4)) == {"igeria"}
    assert float(one.values.sum()) == pytest.approx(one.logit, rel=1e-4)


def test_an_answer_is_replaced_in_the_senses_of_one_word(model):
    edit = bwlens.Edit("The capital of {} is", "Nigeria", " Accra", " Abuja")
    change = knowledge.sense_edit(model, edit)

    def answer(prompt):
        return model.tokenizer.decode([int(model(prompt)[0, -1].argmax())])

    said = {"The capital of Nigeria is": " Abuja", "The parliament of Nigeria meets in": " Abuja"}
    kept = {
        "Nigeria belongs to the continent of": " Africa",
        "The official language of Nigeria is": " English",
        "The capital of Kenya is": " Nairobi",
    }
    for prompt, right in (said | kept).items():
        assert answer(prompt) == right
    with change.applied(model):
        assert [answer(prompt) for prompt in said] == [" Accra"] * 2
        for prompt, right in kept.items():
            assert answer(prompt) == right
    assert answer(edit.text) == " Abuja"


def test_the_lens_reads_it_by_what_a_step_does(model):
    lens = bwlens.backward_lens(
        model, "Lionel Messi plays for", " Paris", reading="effect", matrices="W_out"
    )
    ranks = lens.target_ranks("W_out")
    assert ranks.shape[0] == 5
