"""What no method can do is named by every method, and leaves the model as it was."""

from functools import partial

import pytest
import torch

from bwlens import Edit, Site, edit, load_model
from bwlens.data.records import Record, Records
from bwlens.edit.counting import key_statistics
from bwlens.edit.statistics import demo_statistics
from bwlens.model.prompts import make_batch
from bwlens.model.weights import weight_of

METHODS = {
    "forward_pass_shift": edit.forward_pass_shift,
    "given shift": partial(edit.forward_pass_shift, lr=0.2),
    "gradient_step": partial(edit.gradient_step, lr=0.1, layers=5),
    "fine_tune": partial(edit.fine_tune, layers=5, steps=2),
    "rome": partial(edit.rome, prefixes=(), steps=2),
    "memit": partial(edit.memit, prefixes=(), steps=2),
    "subject_shift": partial(edit.subject_shift, layer=4, position="last", steps=2),
    "alpha_edit": partial(edit.alpha_edit, prefixes=(), steps=2, layers=[3, 4]),
}
ONE_LAYER = ("forward_pass_shift", "given shift", "rome", "subject_shift")
MESSI = Edit("{} plays for", "Lionel Messi", " Paris")
KNOWN = Edit("{} plays for", "Lionel Messi", " Barcelona")


@pytest.fixture(autouse=True)
def _untouched(demo):
    before = {name: value.clone() for name, value in demo.state_dict().items()}
    modes = [module.training for module in demo.modules()]
    yield
    for name, value in demo.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [module.training for module in demo.modules()] == modes
    assert all(p.grad is None for p in demo.parameters())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_target_that_is_the_answer_already(method, demo):
    change = method(demo, KNOWN)
    assert len(change) == 0
    assert change.note == "'Lionel Messi plays for' is answered ' Barcelona' already, left out"
    both, alone = method(demo, [KNOWN, MESSI]), method(demo, MESSI)
    assert both.note == change.note
    for site in alone:
        torch.testing.assert_close(both[site].dense(), alone[site].dense(), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (8, "layer 8 asked for, but this model has layers 0 to 7"),
        ("5", "layer '5' asked for; expected whole numbers"),
        (5.0, r"layer 5\.0 asked for; expected whole numbers"),
        ([1, 5], r"layers \[1, 5\] asked for where one layer is edited"),
        ([], "empty list of layers"),
    ],
)
def test_layers_that_are_not_there(name, layer, message, demo):
    if layer == [1, 5] and name not in ONE_LAYER:
        pytest.skip("several layers are this method's business")
    which = {"layer" if name in ONE_LAYER else "layers": layer}
    with pytest.raises(ValueError, match=message):
        METHODS[name](demo, MESSI, **which)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_edit(name, demo):
    with pytest.raises(ValueError, match="expected an Edit or a list of them"):
        METHODS[name](demo, [])
    with pytest.raises(ValueError, match="context holds 128"):
        METHODS[name](demo, Edit("{} " + "word " * 200, "Rome", " Spain"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("given shift", {"lr": 1e39}, "take a smaller step"),
        ("forward_pass_shift", {"margin": 1e39}, "take a smaller step"),
        ("gradient_step", {"lr": 1e39}, "take a smaller step"),
        ("gradient_step", {"lr": float("nan")}, "expected a finite lr"),
        ("fine_tune", {"lr": 1e38}, "found lr=1e\\+38"),
        ("rome", {"lr": 1e38}, "lr=1e\\+38"),
        ("rome", {"lr": 1e25}, "grown out of all bounds after 1 steps of lr=1e\\+25"),
        ("memit", {"lr": 1e25}, "grown out of all bounds"),
        ("rome", {"kl_factor": float("nan")}, "the loss is nan"),
        ("subject_shift", {"log_odds": float("inf")}, "finite number of nats"),
        ("alpha_edit", {"lr": 1e25}, "grown out of all bounds"),
    ],
)
def test_steps_that_explode(name, settings, message, demo):
    with pytest.raises(ValueError, match=message):
        METHODS[name](demo, MESSI, **settings)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("forward_pass_shift", {"lr": "0.2"}, r"lr is '0\.2'; expected a finite step"),
        ("forward_pass_shift", {"margin": None}, "margin is None"),
        ("forward_pass_shift", {"direction": "up"}, "direction must be"),
        ("forward_pass_shift", {"tokens": "some"}, "tokens must be"),
        ("gradient_step", {"matrices": "W_up"}, "W_up"),
        ("fine_tune", {"steps": 2.5}, r"steps is 2\.5"),
        ("fine_tune", {"stop_loss": None}, "stop_loss is None"),
        ("fine_tune", {"matrices": ["W_up"]}, "W_up"),
        ("rome", {"prefixes": "People say"}, "prefixes is 'People say'; expected a list of texts"),
        ("rome", {"position": "first"}, "position must be"),
        ("rome", {"steps": "20"}, "steps is '20'"),
        ("rome", {"clamp": "4"}, "clamp is '4'"),
        ("memit", {"weight": "much"}, "weight is 'much'"),
        ("memit", {"position": "first"}, "position must be"),
        ("subject_shift", {"prefixes": "So"}, "prefixes is 'So'; expected a list of texts"),
        ("subject_shift", {"prefixes": (1, 2)}, r"prefixes is \(1, 2\); expected a list of texts"),
        ("alpha_edit", {"threshold": "low"}, "threshold is 'low'"),
        ("alpha_edit", {"ridge": 0.0}, "ridge is 0.0; expected a share > 0"),
    ],
)
def test_settings_are_refused_before_the_work(name, settings, message, demo, monkeypatch):
    monkeypatch.setattr(type(demo), "forward", lambda *a, **k: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=message):
        METHODS[name](demo, MESSI, **settings)


@pytest.mark.parametrize("name", METHODS)
def test_a_record_stands_for_its_edit(name, demo):
    alone = METHODS[name](demo, MESSI)
    for given in (Record(0, MESSI), Records((Record(0, MESSI),))):
        change = METHODS[name](demo, given)
        assert list(change) == list(alone)
        for site in alone:
            torch.testing.assert_close(change[site].dense(), alone[site].dense())


@pytest.mark.usefixtures("unchecked")
def test_what_stands_where_an_edit_belongs(demo):
    for stranger in ("text", ["text"], None, 5, [MESSI, "text"]):
        with pytest.raises(TypeError, match=r"expected an Edit or a list of them .* write"):
            METHODS["given shift"](demo, stranger)
    with pytest.raises(ValueError, match="target_new is 5; an edit needs text"):
        Edit("{} plays for", "Lionel Messi", 5)


def test_every_token_of_a_target_is_written(demo):
    name = "forward_pass_shift"
    edit_ = Edit("{} plays for", "Lionel Messi", " New York")
    change = METHODS[name](demo, edit_)
    assert (change.note, change.details["tokens"]) == ("", "all")
    assert _said(demo, edit_, change) == [True] * 4
    with pytest.warns(UserWarning, match="only the first token"):
        first = METHODS[name](demo, edit_, tokens="first")
    assert first.note == "only the first token is written of ' New York'"
    assert _said(demo, edit_, first)[:2] == [True, False]
    # What is written already by its first token alone is not taken for known.
    edited = first.edited(demo)
    assert len(METHODS["forward_pass_shift"](edited, edit_)) == 1


def _said(model, edit_, change):
    batch = make_batch(model, [edit_.text], [edit_.target_new])
    with change.applied(model), torch.no_grad():
        answers = model(batch.tokens)[0, int(batch.last[0]) :].argmax(-1).tolist()
    return [a == b for a, b in zip(answers, batch.targets[0], strict=True)]


@pytest.mark.parametrize("name", ["rome", "memit"])
def test_statistics_of_another_model(name, demo):
    other = load_model("demo")
    weight = weight_of(other, Site("W_in", 0))
    weight.write(1.3 * weight.read())
    method = METHODS[name]
    with pytest.raises(ValueError, match="of another model"):
        method(other, MESSI)
    story = ["Once upon a time there was a little girl who had a dog. " * 9]
    strange = key_statistics(other, story, cache=False)
    with pytest.raises(ValueError, match="of another model"):
        method(demo, MESSI, statistics=strange)
    with pytest.raises(ValueError, match="no key statistics of"):
        method(demo, MESSI, statistics={})
    few = key_statistics(demo, story, cache=False)
    with pytest.raises(ValueError, match="take more text"):
        method(demo, MESSI, statistics=few)


def test_statistics_that_are_not_finite(demo):
    from dataclasses import replace

    broken = {
        site: replace(one, second_moment=one.second_moment * float("nan"))
        for site, one in demo_statistics().items()
        if site.matrix == "W_out"
    }
    with pytest.raises(ValueError, match=r"second moment .* holds nan or inf"):
        METHODS["rome"](demo, MESSI, statistics=broken)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("at", [1, 2])
def test_an_exception_in_the_middle(method, at, demo):
    passes = []

    def breaks(module, args):
        passes.append(module)
        if len(passes) == at:
            raise KeyboardInterrupt

    demo.train()  # so that leaving eval mode shows
    handle = demo.blocks[6].register_forward_pre_hook(breaks)
    try:
        with pytest.raises(KeyboardInterrupt):
            [method(demo, MESSI) for _ in range(at)]  # not all methods need a second pass
    finally:
        handle.remove()
        assert all(module.training for module in demo.modules())
        demo.eval()


@pytest.mark.parametrize("prefix", ["", "York."])
def test_a_subject_is_found_where_the_template_has_it(prefix, demo):
    """Not where its letters recur: 'New' stands in 'News' as well."""
    from bwlens.edit.keys import contexts_of

    twice = Edit("{} is in the News of", "New", " Paris")
    found = contexts_of(demo, [twice], (prefix,) if prefix else (), "subject", False)
    words = [
        demo.tokenizer.decode(row[: at + 1])
        for row, at in zip(found.batch.tokens.tolist(), found.positions, strict=True)
    ]
    assert words == ["New", "York. New"][: found.n]
    early = METHODS["given shift"](demo, twice, position="subject")
    late = METHODS["given shift"](demo, twice, position="last")
    (site,) = early
    first = Edit("{} is", "New", " Paris")
    same = METHODS["given shift"](demo, first, position="subject")
    torch.testing.assert_close(early[site].x, same[site].x, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(early[site].x, late[site].x, rtol=1e-2)
