"""Preference losses, a text's loss and KL have the gradient of plain code, and halves that sum."""

import math

import pytest
import torch

import bwlens
from tests import oracle, tiny

PROMPTS = [[5, 9, 30, 41], [7, 8]]
CHOSEN = [[17], [23, 44, 10]]
REJECTED = [[12, 6], [9]]
REFERENCE = [-3.0, -9.5, -4.25, -2.0]


def log_probs(hf):
    """The summed log-probability of each answer, chosen first, one plain pass at a time."""
    out = []
    for prompt, answer in [
        *zip(PROMPTS, CHOSEN, strict=True),
        *zip(PROMPTS, REJECTED, strict=True),
    ]:
        logits = hf(torch.tensor([prompt + answer[:-1]])).logits[0].log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
        out.append(sum(logits[row, token] for row, token in zip(rows, answer, strict=True)))
    return out


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def dpo(c, r, pair):
    return -torch.log(sigmoid(0.3 * (c - r)))


def ipo(c, r, pair):
    return (c - r - 1 / (2 * 0.2)) ** 2


def kto(c, r, pair):
    return 1.5 * (1 - sigmoid(0.3 * (c - 0.1))) + 0.5 * (1 - sigmoid(0.3 * (0.1 - r)))


def simpo(c, r, pair):
    return -torch.log(sigmoid(2.5 * (c / len(CHOSEN[pair]) - r / len(REJECTED[pair])) - 0.5))


LOSSES = {
    "DPO": (lambda **o: bwlens.DPO(CHOSEN, REJECTED, beta=0.3, **o), dpo),
    "IPO": (lambda **o: bwlens.IPO(CHOSEN, REJECTED, tau=0.2, **o), ipo),
    "KTO": (
        lambda **o: bwlens.KTO(
            CHOSEN, REJECTED, beta=0.3, kl=0.1, desirable=1.5, undesirable=0.5, **o
        ),
        kto,
    ),
    "SimPO": (lambda **o: bwlens.SimPO(CHOSEN, REJECTED, beta=2.5, gamma=0.5), simpo),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reference", ["given", "model", "itself"])
def test_preference_losses_against_plain_code(bridge, tokenizer, name, reference):
    make, formula = LOSSES[name]
    hf = tiny.hf_model("llama")
    if reference == "given":
        objective, ref = make(reference=REFERENCE), REFERENCE
    elif reference == "model":
        other = tiny.hf_model("llama", seed=3)
        objective = make(reference=tiny.bridge("llama", tokenizer, hf=other))
        ref = [v.item() for v in log_probs(other)]
    else:
        objective, ref = make(), [v.item() for v in log_probs(hf)]
    if name == "SimPO":
        ref = [0.0] * 4
    own = log_probs(hf)
    rewards = [value - base for value, base in zip(own, ref, strict=True)]
    losses = [formula(rewards[i], rewards[2 + i], i) for i in range(2)]
    hf.zero_grad()
    sum(losses).backward()
    made = bwlens.capture_preference(bridge("llama"), PROMPTS, objective, ("W_in", "W_O", "W_out"))
    torch.testing.assert_close(made.losses, torch.stack(losses).detach(), rtol=1e-4, atol=1e-5)
    for site, gradient in made.gradients.items():
        expected = oracle.dense(hf, site.matrix, site.layer)
        assert oracle.relative_error(gradient.dense(), expected) <= 1e-4, site
        halves = made.chosen[site] + made.rejected[site]
        torch.testing.assert_close(halves.dense(), gradient.dense(), rtol=1e-5, atol=1e-7)
    leaves = [value.detach().requires_grad_() for value in rewards]
    sum(formula(leaves[i], leaves[2 + i], i) for i in range(2)).backward()
    slopes = torch.stack([leaf.grad for leaf in leaves]).view(2, 2)
    torch.testing.assert_close(made.weights, slopes, rtol=1e-4, atol=1e-6)


def test_entanglement_is_the_cosine_of_the_answers_own_gradients(bridge):
    hf = tiny.hf_model("llama")
    made = bwlens.capture_preference(
        bridge("llama"), PROMPTS, bwlens.DPO(CHOSEN, REJECTED, reference=REFERENCE), "W_out"
    )
    for pair in range(2):
        dense = []
        for half in (0, 2):
            hf.zero_grad()
            log_probs(hf)[half + pair].backward()
            dense.append([oracle.dense(hf, "W_out", layer).clone() for layer in range(2)])
        frame = made.entanglement(pair)
        for layer in range(2):
            one, other = dense[0][layer].flatten(), dense[1][layer].flatten()
            expected = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
            row = frame[frame["layer"] == layer].iloc[0]
            assert row["entanglement"] == pytest.approx(expected, abs=1e-4)
    whole = made.entanglement()
    first = whole.iloc[0]
    site = next(iter(made.chosen))
    assert first["norm"] == pytest.approx(float(made.gradients[site].norm()), rel=1e-5)


def test_a_texts_loss_counts_what_its_mask_says(bridge):
    rows = [[5, 9, 30, 41], [7, 8, 3]]
    mask = [[1, 0, 1, 1], [True, True, False]]
    hf = tiny.hf_model("llama")
    losses = []
    for row, counts in zip(rows, mask, strict=True):
        logits = hf(torch.tensor([row])).logits[0].log_softmax(-1)
        terms = [-logits[i - 1, row[i]] for i in range(1, len(row)) if counts[i]]
        losses.append(sum(terms) / len(terms))
    sum(losses).backward()
    grads = bwlens.capture(bridge("llama"), rows, bwlens.SFT(mask), "W_out")
    torch.testing.assert_close(grads.losses, torch.stack(losses).detach(), rtol=1e-4, atol=1e-5)
    for site, gradient in grads.items():
        expected = oracle.dense(hf, site.matrix, site.layer)
        assert oracle.relative_error(gradient.dense(), expected) <= 1e-5, site


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("reverse", [False, True])
def test_kl_to_another_model(bridge, tokenizer, positions, reverse):
    rows = [[5, 9, 30, 41], [7, 8]]
    hf, other = tiny.hf_model("llama"), tiny.hf_model("llama", seed=3)
    losses = []
    for row in rows:
        mine = hf(torch.tensor([row])).logits[0].log_softmax(-1)
        theirs = other(torch.tensor([row])).logits[0].log_softmax(-1).detach()
        one, two = (mine, theirs) if reverse else (theirs, mine)
        each = [sum(math.e**a * (a - b) for a, b in zip(p, q, strict=True))
                for p, q in zip(one, two, strict=True)]  # fmt: skip
        losses.append(each[-1] if positions == "last" else sum(each) / len(each))
    sum(losses).backward()
    objective = bwlens.KL(tiny.bridge("llama", tokenizer, hf=other), positions, reverse)
    grads = bwlens.capture(bridge("llama"), rows, objective, "W_in")
    torch.testing.assert_close(grads.losses, torch.stack(losses).detach(), rtol=1e-4, atol=1e-5)
    for site, gradient in grads.items():
        expected = oracle.dense(hf, site.matrix, site.layer)
        assert oracle.relative_error(gradient.dense(), expected) <= 1e-4, site


def test_what_does_not_fit_is_refused(bridge):
    model = bridge("llama")
    with pytest.raises(ValueError, match="2 prompts with 2 chosen and 1 rejected"):
        bwlens.capture_preference(model, PROMPTS, bwlens.DPO(CHOSEN, [[9]]))
    with pytest.raises(ValueError, match="expected the log-probability of each of the 4 answers"):
        bwlens.capture_preference(model, PROMPTS, bwlens.DPO(CHOSEN, REJECTED, reference=[1.0]))
    with pytest.raises(ValueError, match="found 1 rows; use"):
        bwlens.capture(model, [5, 9], bwlens.DPO([17], []))
    with pytest.raises(ValueError, match="no token of text 0 counts"):
        bwlens.capture(model, [5, 9], bwlens.SFT([[1, 0]]))
    with pytest.raises(ValueError, match="mask of text 0 has 1 entries for its 2 tokens"):
        bwlens.capture(model, [5, 9], bwlens.SFT([[1]]))


def test_the_lens_of_a_preference_shows_both_halves(tmp_path, demo):
    loss = bwlens.DPO([" Paris"], [" Madrid"])
    lens = bwlens.preference_lens(demo, "Lionel Messi plays for", loss, layers=-1)
    for half, lens_of in (
        (lens.gradients.chosen, lens.chosen),
        (lens.gradients.rejected, lens.rejected),
    ):
        for site, gradient in half.items():
            torch.testing.assert_close(lens_of.gradients[site].dense(), gradient.dense())
    last = {"k": 1, "positions": "last"}
    assert lens.chosen.promoted(**last)["word"].tolist() == [" Paris"]
    assert lens.rejected.suppressed(**last)["word"].tolist() == [" Madrid"]
    assert "rejected" in lens._repr_html_()
    assert lens.save(tmp_path / "halves.html").is_file()
