"""A record, a change and a model that are made up, and whether a model is as before."""

from contextlib import contextmanager

import pandas as pd
import torch

from bwlens.data.records import Record
from bwlens.edit import WeightChange
from bwlens.gradient.low_rank import LowRankGradient
from bwlens.model.prompts import Edit

QUICK = {"generation_every": 0, "perplexity_every": 0, "greedy_tokens": 2, "progress": False}


def record(new=" t17", true=" t9", case_id=0):
    """A made-up record in the tiny tokenizer's words, with answers of one or more tokens."""
    return Record(
        case_id,
        Edit("t20 {} t21", "t5 t6", new, true),
        "made-up",
        paraphrase_prompts=("t8 t5 t6", "t5 t6 t22 t23 t24"),
        neighborhood_prompts=("t20 t7 t21", "t20 t10 t11 t21", "t20 t7 t21"),
        attribute_prompts=("t30 t31",),
        generation_prompts=("t5 t6 t40", "t41"),
        reference_texts=("t50 t51 t52 and t53",),
    )


def nudge(model, edit, scale=0.5, layer=1):
    """A change like any other: the same for each edit with the same words."""
    weight = model.blocks[layer].mlp
    d_mlp, d_model = model.cfg.d_mlp, model.cfg.d_model
    assert weight is not None
    generator = torch.Generator().manual_seed(len(edit.text))
    x = torch.randn(1, d_mlp, generator=generator)
    delta = scale * torch.randn(1, d_model, generator=generator)
    return WeightChange({("W_out", layer): LowRankGradient(x, delta)}, note="nudged")


def count_hooks(model):
    modules = [*model.modules(), *model.original_model.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def slow_answer(model, prompt, target):
    """One prompt, one answer, one token after the other."""
    ids = model.to_tokens(prompt, truncate=False)[0].tolist()
    answer = model.to_tokens(prompt + target, truncate=False)[0].tolist()[len(ids) :]
    nll, right = [], True
    for token in answer:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), return_type="logits")[0, -1].double()
        nll.append(-float(logits.log_softmax(-1)[token]))
        right = right and int(logits.argmax()) == token
        ids.append(token)
    return sum(nll) / len(nll), right


@contextmanager
def tokens_read(model):
    """How many tokens each forward pass reads."""
    read = []
    handle = model.embed.register_forward_hook(lambda m, args, out: read.append(args[0].numel()))
    try:
        yield read
    finally:
        handle.remove()


def same(a, b):
    pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"))
