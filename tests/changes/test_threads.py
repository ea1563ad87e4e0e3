"""Two threads on one model: each gives what it gives alone, or is refused."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch

import bwlens
from bwlens.edit import forward_pass_shift, gradient_step
from bwlens.model.passes import Addition, run
from bwlens.model.prompts import Edit
from bwlens.model.replay import Replay
from bwlens.model.sites import find_taps

EDIT = Edit("{} t9 t30 t41", subject="t5", target_new=" t17")
TOKENS = torch.tensor([[5, 9, 30, 41]])


def at_once(*works):
    """The works' results, all begun together, each in a thread of its own."""
    barrier = Barrier(len(works))

    def begun(work):
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(begun, work) for work in works]]


def assert_same_parts(found, expected):
    assert set(found) == set(expected)
    for site, part in expected.items():
        assert torch.equal(found[site].dense(), part.dense()), site


def test_editing_and_capturing_at_once_gives_what_each_gives_alone(boot):
    model = boot("llama")
    edit = EDIT
    works = [
        lambda: gradient_step(model, edit, lr=0.05, steps=4),
        lambda: bwlens.capture(model, TOKENS, 17),
        lambda: forward_pass_shift(model, edit, layer=1),
        lambda: bwlens.capture(model, TOKENS, 9),
    ]
    alone = [work() for work in works]
    for _ in range(3):
        for found, expected in zip(at_once(*works), alone, strict=True):
            assert_same_parts(found, expected)


def test_a_model_changed_for_one_thread_is_refused_to_another(boot):
    model = boot("gpt2")
    change = gradient_step(model, EDIT, lr=0.05)
    before = bwlens.capture(model, TOKENS, 17)
    with ThreadPoolExecutor(1) as pool:
        with change.applied(model):
            own = bwlens.capture(model, TOKENS, 17)
            for work in (
                lambda: bwlens.capture(model, TOKENS, 17),
                lambda: (2 * change).apply(model),
                lambda: (2 * change).applied(model).__enter__(),
            ):
                with pytest.raises(RuntimeError, match=r"another thread .*change.apply\(model\)"):
                    pool.submit(work).result()
            assert not torch.equal(own["W_out", 1].delta, before["W_out", 1].delta)
        assert_same_parts(pool.submit(bwlens.capture, model, TOKENS, 17).result(), before)
        change.apply(model)
        assert_same_parts(pool.submit(bwlens.capture, model, TOKENS, 17).result(), own)
        change.undo(model)


@pytest.mark.parametrize("way", ["adding", "giving", "only some positions"])
def test_a_pass_does_not_touch_what_another_thread_computes(way, boot):
    """Another thread runs the model by itself, in the midst of a pass of ours."""
    model = boot("gpt2")
    (tap,) = find_taps(model, "W_out", 2)
    inside, done = Event(), Event()

    def waiting(x):
        inside.set()
        assert done.wait(30)
        # No constant: a layer norm takes that out again.
        return torch.linspace(0, 1, model.cfg.d_model).expand(*x.shape[:2], -1)

    expected = model(TOKENS).detach()
    blocks = list(model.blocks)
    kept = run(model, TOKENS, keeping=blocks).left
    addition = Addition(tap.z, waiting, tap.x)
    options = {
        "adding": {},
        "giving": {"giving": dict.fromkeys(blocks[:2], kept[blocks[1]])},
        "only some positions": {"positions": torch.tensor([1])},
    }[way]
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(run, model, TOKENS, additions=[addition], **options)
        assert inside.wait(30)
        theirs = model(TOKENS).detach()
        done.set()
        moved = ours.result().logits
    assert torch.equal(theirs, expected)
    assert not torch.allclose(moved, expected[:, 1:2] if "some" in way else expected)


def test_replays_of_two_threads_do_not_mix(boot):
    model = boot("llama")
    rows = [torch.tensor([5, 9, 30, 41]), torch.tensor([7, 8, 13])]
    alone = [Replay(model, row, [1, 2]).logits for row in rows]
    for found, expected in zip(
        at_once(*[lambda row=row: Replay(model, row, [1, 2]).logits for row in rows]),
        alone,
        strict=True,
    ):
        assert torch.equal(found, expected)
