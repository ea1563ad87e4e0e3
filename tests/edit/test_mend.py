"""MEND: the editor by hand, its edits against materialised weights, training that carries on."""

import json
from typing import Any, cast

import pytest
import torch
from torch.func import functional_call

import bwlens
from bwlens import Edit, Record, Site
from bwlens.edit import Mend, gradient_step, mend
from bwlens.edit.editor import Editor, Editors
from bwlens.edit.mend_passes import Passes, divergence, nll, prompts_of
from bwlens.evaluation.methods import Method
from bwlens.evaluation.presets import table1_methods
from bwlens.model.identity import fingerprint
from bwlens.model.sites import plain_taps
from tests import oracle, tiny

EDITS = [
    Edit("{} t9 t30 t41", subject="t5 t6", target_new=" t17 t20"),
    Edit("t50 {} t8", subject="t7", target_new=" t23"),
]
PATHS = {
    "gpt2": {"W_in": "mlp.c_fc", "W_out": "mlp.c_proj"},
    "llama": {"W_in": "mlp.up_proj", "W_out": "mlp.down_proj"},
    "gemma2": {"W_in": "mlp.up_proj", "W_out": "mlp.down_proj"},
    "opt": {"W_in": "fc1", "W_out": "fc2"},
    "gpt_neox": {"W_in": "mlp.dense_h_to_4h", "W_out": "mlp.dense_4h_to_h"},
}
TEXTS = ["t20 t21 t9 t31 t44 t12 t30 t18 t19 t20 t7", "t8 t9 t10 t11 t12 t13 t14 t15 t16 t17 t18"]
QUICK = {"rank": 4, "lr": 3e-2, "edits_per_step": 3, "held_out": 3, "check_every": 2}
QUICK |= {"locality": TEXTS, "prepend_bos": False, "progress": False}


def word(i):
    return f"t{4 + i % 57}"


def records(n=9, **fields):
    made = {"paraphrase_prompts": None, "neighborhood_prompts": None} | fields
    return [
        Record(
            i,
            Edit(f"{{}} {word(3 * i)} t30", word(7 * i), f" {word(5 * i + 1)}"),
            paraphrase_prompts=(f"t9 {word(7 * i)} t40",)
            if made["paraphrase_prompts"] is None
            else made["paraphrase_prompts"],
            neighborhood_prompts=(f"{word(7 * i + 2)} {word(3 * i)} t30",),
        )
        for i in range(n)
    ]


def untrained(model, layers=(1, 2), rank=4, rate=0.3, moved=0.0):
    """Editors as at their start, normalised somehow; `moved` away from it at random."""
    taps = plain_taps(model, ("W_in", "W_out"), layers, "")
    shapes = {tap.site: bwlens.model.weights.weight_of(model, tap.site).shape for tap in taps}
    editors, draw = Editors(shapes, rank), torch.Generator().manual_seed(1)
    rows = {
        site: [tuple(torch.randn(9, d, generator=draw) * 3 + 1 for d in shape)]
        for site, shape in shapes.items()
    }
    editors.normalise(rows)
    editors.start_at(rate)
    for name, value in editors.named_parameters():
        if not name.endswith("log_rate"):
            value.data += moved * torch.randn(value.shape, generator=draw)
    return Mend(shapes, rank, editors.state_dict(), fingerprint(model))


def dense(change):
    return {site: part.dense() for site, part in change.items()}


@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_gradient_step_at_the_start(name, boot):
    model = boot(name)
    fitted = untrained(model)
    settings = {"layers": [1, 2], "matrices": ("W_in", "W_out"), "prepend_bos": False}
    for edit in EDITS:
        expected = gradient_step(model, edit, lr=0.3, **settings)
        change = mend(model, edit, fitted=fitted, prepend_bos=False)
        assert list(change) == list(expected)
        for site, part in expected.items():
            assert change[site].n <= part.n  # rows without a gradient are left out
            torch.testing.assert_close(
                change[site].dense(), part.dense(), rtol=1e-4, atol=1e-6 * float(part.norm())
            )


def test_the_editor_by_hand():
    """Mitchell et al., section 3.2, row by row; V and U as [in, rank], [rank, out]."""
    draw = torch.Generator().manual_seed(0)
    editor = Editor(5, 3, n=2, rank=4, draws=draw)
    for value in editor.parameters():
        value.data = torch.randn(value.shape, generator=draw)
    x, delta = torch.randn(6, 5, generator=draw), torch.randn(6, 3, generator=draw)
    editor.normalise(2 * x + 1, delta - 4, 1)
    mean = torch.cat([(2 * x + 1).mean(0), (delta - 4).mean(0)])
    spread = torch.cat([(2 * x + 1).std(0, correction=0), delta.std(0, correction=0)])
    found_x, found_delta = editor(x, delta, 1)
    for i in range(6):
        row = torch.cat([x[i], delta[i]])
        z = (row - mean) / spread
        first, second = (cast(Any, layer) for layer in editor.layers)
        h = z + torch.relu(
            first.scale[1] * (first.U.T @ (first.V.T @ z) + first.b) + first.shift[1]
        )
        g = h + second.scale[1] * (second.U.T @ (second.V.T @ h) + second.b) + second.shift[1]
        out = row + (g - z) * spread
        torch.testing.assert_close(found_x[i], out[:5])
        torch.testing.assert_close(found_delta[i], -editor.log_rate[1].exp() * out[5:])


@pytest.mark.parametrize("layers", [(0, 2), (1, 2)])
@pytest.mark.parametrize("name", sorted(PATHS))
def test_losses_under_edits_against_materialised_weights(name, layers, bridge):
    """Of an unbridged copy, one row at a time; and their gradient at x~ and delta~."""
    model, hf = bridge(name), tiny.hf_model(name)
    taps = plain_taps(model, ("W_in", "W_out"), layers, "")
    passes = Passes(model, taps)
    prompts = [p for e in EDITS for p in prompts_of(model, [e.text], e.target_new, False)]
    rows = [prompts[1], prompts[0], *prompts_of(model, ["t9 t5 t6 t41"], " t17 t20", False)]
    owners = [1, 0, 0]
    passes.keep([*prompts, *rows], None, progress=False)
    factors = passes.gradients(prompts)
    for i, edit in enumerate(EDITS):
        grads = bwlens.capture(
            model, edit.text, edit.target_new, ("W_in", "W_out"), list(layers), prepend_bos=False
        )
        for site, part in grads.items():
            x, delta = (side[i, : part.n] for side in factors[site])
            torch.testing.assert_close(x.T @ delta, part.dense(), rtol=1e-4, atol=1e-6)
    draw = torch.Generator().manual_seed(0)
    edits = {
        site: tuple((torch.randn(s.shape, generator=draw) / 8).requires_grad_() for s in pair)
        for site, pair in factors.items()
    }
    leaves = [side for pair in edits.values() for side in pair]
    losses = nll(passes.logits(rows, edits, owners), rows)
    slopes = torch.autograd.grad(losses.square().sum(), leaves)

    total = torch.zeros(())
    names = {id(p): key for key, p in hf.named_parameters()}
    for row, owner, loss in zip(rows, owners, losses, strict=True):
        weights = {}
        for site, (x, delta) in edits.items():
            own = oracle.layers(hf)[site.layer].get_submodule(PATHS[name][site.matrix]).weight
            added = x[owner].T @ delta[owner]
            weights[names[id(own)]] = own.detach() + (added if name == "gpt2" else added.T)
        logits = functional_call(hf, weights, (torch.tensor([row.ids]),)).logits[0]
        terms = [-logits[row.last + k].log_softmax(-1)[t] for k, t in enumerate(row.target)]
        expected = sum(terms) / len(terms)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        total = total + expected.square()
    for slope, expected in zip(slopes, torch.autograd.grad(total, leaves), strict=True):
        assert (slope - expected).norm() <= 1e-3 * expected.norm().clamp_min(1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "hooked gpt2"])
def test_fitting_lowers_the_loss_and_leaves_the_model(kind, boot, tokenizer):
    if kind.startswith("hooked") and not tiny.HAS_HOOKED_TRANSFORMER:
        pytest.skip("TransformerLens 4 has the bridge only")
    hooked = kind.startswith("hooked")
    model = tiny.hooked_transformer("gpt2", tokenizer=tokenizer) if hooked else boot(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {**QUICK, "check_every": 8, "held_out": records(4)}
    fitted = Mend.fit(model, records(4), steps=8, edit_weight=1.0, **settings)
    first, last = [check["loss"] for check in fitted.history]
    assert last < 0.99 * first
    assert fitted.layers == [0, 1, 2]
    change = mend(model, EDITS[0], fitted=fitted, prepend_bos=False)
    assert [part.n for part in change.values()] == [part.n for part in change.compress().values()]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with change.applied(model):
        pass
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_frozen_parameters_and_layers_counted_from_the_end(boot):
    model = boot("llama")
    settings = {**QUICK, "steps": 2, "neighbours": 0.5}
    plain = Mend.fit(model, records(), layers=[1, 2], **settings)
    frozen = boot("llama")
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    again = Mend.fit(frozen, records(), layers=[-1, -2], **settings)
    assert again.history == plain.history
    texts_alone = Mend.fit(model, records(), layers=[1, 2], **{**settings, "neighbours": 0.0})
    assert texts_alone.history != plain.history


def test_several_edits_and_files(boot, tmp_path):
    model = boot("llama")
    fitted = untrained(model, moved=0.05)
    both = mend(model, EDITS, fitted=fitted, prepend_bos=False)
    each = [mend(model, edit, fitted=fitted, prepend_bos=False) for edit in EDITS]
    for site, part in (each[0] + each[1]).items():
        torch.testing.assert_close(both[site].dense(), part.dense(), rtol=1e-4, atol=1e-5)
    path = fitted.save(tmp_path / "mend.safetensors")
    for again in (Mend.load(path), path, str(path)):
        change = mend(model, EDITS, fitted=again, prepend_bos=False)
        assert all(torch.equal(part, dense(change)[site]) for site, part in dense(both).items())
    again = Mend.load(path)
    assert (again.shapes, again.rank, again.layers) == (fitted.shapes, 4, [1, 2])
    assert repr(again) == repr(fitted)
    # Rows of an evaluation hang on the weights themselves.
    same, other = untrained(model, moved=0.05), untrained(model, moved=0.1)
    said = [
        json.dumps(Method("mend", mend, {"fitted": one}).described())
        for one in (fitted, again, same, other)
    ]
    assert said[0] == said[1] == said[2] != said[3]


def test_a_known_edit_is_left_out(bridge):
    model = bridge("llama")
    answer = model("t5 t6 t9", prepend_bos=False)[0, -1].argmax()
    known = Edit("{} t9", "t5 t6", f" {model.tokenizer.decode([answer])}")
    fitted = untrained(model)
    change = mend(model, known, fitted=fitted, prepend_bos=False)
    assert len(change) == 0
    assert "already, left out" in change.note
    both = mend(model, [known, EDITS[1]], fitted=fitted, prepend_bos=False)
    assert both.note == change.note
    assert dense(both).keys() == dense(mend(model, EDITS[1], fitted=fitted)).keys()


class Stopped(Exception):
    pass


EIGHT = {**QUICK, "layers": [1, 2], "steps": 8}


@pytest.fixture(scope="module")
def undisturbed(bridge):
    return Mend.fit(bridge("gpt2"), records(), **EIGHT)


def test_what_is_to_stay_is_judged_by_the_words_before():
    before, after = torch.randn(2, 5, 61, generator=torch.Generator().manual_seed(0))
    p, q = (torch.distributions.Categorical(logits=one) for one in (before, after))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(divergence(before=before, after=after), expected)


@pytest.mark.parametrize("after", [0, 5])
def test_a_stopped_fit_carries_on(after, undisturbed, boot, tmp_path, monkeypatch):
    """Bit for bit as undisturbed, wherever it was stopped; the model is free at once."""
    model, settings = boot("gpt2"), EIGHT
    step, done = torch.optim.Adam.step, []

    def stopping(self, *args, **kwargs):
        if len(done) == after:
            raise Stopped
        done.append(1)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", stopping)
        with pytest.raises(Stopped):
            Mend.fit(model, records(), folder=tmp_path / "fit", **settings)
    again = Mend.fit(model, records(), folder=tmp_path / "fit", **settings)
    assert again.history == undisturbed.history
    assert all(torch.equal(again.tensors[k], v) for k, v in undisturbed.tensors.items())
    # What is finished is only read, and more steps go on from there.
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", stopping)
        assert Mend.fit(model, records(), folder=tmp_path / "fit", **settings).history
    more = Mend.fit(model, records(), folder=tmp_path / "fit", **{**settings, "steps": 10})
    assert more.history[:-1] == undisturbed.history
    assert more.history[-1]["step"] == 10
    with pytest.raises(ValueError, match=r"run with other settings: lr was 0\.03, is 0\.5"):
        Mend.fit(model, records(), folder=tmp_path / "fit", **{**settings, "lr": 0.5})


def test_it_stops_early_and_keeps_the_best(boot):
    model = boot("gpt2")
    settings = {**QUICK, "lr": 1.0, "check_every": 1, "patience": 2, "layers": [1, 2]}
    fitted = Mend.fit(model, records(), steps=50, **{**settings, "held_out": records()[:2]})
    assert [check["step"] for check in fitted.history] == [0, 1, 2]
    rate = {float(v.exp()[0]) for k, v in fitted.tensors.items() if k.endswith("log_rate")}
    edits = {"layers": [1, 2], "matrices": ("W_in", "W_out"), "prepend_bos": False}
    expected = gradient_step(model, EDITS[0], lr=rate.pop(), **edits)
    change = mend(model, EDITS[0], fitted=fitted, prepend_bos=False)
    for site, part in expected.items():
        torch.testing.assert_close(change[site].dense(), part.dense(), rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_finite_ends_it(boot):
    model, settings = boot("gpt2"), {**QUICK, "lr": 1e4, "check_every": 9, "layers": [1, 2]}
    with pytest.warns(UserWarning, match="so training ends and the best so far is kept"):
        fitted = Mend.fit(model, records(), steps=50, **settings)
    assert [check["step"] for check in fitted.history] == [0]
    assert all(torch.isfinite(value).all() for value in fitted.tensors.values())


def test_another_model_or_other_layers(boot):
    model = boot("llama")
    fitted = untrained(model)
    other = tiny.bridge("llama", model.tokenizer, hf=tiny.hf_model("llama", seed=1))
    with pytest.raises(ValueError, match=r"fitted on another model, .* with fingerprint"):
        mend(other, EDITS[0], fitted=fitted)
    for layers in ([0, 1, 2], 2):
        with pytest.raises(ValueError, match=r"was fitted for layers \[1, 2\] together"):
            mend(model, EDITS[0], fitted=fitted, layers=layers)
    change = mend(model, EDITS[0], fitted=fitted, layers=[-2, -1])
    with change.applied(model):  # one edit after another, on the model that was seen to fit
        assert mend(model, EDITS[1], fitted=fitted)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        mend(model, EDITS[0], fitted=__file__)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_fitted_is_refused_before_work(boot, tmp_path):
    model = boot("gpt2")

    def refused(given, match, error=ValueError, on=model, **settings):
        with pytest.raises(error, match=match):
            Mend.fit(on, given, folder=tmp_path / "fit", **{**QUICK, **settings})
        assert not (tmp_path / "fit").exists()

    refused(records(5), "5 records to fit MEND on, too few: it needs 3 for each step beside 3 held")
    refused(records(paraphrase_prompts=()), "9 of 9 records have no paraphrase_prompts, the first")
    refused(EDITS, "expected records, found Edit", TypeError)
    refused(records(), "layer 9 asked for", layers=9)
    refused(records(), "rank is 0; expected", rank=0)
    refused(records(), "lr is -1; expected a number > 0", lr=-1)
    refused(records(), "steps is 1.5; expected", steps=1.5)
    refused(records(), "neighbours is 2; expected a share from 0 to 1", neighbours=2)
    long = Record(77, Edit("{} " + "t9 " * 90, "t5", " t6"), paraphrase_prompts=("t9",))
    refused([*records(), long], "record 77: ")
    refused(records(), "mixture of experts", NotImplementedError, on=boot("mixtral"))


def test_table_1_has_it_where_it_is_fitted(bridge):
    model = bridge("gpt2")
    assert "MEND" not in [method.name for method in table1_methods(model)]
    fitted = untrained(model)
    (method,) = [one for one in table1_methods(model, fitted) if one.name == "MEND"]
    assert list(method(model, EDITS[0], False)) == list(mend(model, EDITS[0], fitted=fitted))
    with pytest.raises(ValueError, match="mend needs a setting 'fitted'"):
        bwlens.evaluate(model, "mend", records())
    assert Site("W_in", 1) in mend(model, EDITS[0], fitted=fitted)
