"""The segments of a prompt, against one character after another, on two real tokenizers."""

import json
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bwlens import Edit
from bwlens.model.prompts import make_batch
from bwlens.model.segments import SEGMENTS, segment_codes, segment_names
from tests.conftest import shared

TOKENIZERS = ("gpt2", "stories260K")


@pytest.fixture(scope="module")
def tokenizers():
    """What segments ask of a model: its tokenizer, and ids with BOS or without."""
    file, folder = shared("tokenizers/gpt2/tokenizer.json"), shared("models/stories260K")
    end = "<|endoftext|>"
    byte_level = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=end)
    return {
        "gpt2": asked(byte_level),
        "stories260K": asked(AutoTokenizer.from_pretrained(str(folder))),
    }


class Remembering:
    """A tokenizer that reads each text once: thousands of them are asked about three times."""

    is_fast = True

    def __init__(self, tokenizer):
        self._encode = lru_cache(maxsize=1)(
            lambda text: tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        )
        self.bos = tokenizer.bos_token_id

    def __call__(self, text, **options):
        assert options == {"return_offsets_mapping": True, "add_special_tokens": False}
        return self._encode(text)

    def to_tokens(self, text, prepend_bos, truncate):
        return torch.tensor([[self.bos] * bool(prepend_bos) + self._encode(text)["input_ids"]])


def asked(tokenizer):
    remembering = Remembering(tokenizer)
    return SimpleNamespace(tokenizer=remembering, to_tokens=remembering.to_tokens)


def slow_names(tokenizer, edit, bos):
    """Every character of the prompt is before, in or after the subject; tokens are what they hold.

    White space belongs to no one where it leads a token; a token of nothing else stands where it
    begins.
    """
    before, after = edit.prompt.split("{}")
    text = before + edit.subject + after
    inner = edit.subject.strip()
    lead = len(before) + len(edit.subject) - len(edit.subject.lstrip())
    label = ["before"] * lead + ["subject"] * len(inner)
    label += ["after"] * (len(text) - len(label))
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    kinds = []
    for token, (low, high) in zip(encoding.tokens(), encoding["offset_mapping"], strict=True):
        first = low if token != "\u2581" else high  # SentencePiece's mark of a space
        while first < high and text[first].isspace():
            first += 1
        held = label[first:high]
        if not held:  # a space alone: in the subject if that goes on around it
            inside = lead < low < lead + len(inner)
            held = ["subject" if inside else "before" if low <= lead else "after"]
        kinds.append("subject" if "subject" in held else held[0])
    where = [i for i, kind in enumerate(kinds) if kind == "subject"]
    for i in where:
        kinds[i] = "middle subject"
    kinds[where[0]] = "first subject"
    kinds[where[-1]] = "last subject"
    kinds[-1] = "last"
    return ("bos",) * bos + tuple(kinds)


CASES = {
    "middle": Edit("The city of {} lies in", "New York", " x"),
    "single token": Edit("The city of {} lies in", "Rome", " x"),
    "at the start": Edit("{} lies in", "Lionel Messi", " x"),
    "at the end": Edit("I saw {}", "Rome", " x"),
    "whole prompt": Edit("{}", "Lionel Messi", " x"),
    "repeated": Edit("Rome is not like {}, the city of", "Rome", " x"),
    "repeated later": Edit("{} is more than Rome, says", "Rome", " x"),
    "glued": Edit("the pre{}ish way to", "Rome", " x"),
    "spaces around": Edit("We saw {} there in", " Rome ", " x"),
    "several bytes": Edit("The town of {} lies in", "日本の町", " x"),
    "emoji": Edit("He sent {} to", "👩‍🚀 and 👩", " x"),
    "accents": Edit("{}'s naïve café is in", "Édouard Čapek", " x"),
    "quotes": Edit("“{}” was written by", "No", " x"),
    "apostrophe": Edit("{}'s capital is", "Spain", " x"),
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("case", CASES)
def test_cases_against_characters(case, name, bos, tokenizers):
    edit, model = CASES[case], tokenizers[name]
    found = segment_names(model, edit, bos)
    assert found == slow_names(model.tokenizer, edit, bos)
    assert len(found) == model.to_tokens(edit.text, bos, False).shape[1]


def test_known_answers(tokenizers):
    gpt2 = tokenizers["gpt2"]

    def named(prompt, subject, **kwargs):
        return segment_names(gpt2, Edit(prompt, subject, " x"), False, **kwargs)

    first, middle, last = "first subject", "middle subject", "last subject"
    # L|ion|el| Messi| plays| for
    assert named("{} plays for", "Lionel Messi") == (first, middle, middle, last, "after", "last")
    assert named("The city of {} lies in", "Rome") == (
        "before", "before", "before", last, "after", "last",
    )  # fmt: skip
    assert named("I saw {}", "Lionel Messi") == ("before", "before", first, "last")
    assert named("I saw {}", "Rome") == ("before", "before", "last")
    assert named("{}", "Paris") == ("last",)
    # R|ome| is| not| Rome|,| but: the first is no subject, the template says so.
    assert named("Rome is not {}, but", "Rome") == (*["before"] * 4, last, "after", "last")
    assert named("{} is in", "Rome", n_target=2)[-3:] == ("last", "target", "target")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_counterfact_edits(name, tokenizers):
    """Thousands of subjects, as the field's own data has them: every fourth."""
    file = shared("data/counterfact_requests.json")
    model = tokenizers[name]
    records = json.loads(file.read_text())[::4]
    assert len(records) > 1000
    for index, record in enumerate(records):
        asked_for = record["requested_rewrite"]
        edit = Edit(asked_for["prompt"], asked_for["subject"], " x")
        bos = bool(index % 2)
        found = segment_names(model, edit, bos)
        assert found == slow_names(model.tokenizer, edit, bos), edit


def test_codes_of_a_batch(bridge):
    model = bridge("gpt2")
    edits = [Edit("t7 {} t9", "t5 t6", " t20 t21"), Edit("{} t4", "t5", " t8")]
    for bos in (False, True):
        batch = make_batch(
            model, [e.text for e in edits], [e.target_new for e in edits], prepend_bos=bos
        )
        codes = segment_codes(model, edits, batch, bos)
        assert codes.shape == batch.tokens.shape
        assert torch.equal(codes >= 0, batch.mask)
        for row, edit in zip(codes.tolist(), edits, strict=True):
            names = [SEGMENTS[code] for code in row if code >= 0]
            n_target = names.count("target")
            assert tuple(names) == segment_names(model, edit, bos, n_target)
        assert [SEGMENTS[code] for code in codes[0].tolist()][-2:] == ["last", "target"]


def test_no_token_at_all():
    blank = type("Blank", (), {"is_fast": True, "__call__": lambda *a, **k: Nothing()})()
    model = SimpleNamespace(tokenizer=blank, to_tokens=lambda *a, **k: torch.zeros(1, 0).long())
    with pytest.raises(ValueError, match="has no token"):
        segment_names(model, Edit("{}", "x", " y"))


class Nothing(dict):
    """An encoding without tokens."""

    def __init__(self):
        super().__init__(input_ids=[], offset_mapping=[])

    def tokens(self):
        return []
