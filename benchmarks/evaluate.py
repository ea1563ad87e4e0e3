"""An evaluation against a naive loop; one shift against one forward pass of its prompt."""

from __future__ import annotations

import copy
from typing import Any

import torch

import bwlens
from benchmarks.measure import Note, Row, race, timed
from benchmarks.setting import Setting
from bwlens.data.records import Record
from bwlens.edit import forward_pass_shift
from bwlens.evaluation.harness import Harness
from bwlens.evaluation.measuring import Options
from bwlens.evaluation.methods import methods_of

N_RECORDS = 6
SETTINGS = {"layer": 5, "lr": 0.1}


def evaluate(setting: Setting) -> list[Row | Note]:
    """The demo model's own records, edited by a shift of given layer and step."""
    model, n = setting.demo, setting.prompts or (1 if setting.quick else N_RECORDS)
    records = bwlens.read_records("demo").sample(n, seed=setting.seed)
    # No greedy text, no generation, no perplexity: the loop has none, either.
    options = Options(generation_every=0, greedy_tokens=0, perplexity_every=0)
    methods = methods_of("forward_pass_shift", SETTINGS)
    harness = Harness(model, methods, records, options=options)
    edit = records[0].edit
    tokens = model.to_tokens(edit.text)

    def ours() -> Any:
        return harness.run(progress=False)

    def naive() -> Any:
        return [_alone(model, record) for record in records]

    def shift() -> Any:
        return forward_pass_shift(model, edit, layer=SETTINGS["layer"], lr=SETTINGS["lr"])

    def forward() -> Any:
        with torch.no_grad():
            return model(tokens, return_type="logits")

    repeats = setting.repeats
    return [
        race(
            f"{n} records evaluated / a copy of the model each, prompt by prompt, throughput",
            timed(ours),
            timed(naive),
            repeats,
            5.0,
            throughput=True,
        ),
        race(
            "forward pass shift, layer and step given / forward pass of the prompt",
            timed(lambda: [shift() for _ in range(10)]),
            timed(lambda: [forward() for _ in range(10)]),
            repeats,
            1.5,
        ),
        Note(
            f"evaluate: the demo model, {tokens.shape[1]} tokens in the shifted prompt;"
            f" {sum(map(_n_prompts, records))} prompts in {n} records"
        ),
    ]


def _alone(model: Any, record: Record) -> list[float]:
    """A changed deep copy of the model, asked for each answer to each prompt by itself."""
    edit = record.edit
    change = forward_pass_shift(model, edit, layer=5, lr=0.1)
    twin = copy.deepcopy(model)
    change.apply(twin)
    prompts = [
        edit.text,
        *record.paraphrase_prompts,
        *record.neighborhood_prompts,
        *record.attribute_prompts,
    ]
    found = []
    for prompt in prompts:
        for target in (edit.target_new, edit.target_true):
            ids = twin.to_tokens(prompt)
            answer = twin.to_tokens(prompt + str(target))[0, ids.shape[1] :]
            with torch.no_grad():
                logits = twin(torch.cat([ids, answer[None, :-1]], 1), return_type="logits")
            read = logits[0, ids.shape[1] - 1 :].log_softmax(-1)
            found.append(-float(read.gather(1, answer[:, None]).mean()))
    return found


def _n_prompts(record: Record) -> int:
    lists = (record.paraphrase_prompts, record.neighborhood_prompts, record.attribute_prompts)
    return 1 + sum(map(len, lists))
