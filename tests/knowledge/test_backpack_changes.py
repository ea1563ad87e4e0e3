"""Senses scaled, swapped and edited: only the named words', and undone bit for bit."""

import pytest
import torch

import bwlens
from bwlens import knowledge
from tests.knowledge.backpacks import bridge, tiny

PROMPT = "Nigeria has its capital in"


@pytest.fixture
def model():
    return bridge(tiny().double())


def vectors(model, word):
    return knowledge.sense_vectors(model, word)


def test_a_scaled_sense_is_that_word_s_alone(model):
    before, others, logits = vectors(model, " its"), vectors(model, " has"), model(PROMPT)
    change = knowledge.scale_sense(model, " its", [0, -1], 0.5)
    with change.applied(model):
        expected = before * torch.tensor([0.5, 1, 1, 0.5], dtype=before.dtype)[:, None]
        torch.testing.assert_close(vectors(model, " its"), expected)
        assert torch.equal(vectors(model, " has"), others)
        assert not torch.equal(model(PROMPT), logits)
    assert torch.equal(vectors(model, " its"), before)
    assert torch.equal(model(PROMPT), logits)


def test_swapped_senses_change_places(model):
    one, two = vectors(model, " its"), vectors(model, " has")
    with knowledge.swap_sense(model, " its", 1, " has", 3).applied(model):
        now = vectors(model, " its"), vectors(model, " has")
    torch.testing.assert_close(now[0][1], two[3])
    torch.testing.assert_close(now[1][3], one[1])
    torch.testing.assert_close(now[0][[0, 2, 3]], one[[0, 2, 3]])


def test_a_replaced_answer_is_gone_from_the_senses_and_the_new_one_in_them(model):
    W_U = model.unembed.W_U - model.unembed.W_U.mean(1, keepdim=True)
    old, new = (model.to_tokens(w, prepend_bos=False)[0, 0] for w in (" Paris", " Rome"))
    e_old, e_new = (W_U[:, t] / W_U[:, t].norm() for t in (old, new))
    own = vectors(model, " its")
    with knowledge.replace_in_senses(model, " its", " Paris", " Rome").applied(model):
        now = vectors(model, " its")
    had = own @ e_old
    torch.testing.assert_close(now, own + had[:, None] * (e_new - e_old), rtol=1e-5, atol=1e-5)


def test_changes_add_up_and_are_undone_in_any_order(model):
    before = vectors(model, " its")
    one = knowledge.scale_sense(model, " its", 0, 0.0)
    two = knowledge.scale_sense(model, " its", 1, 3.0)
    one.apply(model)
    two.apply(model)
    both = vectors(model, " its")
    one.undo(model)
    with pytest.raises(ValueError, match="there is none to undo"):
        one.undo(model)
    with pytest.raises(ValueError, match="applied to this model already"):
        two.apply(model)
    two.undo(model)
    assert torch.equal(vectors(model, " its"), before)
    with (one + two).applied(model):
        torch.testing.assert_close(vectors(model, " its"), both)
    with (-1 * (one + two)).applied(model):
        torch.testing.assert_close(vectors(model, " its"), 2 * before - both)


def test_it_is_undone_after_an_exception(model):
    before = model(PROMPT)
    with pytest.raises(KeyError), knowledge.scale_sense(model, " its", 0, 9.0).applied(model):
        raise KeyError
    assert torch.equal(model(PROMPT), before)


def test_saved_and_loaded_it_is_the_same_change(model, tmp_path):
    change = knowledge.scale_sense(model, " its", 0, 9.0)
    loaded = knowledge.SenseChange.load(change.save(tmp_path / "its.safetensors"))
    assert loaded.note == change.note
    assert loaded.keys() == change.keys()
    assert all(torch.equal(rows, loaded.added[token]) for token, rows in change.added.items())


def test_a_copy_and_a_folder_have_the_changed_senses(model, tmp_path):
    change = knowledge.scale_sense(model, " its", 0, 9.0)
    before = model(PROMPT)
    with change.applied(model):
        changed = model(PROMPT)
    torch.testing.assert_close(change.edited(model)(PROMPT), changed)
    folder = change.save_pretrained(model, tmp_path / "changed")
    assert torch.equal(model(PROMPT), before)
    loaded = bwlens.load_model(folder, dtype=torch.float64)
    torch.testing.assert_close(loaded(PROMPT), changed)


def test_changed_words_are_known_by_their_tokens(model):
    inner = model.original_model
    with (
        knowledge.scale_sense(model, " its", 0, 9.0).applied(model),
        pytest.raises(ValueError, match="give input_ids"),
    ):
        inner(inputs_embeds=torch.zeros(1, 2, 32, dtype=torch.float64))


def test_the_harness_measures_it_beside_edits_of_weights(model):
    records = bwlens.read_records("demo", limit=2)
    methods = {"none": "none", "senses": knowledge.sense_edit}
    before = model(PROMPT)
    result = bwlens.evaluate(
        model, methods, records, settings={"senses": {"strength": 50.0}}, progress=False
    )
    assert not result.failures
    rows = result.rows.set_index(["method", "case_id"])["EM"]
    assert (rows["senses"] != rows["none"]).all()
    assert torch.equal(model(PROMPT), before)


def test_bad_changes_are_refused(model):
    with pytest.raises(ValueError, match="sense 4 asked for; words have senses 0 to 3"):
        knowledge.scale_sense(model, " its", 4, 1.0)
    with pytest.raises(ValueError, match="the same token"):
        knowledge.swap_sense(model, " its", 0, " its")
    with pytest.raises(ValueError, match="the same, ' Paris'"):
        knowledge.replace_in_senses(model, " its", " Paris", " Paris")
    with pytest.raises(ValueError, match="holds nan or inf"):
        knowledge.scale_sense(model, " its", 0, float("nan"))
    other = bridge(tiny(num_senses=2).double())
    with pytest.raises(ValueError, match="made for another model"):
        knowledge.scale_sense(model, " its", 0, 0.0).apply(other)
    edit = bwlens.Edit("{} plays for", "Lionel Messi", " Paris")
    with pytest.raises(ValueError, match="target_true"):
        knowledge.sense_edit(model, edit)
