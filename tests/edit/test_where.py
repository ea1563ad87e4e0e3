"""Where to write: the answers of paraphrases and neighbours to a key, written out by hand."""

import pytest
import torch

from bwlens import Edit, Record, Site
from bwlens.edit import key_statistics, rome, subject_shift, where
from tests import oracle, tiny

EDIT = Edit("t3 {} t9", subject="t5 t6", target_new=" t17", target_true=" t9")
RECORD = Record(0, EDIT, None, ("t50 t5 t6 t8", "t5 t6 t30 t31"), ("t3 t40 t9", "t3 t41 t42 t9"))
TEXTS = [" ".join(f"t{4 + (7 * i + 3 * j * j) % 57}" for j in range(40)) for i in range(12)]
W_OUT = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj"}


@pytest.mark.parametrize("name", sorted(W_OUT))
def test_against_products_by_hand(name, boot):
    model, hf = boot(name), tiny.hf_model(name)
    held = key_statistics(model, TEXTS, cache=False)
    result = where(model, RECORD, held, prefixes=("t20 t21",), prepend_bos=False)
    seen: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(oracle.layers(hf)):
        module = block.get_submodule(W_OUT[name])
        module.register_forward_pre_hook(
            lambda module, args, layer=layer: seen.update({layer: args[0][0].detach()})
        )

    def keys(text, layer):
        hf(torch.tensor([[int(word[1:]) for word in text.split()]]))
        return seen[layer]

    for layer in range(tiny.LAYERS):
        for j, (own, para) in enumerate([((2, 4), (2, 1)), ((3, 5), (3, 3))]):
            k = keys("t3 t5 t6 t9", layer)[own[0]] + keys("t20 t21 t3 t5 t6 t9", layer)[own[1]]
            k = (k / 2).double()
            u = torch.linalg.solve(held[Site("W_out", layer)].second_moment.double(), k)
            u = u / (u @ k)
            near = [keys(text, layer).double() @ u for text in RECORD.neighborhood_prompts]
            far = [
                keys(text, layer)[place].double() @ u
                for text, place in zip(RECORD.paraphrase_prompts, para, strict=True)
            ]
            row = result.frame.query(f"layer == {layer}").iloc[j]
            assert row["paraphrases"] == pytest.approx(float(sum(far) / 2), rel=2e-3, abs=1e-4)
            expected = sum(float(answers.max()) for answers in near) / 2
            assert row["neighbours"] == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_methods_write_where_it_was_measured_unless_told_otherwise(boot):
    model = boot("gpt2")
    settings = {"steps": 1, "prefixes": (), "statistics": key_statistics(model, TEXTS, cache=False)}
    best = where(model, [RECORD], settings["statistics"], layers=[2]).best()
    assert best == 2
    for method in (rome, subject_shift):
        assert list(method(model, EDIT, **settings)) == [Site("W_out", 2)]
        assert list(method(model, EDIT, layer=0, **settings)) == [Site("W_out", 0)]
        fresh = method(boot("gpt2"), EDIT, **settings)
        assert list(fresh) != [Site("W_out", 2)]


def test_of_layers_that_are_as_good_the_deepest(boot):
    model = boot("llama")
    result = where(model, RECORD, key_statistics(model, TEXTS, cache=False))
    frame = result.frame.query("position == 'last'")
    top = frame["selectivity"].max()
    good = frame[frame["selectivity"] >= top - 0.05 * abs(top)]
    assert result.best("W_out", "last") == good["layer"].max()
    with pytest.raises(ValueError, match="nothing was measured of 'W_O'"):
        result.best("W_O")
    assert result.figure().axes[0].lines


def test_records_without_prompts_are_refused(boot):
    model = boot("gpt2")
    with pytest.raises(ValueError, match="make_records"):
        where(model, Record(0, EDIT), key_statistics(model, TEXTS, cache=False))
