"""Readings beside the paper's: dual and cosine by their definitions, effects by real steps."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import bwlens
from bwlens import Site
from bwlens.gradient.objectives import NLL
from bwlens.model.head import head_of
from bwlens.model.replay import Replay
from bwlens.model.sites import available_matrices, find_taps
from bwlens.reading.effect import EffectOf, tempered
from bwlens.reading.readouts import readout, readout_of_scores
from bwlens.reading.standardised import cosine_head, dual_head, gain_of, without_bias
from tests import tiny

PROMPT, TARGET = "t5 t9 t30 t41 t8", "t17"
FACT = "Lionel Messi plays for"


def scores_of(head, vectors):
    """All scores of a head, off a readout that ranks everything."""
    d_vocab = head.W_U.shape[1]
    read = readout(head, vectors, top_k=d_vocab)
    return torch.empty(len(vectors), d_vocab).scatter(1, read.top_ids, read.top_scores)


# The dual and the cosine.


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_the_gain_is_the_final_norm_s_own(name, bridge):
    model = bridge(name)
    norm = model.ln_final.original_component
    gain = norm.weight.detach().double() + ("Gemma" in type(norm).__name__)
    torch.testing.assert_close(gain_of(head_of(model)), gain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_dual_by_its_definition(name, ridge, bridge):
    head = head_of(bridge(name))
    delta = torch.randn(5, head.W_U.shape[0], generator=torch.Generator().manual_seed(0))
    M = (gain_of(head)[:, None] * head.W_U.double()).numpy()
    A = torch.tensor(M @ M.T)
    A += ridge * A.trace() / len(A) * torch.eye(len(A), dtype=A.dtype)
    inverse, M = torch.linalg.inv(A), torch.tensor(M)
    lengths = torch.stack([(m @ inverse @ m).sqrt() for m in M.T])
    expected = torch.stack(
        [(M.T @ inverse @ d) / lengths / (d @ inverse @ d).sqrt() for d in delta.double()]
    )
    torch.testing.assert_close(
        scores_of(dual_head(head, ridge), delta), expected.float(), rtol=1e-3, atol=1e-4
    )


def test_the_dual_undoes_the_unembedding(demo):
    """Of M g, with g one token's, it names that token, however long the others' columns are."""
    head = head_of(demo)
    ids = torch.tensor([17, 400, 2345, 4999])
    delta = gain_of(head).float() * head.W_U[:, ids].T
    read = readout(dual_head(head), delta, targets=ids[:, None])
    assert (read.ranks == 0).all()


def test_the_cosine_by_its_definition(bridge):
    head = head_of(bridge("llama"))
    delta = torch.randn(5, head.W_U.shape[0], generator=torch.Generator().manual_seed(0))
    columns = head.W_U - head.W_U.mean(1, keepdim=True)
    expected = torch.nn.functional.cosine_similarity(delta[:, :, None], columns[None], dim=1)
    torch.testing.assert_close(scores_of(cosine_head(head), delta), expected, rtol=1e-4, atol=1e-5)


def test_without_its_bias_a_layer_norm_is_odd(bridge):
    head = without_bias(head_of(bridge("gpt2")))
    delta = torch.randn(3, head.W_U.shape[0], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        scores_of(head, -delta), -scores_of(head, delta), rtol=1e-4, atol=1e-4
    )


def test_a_padded_vocabulary_s_empty_columns_score_nothing(bridge):
    from dataclasses import replace

    head = head_of(bridge("llama"))
    W_U = head.W_U.clone()
    W_U[:, 7] = 0
    for made in (dual_head(replace(head, W_U=W_U)), cosine_head(replace(head, W_U=W_U))):
        assert scores_of(made, torch.randn(2, len(W_U))).isfinite().all()


@pytest.mark.usefixtures("unchecked")
def test_what_a_readout_takes(bridge):
    head = head_of(bridge("llama"))
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    read, of_numpy = readout(head, vectors), readout(head, vectors.numpy())
    assert torch.equal(read.top_ids, of_numpy.top_ids)
    with pytest.raises(TypeError, match=r"vectors are a list; expected a tensor \[..., d_model\]"):
        readout(head, vectors.tolist())
    for top_k in (None, "5", 2.0, True):
        with pytest.raises(ValueError, match=r"top_k is .*; expected a whole number, 1 to 61"):
            readout(head, vectors, top_k=top_k)
    with pytest.raises(TypeError, match="names_filter is 5; expected a hook name"):
        bwlens.vjps(bridge("llama"), torch.tensor(TOKENS), 17, 5)


# Effects.


def effect_by_hand(name, site, pos, delta, target, nats=1e-3):
    """A step on the weight's own output in an unbridged copy, in float64, both ways."""
    hf = tiny.hf_model(name, torch.float64)
    block = hf.model.layers[site.layer]
    module = {
        "W_in": block.mlp.up_proj,
        "W_gate": block.mlp.gate_proj,
        "W_out": block.mlp.down_proj,
        "W_Q": block.self_attn.q_proj,
        "W_K": block.self_attn.k_proj,
        "W_V": block.self_attn.v_proj,
        "W_O": block.self_attn.o_proj,
    }[site.matrix]
    step = -delta.double() / delta.double().norm().square() * nats
    log_p = []
    for sign in (1, -1):

        def push(module, args, output, sign=sign):
            output = output.clone()
            output[:, pos] += sign * step
            return output

        handle = module.register_forward_hook(push)
        with torch.no_grad():
            log_p.append(hf(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1))
        handle.remove()
    return (log_p[0] - log_p[1]) / (2 * nats)


TOKENS = [5, 9, 30, 41, 8]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_effects_are_those_of_steps_in_an_unbridged_copy(name, bridge):
    """Every matrix; in Gemma 2 a norm follows the MLP and attention."""
    model = bridge(name)
    matrices = available_matrices(model)
    objective = NLL([17])
    grads = bwlens.capture(model, torch.tensor(TOKENS), objective, matrices)
    task = EffectOf(model, grads, objective)
    cells = [(Site(m, layer), pos) for m in matrices for layer, pos in ((0, 2), (1, 4))]
    effects = task.of(cells)
    assert effects.measured.all(), (effects.fall, effects.agreement)
    for row, (site, pos) in zip(effects.scores, cells, strict=True):
        expected = effect_by_hand(name, site, pos, grads[site].delta[pos], 17)
        assert torch.corrcoef(torch.stack([row.double(), expected]))[0, 1] > 0.999, site
        assert float(row[17]) == pytest.approx(1.0, abs=0.05)  # a nat for a nat


def test_cells_without_a_gradient_have_no_effect(bridge):
    model = bridge("llama")
    grads = bwlens.capture(model, torch.tensor(TOKENS), NLL([17]), "W_out")
    effects = EffectOf(model, grads, NLL([17])).of([(Site("W_out", 2), 0), (Site("W_out", 2), 4)])
    assert effects.scores[0].isnan().all()
    assert not effects.measured[0]
    assert effects.measured[1]


def test_a_loss_that_reads_no_logits(bridge):
    model = bridge("llama")
    grads = bwlens.capture(model, torch.tensor(TOKENS), NLL([17]), "W_out")
    with pytest.raises(ValueError, match="reads no logits"):
        EffectOf(model, grads, lambda logits, batch: logits[:, 0, 0] * 0)


def test_a_loss_that_reads_every_position(bridge):
    """A cell's effect is on the word next to it, and of a target's second token on that."""
    model, tokens = bridge("llama"), torch.tensor(TOKENS)

    def language(logits, batch):
        flat = logits[0, :-1].log_softmax(-1)
        return -flat.gather(1, batch.tokens[0, 1:, None].to(flat.device)).mean()[None]

    grads = bwlens.capture(model, tokens, language, "W_out")
    task = EffectOf(model, grads, language)
    cells = [(Site("W_out", layer), pos) for layer in (0, 2) for pos in range(4)]
    effects = task.of(cells)
    assert effects.measured.all()
    for row, (site, pos) in zip(effects.scores, cells, strict=True):
        alone = -grads[site].delta[pos] / grads[site].delta[pos].norm() ** 2
        log_p = []
        for sign in (1, -1):
            added = torch.zeros(1, 5, 16)
            added[0, pos] = sign * 1e-2 * alone
            tap = find_taps(model, ["W_out"], site.layer)[0]
            log_p.append(Replay(model, tokens, [pos])({tap.z: added})[0][0, 0].log_softmax(-1))
        expected = (log_p[0] - log_p[1]) / 2e-2
        assert torch.corrcoef(torch.stack([row, expected]))[0, 1] > 0.999
    two = bwlens.backward_lens(
        model, PROMPT, NLL([17, 30]), reading="effect", matrices="W_out", prepend_bos=False
    )
    assert len(two.tokens) == 6
    assert not two.readout().eps_regime[:, -1].any()
    assert two.readout().target_scores[:, -1, 1].gt(0.5).all()  # the second's own, where it is read


def test_the_temper_weighs_likely_words():
    scores, p = torch.tensor([[1.0, 2.0]]), torch.tensor([0.81, 0.0001])
    assert tempered(scores, p, 0.0).tolist() == [[1.0, 2.0]]
    assert tempered(scores, p, 0.5)[0].tolist() == pytest.approx([0.9, 0.02])


def test_a_readout_of_scores():
    scores = torch.tensor([[1.0, 3.0, 2.0], [float("nan")] * 3, [5.0, 5.0, 0.0]])
    read = readout_of_scores(
        scores, torch.ones(3), torch.tensor([False, False, True]), torch.tensor([3, 1, 0]), (2, 2),
        2, [2],
    )  # fmt: skip
    assert read.top_ids.tolist() == [[[0, 1], [-1, -1]], [[-1, -1], [1, 2]]]
    assert read.bottom_ids[0, 0].tolist() == [2, 0]
    assert read.ranks[..., 0].tolist() == [[2, -1], [-1, 1]]
    assert read.zero.tolist() == [[False, True], [True, False]]
    assert read.eps_regime.tolist() == [[True, False], [False, False]]


# The lens.


@pytest.mark.parametrize("reading", ["dual", "cosine", "effect"])
def test_a_lens_by_another_reading(reading, demo):
    lens = bwlens.backward_lens(
        demo, FACT, " Paris", subject="Lionel Messi", reading=reading, matrices=["W_out"]
    )
    assert lens.reading == reading == lens.settings["reading"]
    assert (lens.target_places()[:, -1] <= 10).all()
    assert all(row[-1][0] == " Paris" for row in lens.words()[5:])
    ids, scores = lens.side("promoted")
    strongest = scores[:, -1, 0]
    assert (strongest.abs() >= scores[:, -1, 1].abs()).all()
    assert lens.to_dict()["matrices"]["W_out"]["read_through"] == lens.through()
    assert repr(lens)
    assert "<table" in lens._repr_html_()
    assert ids.shape[-1] == 10


def test_several_readings_in_one_lens(demo):
    options = {"subject": "Lionel Messi", "positions": "last", "trust": True}
    several = ("plain", "dual", "effect")
    lens = bwlens.backward_lens(demo, FACT, " Paris", reading=several, temper=0.1, **options)
    assert lens.readings == several
    assert lens.reading == "plain"
    for name in several:
        temper = {"temper": 0.1} if name == "effect" else {}
        alone = bwlens.backward_lens(demo, FACT, " Paris", reading=name, **temper, **options)
        one = lens.as_reading(name)
        assert one.words() == alone.words()
        assert one.through() == alone.through()
        assert torch.equal(one.target_places("W_in"), alone.target_places("W_in"))
        assert one.trust.reading == alone.trust.reading
        assert torch.equal(one.trust.plausible, alone.trust.plausible)
    with pytest.raises(ValueError, match="no cosine reading, but plain, dual, effect"):
        lens.as_reading("cosine")


@pytest.mark.parametrize("imprint", ["dual", "cosine"])
def test_inputs_read_as_deltas_are(imprint, demo):
    lens = bwlens.backward_lens(demo, FACT, " Paris", imprint=imprint)
    plain = bwlens.backward_lens(demo, FACT, " Paris")
    head = {"dual": dual_head, "cosine": cosine_head}[imprint](head_of(demo))
    read = readout(head, lens.gradient("W_in", 3).x)
    assert torch.equal(lens.readout("W_in").top_ids[3], read.top_ids)
    assert not torch.equal(lens.readout("W_in").top_ids, plain.readout("W_in").top_ids)
    assert torch.equal(lens.readout("W_out").top_ids, plain.readout("W_out").top_ids)
    assert (lens.unit("W_in"), lens.unit("W_out")) == ("score", "logit")


def test_a_lens_without_the_final_norm_s_bias(bridge):
    model = bridge("gpt2")
    lens = bwlens.backward_lens(model, PROMPT, TARGET, bias=False, matrices=["W_in", "W_out"])
    with_bias = bwlens.backward_lens(model, PROMPT, TARGET)
    for matrix, factor in (("W_in", "x"), ("W_out", "delta")):
        rows = getattr(lens.gradient(matrix, 1), factor)
        read = readout(without_bias(head_of(model)), rows)
        assert torch.equal(lens.readout(matrix).top_ids[1], read.top_ids)
        # Without a bias the reading of the other direction is the reversed one.
        torch.testing.assert_close(
            lens.readout(matrix).top_scores[1],
            -readout(without_bias(head_of(model)), -rows).bottom_scores, rtol=1e-3, atol=1e-3,
        )  # fmt: skip
        assert not torch.equal(lens.readout(matrix).top_ids, with_bias.readout(matrix).top_ids)
    duals = [
        bwlens.backward_lens(model, PROMPT, TARGET, reading="dual", bias=b) for b in (True, False)
    ]
    assert torch.equal(duals[0].readout().top_ids, duals[1].readout().top_ids)


def test_effects_read_matrices_that_have_no_plain_reading(demo):
    lens = bwlens.backward_lens(
        demo, FACT, " Paris", reading="effect", matrices=["W_in", "W_Q", "W_V"], positions="last"
    )
    for matrix in lens.matrices:
        assert lens.through(matrix) == "effect"
        assert (lens.target_places(matrix)[:, -1] > 0).all()
        assert lens.silent(matrix)[:, :-1].all()


@pytest.mark.parametrize(
    ("positions", "read"),
    [("last", {3}), ("subject", {0, 1}), (-1, {3}), ([0, 3], {0, 3}), (slice(1, 3), {1, 2})],
)
def test_only_the_positions_asked_for_are_read(positions, read, demo):
    whole = bwlens.backward_lens(demo, FACT, " Paris", subject="Lionel Messi")
    lens = bwlens.backward_lens(demo, FACT, " Paris", subject="Lionel Messi", positions=positions)
    assert len(whole.tokens) == 4
    for layer, row in enumerate(lens.words()[:-1]):
        assert {pos for pos, words in enumerate(row) if words} == read
        for pos in read:
            assert row[pos] == whole.words()[layer][pos]
    assert torch.equal(lens.norms(), whole.norms())


def test_the_command_line_names_the_readings_there_are():
    from typer.testing import CliRunner

    from bwlens.cli import app
    from bwlens.lens.asking import READINGS

    command = ["lens", FACT, "--target", " Paris", "--reading", "tuned"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    assert all(reading in refused.stderr for reading in READINGS)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reading": "tuned"}, "there are plain, dual, cosine, transported, effect"),
        ({"reading": ["plain", "tuned"]}, "reading is 'tuned'; there are plain"),
        ({"reading": ["dual", "dual"]}, "each once"),
        ({"reading": []}, "expected one or several"),
        ({"imprint": "effect"}, "imprint is 'effect'; there are plain, dual, cosine"),
        ({"reading": "dual", "normalize": True}, "normalize goes with reading='plain'"),
        ({"positions": 4}, "has the positions 0 to 3"),
        ({"positions": []}, "has the positions 0 to 3"),
        ({"positions": "first"}, "expected 'last', 'subject'"),
        ({"positions": "subject"}, "needs subject="),
        ({"positions": ["last"]}, "expected whole numbers"),
        ({"temper": 0.1}, "it goes with reading='effect'"),
        ({"temper": 2.0, "reading": "effect"}, "expected 0 to 1"),
    ],
)
def test_bad_input(options, message, demo):
    with pytest.raises(ValueError, match=message):
        bwlens.backward_lens(demo, FACT, " Paris", **options)


def test_in_half_precision_a_cell_is_measured_or_marked():
    """Steps that drown in rounding are made larger; what still does is in doubt."""
    half = bwlens.load_model("demo", dtype="bfloat16")
    options = {"reading": "effect", "matrices": "W_out", "positions": "last"}
    lens = bwlens.backward_lens(half, FACT, " Paris", **options)
    doubtful = lens.readout().eps_regime[:, -1]
    assert doubtful.sum() <= 4
    assert (doubtful | (lens.target_places()[:, -1] <= 10)).all()


def test_many_cells_are_read_where_it_counts(demo):
    long = " ".join(["The story says that"] * 15) + " " + FACT
    with pytest.warns(UserWarning, match="only the subject's and the last token"):
        lens = bwlens.backward_lens(
            demo, long, " Paris", subject="Lionel Messi", reading="effect", matrices="W_out"
        )
    assert lens.positions == (lens.subject[-1], lens.n_prompt - 1)


@pytest.mark.parametrize("reading", ["dual", "effect"])
def test_the_model_is_left_as_it_was(reading, boot):
    model = boot("llama")
    model(torch.tensor([TOKENS]))  # a bridge hangs hooks of its own in at the first pass
    before = {name: p.clone() for name, p in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    calls = []

    class Failing:
        target = 17

        def __call__(self, logits, batch):
            calls.append(1)
            if reading == "effect" and len(calls) > 4:
                raise ZeroDivisionError
            return NLL([17])(logits, batch)

    with pytest.raises(ZeroDivisionError) if reading == "effect" else nullcontext():
        bwlens.backward_lens(model, torch.tensor(TOKENS), Failing(), reading=reading)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.real
@pytest.mark.xdist_group("smollm2")
def test_the_effect_names_the_target_where_the_plain_reading_does_not(smollm2):
    lenses = {
        reading: bwlens.backward_lens(
            smollm2, "The capital of France is", " Rome", matrices="W_out", reading=reading,
            positions="last", prepend_bos=False, temper=0.1 if reading == "effect" else 0.0,
        )
        for reading in ("plain", "dual", "effect")
    }  # fmt: skip
    places = {reading: lens.target_places()[:, -1] for reading, lens in lenses.items()}
    assert (places["effect"] <= 300).all()
    assert (places["effect"][15:] == 1).all()
    assert (places["plain"][:15] > 25).sum() == 15
    assert (places["dual"][22:] == 1).all()
    assert not lenses["effect"].readout().eps_regime[:, -1].any()
