"""Key statistics: sums over tokens, kept, packed, and refused for another model."""

import json

import pytest
import torch

import bwlens.edit.keys as keys_module
from bwlens import Site
from bwlens.edit.counting import key_statistics
from bwlens.edit.statistics import (
    KeyStatistics,
    demo_statistics,
    load_statistics,
    save_statistics,
    statistics_for,
)
from tests import oracle, tiny
from tools.demo.statistics import training_rows

TEXTS = [" ".join(f"t{4 + (7 * i + 3 * j * j) % 57}" for j in range(40)) for i in range(12)]
W_OUT = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "opt": "fc2", "olmo2": "mlp.down_proj"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BWLENS_CACHE", str(tmp_path / "cache"))


def keys_of(name, ids, layer):
    """What enters W_out in an unbridged copy, one window at a time."""
    hf, held = tiny.hf_model(name), []
    module = oracle.layers(hf)[layer].get_submodule(W_OUT[name])
    module.register_forward_hook(lambda m, args, out: held.append(args[0].reshape(len(ids), -1)))
    with torch.no_grad():
        hf(torch.tensor([ids]))
    return held[0].double()


@pytest.mark.parametrize("name", sorted(W_OUT))
def test_against_a_loop(name, bridge):
    model = bridge(name)
    found = key_statistics(
        model, TEXTS, layers=[0, 2], window=17, prepend_bos=False, max_tokens=None, cache=False
    )
    assert list(found) == [Site("W_out", 0), Site("W_out", 2)]
    for site, one in found.items():
        keys = []
        for text in TEXTS:
            ids = [int(word[1:]) for word in text.split()]
            keys += [keys_of(name, ids[i : i + 17], site.layer) for i in range(0, 40, 17)]
        keys = torch.cat(keys)
        assert one.n_tokens == len(keys) == 480
        assert one.layer == site.layer
        torch.testing.assert_close(one.mean, keys.mean(0), rtol=1e-4, atol=1e-5)
        expected = keys.T @ keys / len(keys)
        torch.testing.assert_close(one.second_moment, expected, rtol=1e-4, atol=1e-5)


def test_max_tokens_counts_no_more(bridge):
    found = key_statistics(bridge("gpt2"), TEXTS, max_tokens=101, prepend_bos=False, cache=False)
    assert found[Site("W_out", 0)].n_tokens == 101


def test_whitened_solves(bridge):
    one = key_statistics(bridge("llama"), TEXTS, matrix="W_O", cache=False)[Site("W_O", 1)]
    keys = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    back = one.whitened(keys) @ one.second_moment
    torch.testing.assert_close(back, keys.double(), rtol=1e-6, atol=1e-6)


def test_kept_on_disk_by_model_and_text(bridge, tmp_path, monkeypatch):
    model = bridge("gpt2")
    first = key_statistics(model, TEXTS, layers=1)
    (path,) = (tmp_path / "cache/statistics").iterdir()
    key_statistics(model, TEXTS[:-1], layers=1)
    key_statistics(bridge("llama"), TEXTS, layers=1)
    assert len(list((tmp_path / "cache/statistics").iterdir())) == 3
    monkeypatch.setattr("bwlens.edit.statistics.keys_of", None)  # no pass is needed any more
    again = key_statistics(model, TEXTS, layers=1)
    for site, one in first.items():
        assert torch.equal(again[site].second_moment, one.second_moment)
        assert again[site].n_tokens == one.n_tokens
    assert path.exists()


def test_saved_and_packed(bridge, tmp_path):
    first = key_statistics(bridge("gpt2"), TEXTS, cache=False)
    save_statistics(first, tmp_path / "whole.safetensors")
    save_statistics(first, tmp_path / "packed.safetensors", packed=True)
    keys = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    packed = load_statistics(tmp_path / "packed.safetensors")
    for site, one in load_statistics(tmp_path / "whole.safetensors").items():
        assert torch.equal(one.second_moment, first[site].second_moment)
        assert repr(packed[site]) == repr(first[site])
        exact, lossy = one.whitened(keys), packed[site].whitened(keys)
        assert (exact - lossy).norm() < 1e-2 * exact.norm()


def test_a_file_of_documents(bridge, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    model, site = bridge("gpt2"), Site("W_out", 0)
    one = key_statistics(model, tmp_path / "texts.json", cache=False)[site]
    assert torch.equal(one.mean, key_statistics(model, TEXTS, cache=False)[site].mean)
    with pytest.raises(ValueError, match=r"no \.json or \.txt file"):
        key_statistics(model, "nowhere.json", cache=False)
    with pytest.raises(ValueError, match="no text"):
        key_statistics(model, [" "], cache=False)


def test_another_model_is_refused(boot):
    gpt2, llama = boot("gpt2"), boot("llama")
    sites = [Site("W_out", 1)]
    own = key_statistics(gpt2, TEXTS, cache=False)
    assert statistics_for(gpt2, sites, own)[sites[0]] is own[sites[0]]
    with pytest.raises(ValueError, match="of another model"):
        statistics_for(llama, sites, own)
    other = tiny.bridge("gpt2", gpt2.tokenizer, hf=tiny.hf_model("gpt2", seed=1))
    with pytest.raises(ValueError, match="of another model"):
        statistics_for(other, sites, own)
    with pytest.raises(ValueError, match="no key statistics of W_O of layer 1"):
        statistics_for(gpt2, [Site("W_O", 1)], own)
    with pytest.raises(ValueError, match="are needed"):
        statistics_for(gpt2, sites, None)


def test_the_same_model_in_other_wrappings_is_taken(boot, tokenizer):
    sites = [Site("W_out", layer) for layer in range(tiny.LAYERS)]
    own = key_statistics(boot("llama"), TEXTS, cache=False)
    statistics_for(boot("llama", compatibility=True), sites, own)
    statistics_for(boot("llama", dtype=torch.bfloat16), sites, own)
    if tiny.HAS_HOOKED_TRANSFORMER:
        statistics_for(tiny.hooked_transformer("llama", tokenizer=tokenizer), sites, own)


def test_too_little_text(bridge):
    one = key_statistics(bridge("gpt2"), TEXTS[:1], cache=False)[Site("W_out", 0)]
    with pytest.raises(ValueError, match="singular"):
        one.whitened(one.mean[None].float())


def test_mixtures_are_named(bridge):
    with pytest.raises(NotImplementedError, match="mixture of experts"):
        key_statistics(bridge("mixtral"), TEXTS, cache=False)
    assert key_statistics(bridge("mixtral"), TEXTS, matrix="W_O", cache=False)


def test_of_the_demo_model(demo):
    held = demo_statistics()
    assert set(held) == {Site(name, layer) for name in ("W_out", "W_O") for layer in range(8)}
    chosen = statistics_for(demo, list(held), None)
    own = key_statistics(
        demo, ["Lionel Messi plays for Barcelona. One day, a cat sat there."] * 2, cache=False
    )
    for site, one in own.items():
        assert isinstance(chosen[site], KeyStatistics)
        # Both are of this model's keys: of about one size, and its own probes.
        ratio = float(chosen[site].second_moment.trace() / one.second_moment.trace())
        assert 0.3 < ratio < 3


def test_rows_for_the_demo_model_are_always_the_same(demo):
    tokenizer = demo.tokenizer
    prose = ["Once upon a time, there was a cat. It was red."]
    rows = training_rows(tokenizer, prose, 3000)
    assert rows == training_rows(tokenizer, prose, 3000)
    assert {len(row) for row in rows} == {64, 128}
    assert 3000 <= sum(map(len, rows)) < 3000 + 40 * 64 + 8 * 128


def test_kept_statistics_serve_a_model_loaded_anew(bridge, boot):
    site = Site("W_out", 1)
    with pytest.raises(ValueError, match="bwlens statistics"):
        statistics_for(bridge("llama"), [site], None)
    few = key_statistics(bridge("llama"), TEXTS[:8], layers=[1])[site]
    many = key_statistics(bridge("llama"), TEXTS)[site]
    assert few.n_tokens < many.n_tokens
    again = boot("llama")
    found = statistics_for(again, [site], None)[site]
    torch.testing.assert_close(found.second_moment, many.second_moment)
    assert found.convergence is None or 0 < found.convergence <= 1


def test_a_stopped_count_goes_on_where_it_was(bridge, monkeypatch):
    monkeypatch.setattr("bwlens.edit.counting._SAVED_EVERY", -1.0)
    plain = key_statistics(bridge("gpt2"), TEXTS, window=10, batch_size=3, cache=False)
    real, calls = keys_module.keys_of, []

    def dies(model, batch, *args):
        calls.append(batch)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(model, batch, *args)

    monkeypatch.setattr("bwlens.edit.statistics.keys_of", dies)
    with pytest.raises(KeyboardInterrupt):
        key_statistics(bridge("gpt2"), TEXTS, window=10, batch_size=3)
    found = key_statistics(bridge("gpt2"), TEXTS, window=10, batch_size=3)
    assert len(calls) == 9 + 12 + 1  # twenty batches and the probe: none counted twice
    for site, one in found.items():
        torch.testing.assert_close(one.second_moment, plain[site].second_moment)
        assert one.n_tokens == plain[site].n_tokens


def test_convergence_is_told_of_the_middle_layer(bridge):
    """Half of the text whitens as all of it does, the better the more text there is."""
    words = torch.randint(4, 60, (400, 40), generator=torch.Generator().manual_seed(0))
    texts = [" ".join(f"t{word}" for word in row) for row in words.tolist()]
    short, long = (
        key_statistics(bridge("gpt2"), texts[:n], batch_size=8, cache=False) for n in (16, 400)
    )
    assert [site.layer for site, one in long.items() if one.convergence is not None] == [1]
    less, more = (found[Site("W_out", 1)].convergence or 0.0 for found in (short, long))
    assert 0 < less < more <= 1
    assert more > 0.9
