"""What a GPU computed is shown: nothing but `cpu` hands it to numpy."""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import bwlens
from bwlens import show
from bwlens.show import circuits
from tests.fake_lens import fake_lens


class AsOnAGPU(TorchFunctionMode):
    """Every tensor but what `cpu` gave refuses to become an array, as those on a GPU do."""

    def __init__(self):
        super().__init__()
        self.came = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.numpy, Tensor.__array__) and not any(args[0] is t for t in self.came):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        out = func(*args, **(kwargs or {}))
        self.came += [out] if func is Tensor.cpu else []
        return out


def test_the_stand_in_is_as_strict_as_a_gpu():
    with AsOnAGPU():
        assert torch.ones(2).double().cpu().numpy().sum() == 2
        with pytest.raises(TypeError, match="to numpy"):
            torch.ones(2).numpy()
        with pytest.raises(TypeError, match="to numpy"):
            torch.ones(2).cpu().double().numpy()


LENS = {
    "text": lambda lens, to: repr(lens),
    "table": lambda lens, to: lens._repr_html_(),
    "page": lambda lens, to: lens.save(to / "lens.html"),
    "rows": lambda lens, to: lens.save(to / "lens.csv"),
    "data": lambda lens, to: lens.save(to / "lens.json"),
    "picture": lambda lens, to: lens.save(to / "lens.png"),
    "report": lambda lens, to: lens.report(to / "report.html"),
    "norms": lambda lens, to: lens.figure("norms"),
    "ranks": lambda lens, to: lens.figure("target_ranks"),
    "spectrum": lambda lens, to: lens.figure("spectrum"),
    "comparison": lambda lens, to: show.compare(lens, lens)._repr_html_(),
    "changes": lambda lens, to: show.compare(lens, lens).figure(),
    "words": lambda lens, to: circuits.top_words(lens, 1, 2),
    "norms along": lambda lens, to: circuits.token_norms(lens),
    "places along": lambda lens, to: circuits.token_places(lens),
    "neurons": lambda lens, to: circuits.moved_neurons(lens),
}


@pytest.mark.parametrize("what", LENS)
def test_a_lens(what, tmp_path):
    lens = fake_lens(200, 4, 5)
    with AsOnAGPU():
        LENS[what](lens, tmp_path)


def test_heads(bridge, tmp_path):
    prompt, target = "t5 t9 t30 t41", "t17"
    maps = bwlens.reversed_attention(bridge("llama"), prompt, target)
    scores = bwlens.head_scores(bridge("llama"), prompt, target)
    lens = bwlens.backward_lens(bridge("llama"), prompt, target, attention=True, neurons=2)
    with AsOnAGPU():
        for found in (maps, scores):
            show.head_table(found)._repr_html_()
        show.head_maps(maps)
        show.head_maps_figure(maps)
        show.head_scores_figure(scores)
        lens.report(tmp_path / "report.html")
        lens.neurons()
        scores.frame()


def test_a_change(bridge, tmp_path):
    model = bridge("llama")
    grads = bwlens.capture(model, "t5 t9 t30 t41", "t17", ("W_in", "W_out"))
    change = bwlens.WeightChange({site: -0.1 * rows for site, rows in grads.items()})
    lens = bwlens.read_change(model, change, prompts="t5 t9 t30 t41", top_k=3)
    with AsOnAGPU():
        repr(lens)
        lens._repr_html_()
        lens.figure("norms")
        for ending in (".html", ".csv", ".json", ".png"):
            lens.save(tmp_path / f"change{ending}")
        lens.by_layer()
        lens.effects()
