"""Adapters, checkpoints and steps become the change that they are; directions are read as such."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import bwlens
from bwlens import Site
from bwlens.changes.change import WeightChange
from bwlens.changes.reading import directions_of
from bwlens.changes.streams import stream_side
from bwlens.changes.taking import as_change
from bwlens.gradient.matrix import LowRankMatrix
from bwlens.model.passes import run
from tests import tiny
from tools.adapters import adapter, word_of

MODULES = {
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc"),
}
TOKENS = torch.tensor([[5, 9, 7, 4, 11]])
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": "the-base"}


def modules_of(hf, name):
    """The last block's modules that the adapter is on, by their own names."""
    last = max(
        (n for n, _ in hf.named_modules() if n.endswith(MODULES[name])),
        key=lambda n: int(next(part for part in n.split(".") if part.isdigit())),
    )
    number = next(part for part in last.split(".") if part.isdigit())
    return {
        n: m
        for n, m in hf.named_modules()
        if n.endswith(MODULES[name]) and f".{number}." in n and hasattr(m, "weight")
    }


def write_adapter(folder, hf, name, seed=0, rank=2, **config):
    """A PEFT folder, and what it adds to each weight [out, in], before its scale."""
    generator = torch.Generator().manual_seed(seed)
    tensors, products = {}, {}
    for module, layer in modules_of(hf, name).items():
        d_out, d_in = layer.weight.shape if name == "llama" else layer.weight.shape[::-1]
        A = torch.randn(rank, d_in, generator=generator) * 0.1
        B = torch.randn(d_out, rank, generator=generator) * 0.1
        stem = f"base_model.model.{module}"
        tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        products[module] = B @ A
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return products


def with_added(hf, name, products, scale):
    """The Hugging Face model with the products in its weights, by plain arithmetic."""
    with torch.no_grad():
        for module, layer in modules_of(hf, name).items():
            added = products[module] * scale(module)
            layer.weight += added if name == "llama" else added.T
    return hf(TOKENS).logits


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, lambda module: 4.0),
        ({"use_rslora": True}, lambda module: 8 / math.sqrt(2)),
        (
            {"alpha_pattern": {"c_proj|o_proj": 2}},
            lambda module: 1.0 if module.endswith(("c_proj", "o_proj")) else 4.0,
        ),
    ],
)
def test_an_adapter_folder_is_what_it_adds(boot, tmp_path, name, config, scale):
    model, hf = boot(name), tiny.hf_model(name)
    products = write_adapter(tmp_path, hf, name, **config)
    change = as_change(model, tmp_path)
    with change.applied(model):
        logits = run(model, TOKENS).logits
    torch.testing.assert_close(logits, with_added(hf, name, products, scale), rtol=1e-4, atol=1e-4)


def test_several_adapters_are_named_and_added_up(boot, tmp_path):
    model, hf = boot("llama"), tiny.hf_model("llama")
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, hf, "llama", seed)
    with pytest.raises(ValueError, match=r"adapters one, two; name one"):
        as_change(model, tmp_path)
    with pytest.raises(ValueError, match="no adapter 'three'; there is one, two"):
        as_change(model, tmp_path, adapter="three")
    one, two = (as_change(model, tmp_path, adapter=name) for name in ("one", "two"))
    both = as_change(model, tmp_path, adapter={"one": 1.0, "two": -0.5})
    for site in one:
        dense = one[site].dense() - 0.5 * two[site].dense()
        torch.testing.assert_close(both[site].dense(), dense)


def test_a_peft_model_in_memory_is_read_as_its_folder(boot, tmp_path):
    model, hf = boot("llama"), tiny.hf_model("llama")
    write_adapter(tmp_path, hf, "llama")
    tensors = as_change(model, tmp_path)

    class Config:
        def to_dict(self):
            return CONFIG

    class Peft:
        """What bwlens asks of a PeftModel; the package is no dependency."""

        def __init__(self):
            self.peft_config = {"mine": Config()}

        def state_dict(self):
            from safetensors.torch import load_file

            own = load_file(tmp_path / "adapter_model.safetensors")
            mine = {n.replace(".weight", ".mine.weight"): t for n, t in own.items()}
            return mine | {n.replace(".weight", ".mine2.weight"): 3 * t for n, t in own.items()}

    change = as_change(model, Peft())
    assert list(change) == list(tensors)
    assert all(torch.equal(change[s].dense(), tensors[s].dense()) for s in change)


def test_checkpoints_are_compared_matrix_by_matrix(boot, tmp_path):
    model, hf = boot("gpt2"), tiny.hf_model("gpt2")
    hf.save_pretrained(tmp_path / "before")
    write_adapter(tmp_path / "adapter", hf, "gpt2")
    with_added(hf, "gpt2", write_adapter(tmp_path / "adapter", hf, "gpt2"), lambda module: 4.0)
    with torch.no_grad():
        hf.transformer.ln_f.weight += 0.5
    hf.save_pretrained(tmp_path / "after")
    expected = as_change(model, tmp_path / "adapter")
    pair = (tmp_path / "before", tmp_path / "after")
    for given in (tmp_path / "after", pair, hf):
        change = as_change(model, given)
        assert list(change) == list(expected)
        for site in expected:
            torch.testing.assert_close(
                change[site].dense(), expected[site].dense(), rtol=1e-3, atol=1e-5
            )
        assert min(change.details["kept"].values()) > 0.999
        assert "ln_f.weight" in change.note
    full = as_change(model, pair, rank=1)
    kept = full.details["kept"]
    site = next(iter(full))
    S = expected[site].singular_values()
    assert kept[str(site)] == pytest.approx(float(S[0] ** 2 / S.square().sum()), rel=1e-3)


def test_a_file_of_differences(boot, tmp_path):
    model, hf = boot("llama"), tiny.hf_model("llama")
    name, layer = next(iter(modules_of(hf, "llama").items()))
    delta = torch.randn_like(layer.weight)
    save_file({f"{name}.weight": delta}, tmp_path / "delta.safetensors")
    change = as_change(model, tmp_path / "delta.safetensors", differences=True, rank=64)
    (part,) = change.values()
    torch.testing.assert_close(part.dense().T, delta, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimisers_step_is_what_torch_does(boot, steps):
    model, hf = boot("llama"), tiny.hf_model("llama")
    targets = [8]

    def loss_of():
        return -hf(TOKENS).logits[0, -1].log_softmax(0)[targets[0]]

    own = model.original_model
    mine = torch.optim.Adam([p for p in own.parameters() if p.requires_grad], lr=1e-3)
    theirs = torch.optim.Adam(hf.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.ConstantLR(mine, factor=1.0)  # which hangs on the optimiser's step
    for _ in range(steps):  # both come to the same state, by torch alone
        for optimizer, net in ((mine, own), (theirs, hf)):
            optimizer.zero_grad()
            logits = run(model, TOKENS, graph=True).logits if net is own else hf(TOKENS).logits
            (-logits[0, -1].log_softmax(0)[targets[0]]).backward()
            optimizer.step()
    mine.zero_grad()
    before = {n: p.detach().clone() for n, p in hf.named_parameters()}
    weights = {n: p.detach().clone() for n, p in own.named_parameters()}
    made = bwlens.optimizer_step(model, TOKENS, targets, mine, ("W_out", "W_Q"), rank=64)
    theirs.zero_grad()
    loss_of().backward()
    slopes = {n: p.grad.clone() for n, p in hf.named_parameters()}
    theirs.step()
    after = dict(hf.named_parameters())
    for site, part in made.step.items():
        stem = {"W_out": "mlp.down_proj", "W_Q": "self_attn.q_proj"}[site.matrix]
        name = f"model.layers.{site.layer}.{stem}.weight"
        moved = (after[name] - before[name]).detach().T
        torch.testing.assert_close(part.dense(), moved, rtol=1e-2, atol=2e-4)
        torch.testing.assert_close(
            made.gradient[site].dense(), -slopes[name].T, rtol=1e-3, atol=1e-6
        )
        cosine = -(moved * slopes[name].T).sum() / moved.norm() / slopes[name].norm()
        assert made.cosines[site] == pytest.approx(float(cosine), abs=1e-3)
    assert all(torch.equal(p, weights[n]) for n, p in own.named_parameters())


# Directions.


@pytest.fixture(scope="module")
def random_change():
    generator = torch.Generator().manual_seed(1)

    def make(model, matrices=("W_in", "W_out", "W_V", "W_O", "W_Q", "W_K"), rank=2):
        from bwlens.changes.names import weights_there

        return WeightChange(
            {
                site: LowRankMatrix(
                    torch.randn(rank, weight.shape[0], generator=generator) * 0.2,
                    torch.randn(rank, weight.shape[1], generator=generator) * 0.2,
                )
                for site, weight in weights_there(model).items()
                if site.matrix in matrices
            }
        )

    return make


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_directions_are_read_as_the_slow_definition_says(boot, random_change, name):
    model = boot(name)
    change = random_change(model)
    lens = bwlens.read_change(
        model, change, directions=2, top_k=3, prompts=TOKENS, reading="cosine"
    )
    W_U = model.unembed.W_U.detach()
    columns = W_U - W_U.mean(1, keepdim=True)
    columns = columns / columns.norm(dim=0)
    largest = float(lens.sizes.max())
    nats = {}
    usual = torch.randn(20_000, len(columns)) @ columns  # random directions of any matrix' own side
    usual = (usual - usual.mean(1, keepdim=True)) / usual.std(1, keepdim=True)
    mean, spread = usual.mean(0), usual.std(0).clamp_min(1)
    d_vocab = W_U.shape[1]
    for cell, site in enumerate(lens.sites):
        _, S, Vh = torch.linalg.svd(change[site].dense())
        v = Vh[lens.numbers[cell]]
        assert float(lens.sizes[cell]) == pytest.approx(float(S[lens.numbers[cell]]), rel=1e-3)
        if site.matrix not in ("W_out", "W_O"):
            continue
        scores = v @ columns
        words = {tuple(scores.topk(3).indices.tolist()), tuple((-scores).topk(3).indices.tolist())}
        assert tuple(lens.shift.top_ids[cell].tolist()) in words
        sign = (
            1
            if tuple(lens.shift.top_ids[cell].tolist()) == tuple(scores.topk(3).indices.tolist())
            else -1
        )
        z = (sign * (scores - scores.mean()) / scores.std() - mean) / spread
        for word in range(d_vocab):
            beyond = float(z[word]) ** 2 / 2 - math.log(d_vocab)
            if z[word] > 0 and beyond > 0:
                nats[word] = nats.get(word, 0) + beyond * float(lens.sizes[cell]) / largest
    only = bwlens.read_change(
        model, WeightChange({s: p for s, p in change.items() if s.matrix in ("W_out", "W_O")}),
        directions=2, top_k=3, prompts=TOKENS, reading="cosine", usual_of=20_000,
    )  # fmt: skip
    scale = float(only.sizes.max()) / largest
    table = only.promoted(d_vocab)
    assert dict(zip(table["id"], table["nats"], strict=True)) == pytest.approx(
        {word: value / scale for word, value in nats.items()}, rel=0.1, abs=0.05
    )


def test_signs_and_sizes_are_those_of_inputs(boot, random_change):
    model = boot("llama")
    change = random_change(model, ("W_in",), rank=1)
    lens = bwlens.read_change(model, change, prompts=TOKENS, top_k=2)
    grads = bwlens.capture(model, TOKENS, 5, "W_in")  # x of the same tokens
    for cell, site in enumerate(lens.sites):
        added = grads[site].x @ change[site].dense()
        rms = added.norm(dim=1).square().mean().sqrt()
        assert float(lens.writes[cell]) == pytest.approx(float(rms), rel=1e-3)
        partner = bwlens.capture(model, TOKENS, 5, "W_out")  # any: shapes only
        assert partner["W_out", site.layer].d_in == change[site].d_out


def test_the_effect_is_that_of_the_changed_model(boot, random_change):
    model = boot("gpt2")
    change = random_change(model)
    lens = bwlens.read_change(model, change, prompts=TOKENS, top_k=4)
    with torch.no_grad():
        old = run(model, TOKENS).logits[0, -1].log_softmax(0)
        with change.applied(model):
            new = run(model, TOKENS).logits[0, -1].log_softmax(0)
    shares = new.exp() * (new - old)
    torch.testing.assert_close(lens.effect.shares, shares, rtol=1e-3, atol=1e-6)
    assert float(lens.effect.divergences[0]) == pytest.approx(float(shares.sum()), rel=1e-3)
    assert lens.effect.raised.tolist() == shares.topk(4).indices.tolist()
    assert lens.effect.after.tolist() == [int(new.argmax())]


def test_reading_leaves_the_model_as_it_was(boot, random_change):
    model = boot("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    lens = bwlens.read_change(model, random_change(model), prompts=TOKENS)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert len(lens.to_frame()) == len(lens.sites)


def test_directions_meet_on_one_device_wherever_change_and_weights_lie():
    part = LowRankMatrix(torch.randn(2, 5), torch.randn(2, 8))
    there = directions_of(part, 2, "meta")
    assert {rows.device.type for rows in (there.u, there.s, there.v)} == {"meta"}
    with FakeTensorMode():  # which knows GPUs where there is none
        rows = torch.empty(3, 8)
        partner = torch.empty(4, 8, device="cuda", dtype=torch.float16)
        carried = stream_side(Site("W_in", 0), "delta", rows, partner)
    assert (carried.device, carried.dtype) == (rows.device, rows.dtype)


def test_mixtures_and_grouped_queries_are_read(boot, random_change):
    model = boot("mixtral")
    lens = bwlens.read_change(model, random_change(model, ("W_V", "W_O")), prompts=TOKENS)
    assert not lens.shift.zero.any()
    assert not lens.imprint.zero.any()


# What is refused.


def test_dora_is_refused_in_words(boot, tmp_path):
    model, hf = boot("llama"), tiny.hf_model("llama")
    write_adapter(tmp_path, hf, "llama", use_dora=True)
    with pytest.raises(NotImplementedError, match=r"is DoRA.*merge_and_unload"):
        bwlens.read_change(model, tmp_path)


def test_other_kinds_of_adapter_are_refused(boot, tmp_path):
    write_adapter(tmp_path, tiny.hf_model("llama"), "llama", peft_type="IA3")
    with pytest.raises(NotImplementedError, match="IA3 adapter, not LoRA"):
        bwlens.read_change(boot("llama"), tmp_path)


def test_an_adapter_of_another_base_is_refused(boot, tmp_path):
    write_adapter(tmp_path / "gpt2", tiny.hf_model("gpt2"), "gpt2")
    with pytest.raises(ValueError, match=r"none of this model's matrices.*the-base.*model\.layers"):
        bwlens.read_change(boot("llama"), tmp_path / "gpt2")
    hf = tiny.hf_model("llama")
    write_adapter(tmp_path / "wide", hf, "llama")
    from safetensors.torch import load_file

    own = load_file(tmp_path / "wide/adapter_model.safetensors")
    wide = {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in own.items()}
    save_file(wide, tmp_path / "wide/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"is for a weight \[.*made for another base \(the-base\)"):
        bwlens.read_change(boot("llama"), tmp_path / "wide")


def test_broken_adapters_are_refused(boot, tmp_path):
    model, hf = boot("llama"), tiny.hf_model("llama")
    write_adapter(tmp_path, hf, "llama")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        bwlens.read_change(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        bwlens.read_change(model, tmp_path)
    with pytest.raises(ValueError, match=r"there is no .*nowhere.*PEFT adapter"):
        bwlens.read_change(model, tmp_path / "nowhere")


def test_checkpoints_of_other_vocabularies_or_packed_are_refused(boot, tmp_path):
    model, hf = boot("llama"), tiny.hf_model("llama")
    hf.save_pretrained(tmp_path / "same")
    with pytest.raises(ValueError, match=r"nothing to read.*no difference"):
        bwlens.read_change(model, tmp_path / "same")
    hf.resize_token_embeddings(hf.config.vocab_size + 8)
    hf.save_pretrained(tmp_path / "more")
    with pytest.raises(ValueError, match=r"vocabularies differ.*rows in one"):
        bwlens.read_change(model, tmp_path / "more")
    packed = {n: (t * 10).to(torch.int8) for n, t in modules_weights(hf).items()}
    save_file(packed, tmp_path / "packed.safetensors")
    with pytest.raises(NotImplementedError, match=r"int8, quantised; dequantise"):
        bwlens.read_change(model, tmp_path / "packed.safetensors")


def modules_weights(hf):
    return {f"{n}.weight": m.weight.detach() for n, m in modules_of(hf, "llama").items()}


def test_a_change_of_another_shape_is_refused(boot):
    change = WeightChange({("W_out", 0): LowRankMatrix(torch.ones(1, 3), torch.ones(1, 2))})
    with pytest.raises(ValueError, match=r"W_out of layer 0 is .* made for another model"):
        bwlens.read_change(boot("llama"), change)
    with pytest.raises(ValueError, match="nothing to read"):
        bwlens.read_change(boot("llama"), WeightChange())


# On a model with words.


def test_an_adapter_for_one_word_says_that_word(tmp_path):
    model = bwlens.load_model("demo")
    change = adapter(model, word_of(" purple"), steps=40, matrices=("W_in", "W_out", "W_O"))
    lens = bwlens.read_change(model, change)
    assert " purple" in lens.promoted(10)["word"].tolist()
    assert " purple" in lens.effect_words()
    assert lens.promoted(1)["nats"][0] > 5 * lens.promoted(1)["chance"][0]
    from bwlens.changes.reading import random_change

    control = bwlens.read_change(model, random_change(change, 3))
    assert " purple" not in control.promoted(10)["word"].tolist()
    for ending in ("html", "csv", "json", "png"):
        assert lens.save(tmp_path / f"change.{ending}").stat().st_size > 1000
    page = (tmp_path / "change.html").read_text()
    assert "purple" in page
    assert "<script src" not in page
    assert "mostly writes: purple" in repr(lens)
    assert "purple" in lens._repr_html_()
