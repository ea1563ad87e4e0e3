"""The smallest step of each method, against the methods themselves and changes of the weights."""

import math

import numpy as np
import pytest
import torch

from bwlens import Edit
from bwlens.data.prose import read_prose
from bwlens.edit import fine_tune, forward_pass_shift, gradient_step
from bwlens.evaluation.prose_perplexity import prose_perplexity, prose_rows
from bwlens.experiments._step_sizes import METHODS, step_sizes
from bwlens.model.prompts import make_batch
from tests import tiny

EDITS = [
    Edit("t7 {} t9", "t5 t6", " t20"),
    Edit("{} t30 t31 t32", "t8", " t21 t22"),
    Edit("t11 t12 {}", "t5 t33", " t40"),
]
WITHIN = 1.1
HOOKED = pytest.mark.skipif(not tiny.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")


pytestmark = pytest.mark.filterwarnings("ignore:only the first token")  # asked for in here


@pytest.fixture
def text(tmp_path):
    lines = ["t4 t5 t6 t7 t8 t9 t10 t11 t12 t13 t14", "t30 t31 t32 t33 t34 t35 t36 t37 t38"]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))
    return str(path)


def change_of(method, model, edit, layer, step):
    if method == "SGD":
        return gradient_step(model, edit, lr=step, layers=layer)
    if method == "Adam":
        return fine_tune(model, edit, layers=layer, lr=step, steps=1)
    return forward_pass_shift(model, edit, layer=layer, lr=step, tokens="first")


def answers_target(model, edit):
    batch = make_batch(model, edit.text, edit.target_new)
    with torch.no_grad():
        logits = model(batch.tokens[:, : int(batch.prompt_lengths[0])])[0, -1]
    return int(logits.argmax()) == batch.targets[0][0]


def check(model, text):
    result = step_sizes(model, EDITS, layers=[0, 1], text=text, progress=False)
    assert len(result.rows) == len(EDITS) * 2 * len(METHODS)
    sentences = prose_rows(model, read_prose(text))
    before = prose_perplexity(model, sentences)
    n_flipped = 0
    for row in result.rows.to_dict("records"):
        edit, layer, step = EDITS[row["item"]], row["layer"], row["step"]
        assert row["perplexity_before"] == pytest.approx(before, rel=1e-4)
        if not row["flipped"]:
            assert math.isnan(step)
            continue
        n_flipped += 1
        # A hair more and a little less than the step: rounding must not decide.
        more = change_of(row["method"], model, edit, layer, 1.001 * step)
        less = change_of(row["method"], model, edit, layer, step / WITHIN / 1.001)
        with more.applied(model):
            assert answers_target(model, edit)
        with less.applied(model):
            assert not answers_target(model, edit)
        change = change_of(row["method"], model, edit, layer, step)
        assert row["norm"] == pytest.approx(change.norm(), rel=1e-3)
        with change.applied(model):
            found = prose_perplexity(model, sentences)
        assert row["perplexity"] == pytest.approx(found, rel=1e-3)
    # A norm after the MLP (Gemma 2) bounds what a step can do.
    assert n_flipped >= 4


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_against_the_methods_themselves(name, bridge, text):
    check(bridge(name), text)


@HOOKED
def test_of_a_hooked_transformer(tokenizer, text):
    check(tiny.hooked_transformer("gpt2", tokenizer=tokenizer), text)


def test_what_is_answered_already_has_no_step(bridge):
    model = bridge("gpt2")
    with torch.no_grad():
        answer = int(model(model.to_tokens(EDITS[0].text))[0, -1].argmax())
    known = Edit(EDITS[0].prompt, EDITS[0].subject, f" t{answer}")
    result = step_sizes(model, [known, EDITS[2]], layers=[1], text=None, progress=False)
    of_known = result.rows[result.rows["item"] == 0]
    assert of_known[["flipped", "step", "norm", "perplexity"]].isna().all(axis=None)
    flipped = result.summary[result.summary["quantity"] == "flipped"]
    assert (flipped["n"] == 1).all()


def test_batch_as_one_by_one(bridge):
    model = bridge("llama")
    together = step_sizes(model, EDITS, layers=[1], text=None, progress=False).rows
    for item, edit in enumerate(EDITS):
        alone = step_sizes(model, [edit], layers=[1], text=None, progress=False).rows
        mine = together[together["item"] == item]
        # A step that is right at the edge may fall to the next of the bisection.
        np.testing.assert_allclose(mine["step"], alone["step"], rtol=WITHIN - 1)


def test_figure_and_settings(bridge, text):
    model = bridge("gpt2")
    result = step_sizes(model, EDITS, layers=[1], text=text, progress=False)
    assert len(result.figure().axes) == 3
    plain = step_sizes(model, EDITS, layers=[1], text=None, progress=False)
    assert len(plain.figure().axes) == 2
    with pytest.raises(ValueError, match="within"):
        step_sizes(model, EDITS, within=1.0)
    with pytest.raises(ValueError, match="sentences"):
        step_sizes(model, EDITS, sentences=0)
    with pytest.raises(NotImplementedError, match="mixture of experts"):
        step_sizes(bridge("mixtral"), EDITS)
