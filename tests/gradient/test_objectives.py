"""Losses as users write them have the gradient of the same loss written by hand."""

import pytest
import torch

import bwlens
from bwlens.gradient.objectives import as_objective
from tests import cases, oracle, tiny

PROMPTS = cases.PROMPTS
LAST = [len(prompt) - 1 for prompt in PROMPTS]


def hugging_face(loss, name="llama", prompts=PROMPTS):
    """The unbridged model after `backward()` on a loss of its right-padded logits."""
    hf = tiny.hf_model(name)
    tokens, mask = cases.padded(prompts)
    return hf, oracle.backward(hf, tokens, mask, loss)


def check(grads, hf, losses):
    torch.testing.assert_close(grads.losses, losses, rtol=1e-5, atol=1e-5)
    for site, gradient in grads.items():
        expected = oracle.dense(hf, site.matrix, site.layer)
        assert oracle.relative_error(gradient.dense(), expected) <= 1e-5, site


def nll_of(targets):
    def loss(logits):
        rows = logits[torch.arange(len(LAST)), torch.tensor(LAST)].log_softmax(-1)
        return torch.stack([-row[target] for row, target in zip(rows, targets, strict=True)])

    return loss


def capture(model, objective):
    tokens, mask = cases.padded(PROMPTS, "left")
    return bwlens.capture(model, tokens, objective, attention_mask=mask)


@pytest.mark.parametrize(
    ("target", "ids"),
    [
        (" t17", [17, 17, 17]),
        (17, [17, 17, 17]),
        (torch.tensor(17), [17, 17, 17]),
        ([17, 23, 9], [17, 23, 9]),
        ([" t17", " t23", " t9"], [17, 23, 9]),
        ([[17], [23], [9]], [17, 23, 9]),
        (torch.tensor([17, 23, 9]), [17, 23, 9]),
        (torch.tensor([[17], [23], [9]]), [17, 23, 9]),
        ([torch.tensor([17]), 23, " t9"], [17, 23, 9]),
    ],
    ids=str,
)
def test_single_token_targets(target, ids, bridge, unchecked):
    """One for all or one for each, as text, token id, list or tensor; `NLL` is what it means."""
    grads = capture(bridge("llama"), target)
    assert grads.batch.targets == tuple((i,) for i in ids)
    check(grads, *hugging_face(nll_of(ids)))
    explicit = capture(bridge("llama"), bwlens.NLL(target))
    assert torch.equal(explicit.losses, grads.losses)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_targets_of_several_tokens_are_teacher_forced(reduction, side, bridge):
    tokens, mask, loss = cases.teacher_forced_nll(reduction=reduction)
    hf = tiny.hf_model("llama")
    losses = oracle.backward(hf, tokens, mask, loss)
    prompts, prompt_mask = cases.padded(PROMPTS, side)
    objective = bwlens.NLL(cases.TARGETS, reduction=reduction)
    grads = bwlens.capture(bridge("llama"), prompts, objective, attention_mask=prompt_mask)
    check(grads, hf, losses)
    assert grads.batch.tokens[1].tolist() == [7, 8, 23, 44, 0, 0, 0]
    assert grads.batch.last.tolist() == LAST


def test_one_target_of_several_tokens_for_one_prompt(bridge):
    model = bridge("llama")
    as_text = bwlens.capture(model, "t5 t9 t30", " t17 t23", prepend_bos=False)
    for target in ([17, 23], torch.tensor([17, 23]), torch.tensor([[17, 23]])):
        as_ids = bwlens.capture(model, torch.tensor([5, 9, 30]), target)
        assert as_ids.batch.targets == as_text.batch.targets == ((17, 23),)
        assert torch.equal(as_ids["W_in", 0].delta, as_text["W_in", 0].delta)


@pytest.mark.parametrize(
    ("target", "other"),
    [(17, 23), (" t17", " t23"), ([17, 9, 4], 23), ([17, 9, 4], torch.tensor([23, 5, 6]))],
    ids=str,
)
def test_logit_difference(target, other, bridge, unchecked):
    """logit(other) - logit(target): a step down raises the target."""
    targets = [17] * 3 if isinstance(target, int | str) else target
    others = [23] * 3 if isinstance(other, int | str) else other.tolist()

    def loss(logits):
        rows = logits[torch.arange(3), torch.tensor(LAST)]
        return torch.stack(
            [row[o] - row[t] for row, t, o in zip(rows, targets, others, strict=True)]
        )

    grads = capture(bridge("llama"), bwlens.LogitDifference(target, other))
    assert grads.batch.others == tuple((i,) for i in others)
    check(grads, *hugging_face(loss))


def test_custom_functions(bridge):
    """Any function of the logits, its own targets included."""

    def entropy(logits, batch):
        log_p = logits[torch.arange(len(batch)), batch.last].log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def by_hand(logits):
        log_p = logits[torch.arange(3), torch.tensor(LAST)].log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    grads = capture(bridge("llama"), entropy)
    assert grads.batch.targets == ()
    check(grads, *hugging_face(by_hand))

    class Margin:
        target = (17, 23, 9)

        def __call__(self, logits, batch):
            rows = logits[torch.arange(len(batch)), batch.last]
            ids = torch.tensor([ids[0] for ids in batch.targets])
            return rows.logsumexp(-1) - rows[torch.arange(len(batch)), ids]

    check(capture(bridge("llama"), Margin()), *hugging_face(nll_of(Margin.target)))


def test_all_real_tokens(bridge):
    """The training loss: each token from those before it, padding left out by the batch's mask."""

    def training(logits, batch):
        nll = -logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
        return (nll * batch.mask[:, 1:]).sum(1)

    def by_hand(logits):
        return torch.stack(
            [
                sum(-logits[i, k].log_softmax(-1)[row[k + 1]] for k in range(len(row) - 1))
                for i, row in enumerate(PROMPTS)
            ]
        )

    check(capture(bridge("llama"), training), *hugging_face(by_hand))


def test_as_objective():
    assert as_objective(" Paris") == bwlens.NLL(" Paris")
    assert as_objective(17) == bwlens.NLL(17)
    assert as_objective([17, 23]) == bwlens.NLL([17, 23])
    objective = bwlens.LogitDifference(1, 2)
    assert as_objective(objective) is objective
    assert isinstance(objective, bwlens.Objective)
    for wrong in (None, 1.5, {"target": 3}):
        with pytest.raises(TypeError, match=f"expected a target .* found {type(wrong).__name__}"):
            as_objective(wrong)


def test_malformed_objectives(bridge, unchecked):
    model, prompt = bridge("llama"), torch.tensor([5, 9, 30])
    with pytest.raises(ValueError, match="reduction is 'max'; expected 'mean' or 'sum'"):
        bwlens.NLL(17, reduction="max")
    for target, other, name in (([17, 23], 9, "target"), (17, " t9 t23", "other")):
        error = rf"single tokens, but the {name} of prompt 0 has 2: .* name another word or use NLL"
        with pytest.raises(ValueError, match=error):
            bwlens.capture(model, prompt, bwlens.LogitDifference(target, other))
    for objective in (bwlens.NLL(17), bwlens.LogitDifference(17, 23)):
        with pytest.raises(ValueError, match=r"this batch carries no token ids for (NLL|LogitD)"):
            bwlens.capture(model, prompt, lambda logits, batch, loss=objective: loss(logits, batch))
