"""The comparison's scripts: every arm trains on the same rows, goes on when killed, is measured."""

import json

import pytest
import torch

from bwlens import demo
from bwlens.knowledge import Backpack, BackpackConfig
from tools.backpack import text
from tools.backpack.arms import ARMS, DEMOS, jobs, main
from tools.backpack.ship import ship
from tools.backpack.training import Training, learning_rate, make_model

STORIES = (demo.ROOM / "stories.txt").read_text(encoding="utf-8").split("\n\n\n")
SCALE = 1 / 12  # A trunk of width 16.


@pytest.fixture(autouse=True)
def _few_facts(monkeypatch):
    monkeypatch.setattr(text, "facts", lambda: demo.facts()[::100])


@pytest.fixture
def folder(tmp_path):
    text.prepare(tmp_path, STORIES, {0: 4})
    return tmp_path


def test_arms_differ_in_what_their_names_say():
    sizes = {
        job.name: sum(p.numel() for p in make_model(job, 5000, 0).parameters())
        for job in jobs([0], 1.0, 0.1, len(DEMOS))
    }
    assert abs(sizes["k=1, wide"] / sizes["k=16"] - 1) < 0.001
    assert abs(sizes["one store, 16 mixings, wide"] / sizes["k=16"] - 1) < 0.001
    assert sizes["one store, 16 mixings"] == sizes["k=1"] == sizes["k=1, scaled"]
    assert all(2 * sizes[name] < 6e6 for name in DEMOS)


def test_what_was_killed_goes_on_as_it_would_have(folder):
    job = next(job for job in jobs([0], SCALE, 0.1, 0) if job.name == "k=2")
    killed = Training(job, folder, 5000, 0, "cpu")
    killed.advance(4)
    killed.advance(4)
    killed.save_checkpoint()
    after = Training(job, folder, 5000, 0, "cpu")
    assert after.step == 2
    for one in (killed, after):
        torch.manual_seed(1)  # dropout
        one.advance(4)
    for name, tensor in killed.model.state_dict().items():
        assert torch.equal(tensor, after.model.state_dict()[name])
    other = jobs([0], SCALE, 0.0, 0)[2]
    with pytest.raises(ValueError, match="other settings"):
        Training(other, folder, 5000, 0, "cpu")


def test_the_step_size_rises_and_falls():
    job = jobs([0], 1.0, 0.1, 0)[0]
    rates = [learning_rate(job, step, 1000) for step in range(1000)]
    assert max(rates) == rates[job.warmup] == job.lr
    assert rates[0] < rates[50] < rates[99]
    assert rates[-1] < 0.011 * job.lr


def test_the_command_trains_arms_and_leaves_tables_and_weights(tmp_path):
    prose = tmp_path / "stories.json"
    prose.write_text(json.dumps(STORIES), encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["--prose", str(prose), "--out", str(out), "--steps", "1", "--seeds", "1"]
    arguments += ["--scale", "0.125", "--demos", "1"]
    demo_name = next(iter(DEMOS))
    with pytest.raises(SystemExit):
        main([*arguments, "--arms", "k=3"])
    assert main([*arguments, "--arms", demo_name]) == 0
    assert (out / "results.csv").read_text().count("\n") == 2
    (weights,) = out.glob("*.safetensors")
    shipped = ship(weights, tmp_path / "shipped")
    model = Backpack.from_pretrained(shipped)
    assert isinstance(model.config, BackpackConfig)
    assert model.config.num_senses == 16
    assert set(ARMS) >= {"transformer", "k=1", "k=16"}
