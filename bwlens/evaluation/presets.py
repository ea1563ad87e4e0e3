"""The methods of Table 1, with settings that fit the model at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bwlens.data.given import OneEdit, as_edits
from bwlens.edit import WeightChange, fine_tune, gradient_step, mend
from bwlens.edit.keys import PREFIXES
from bwlens.edit.shift import default_layer
from bwlens.edit.smallest import smallest_steps
from bwlens.evaluation.methods import Method, editing_methods, named_method
from bwlens.model.identity import is_demo
from bwlens.model.passes import run
from bwlens.model.prompts import make_batch

_TITLES = {
    "rome": "ROME",
    "memit": "MEMIT",
    "alpha_edit": "AlphaEdit",
    "mend": "MEND",
    "none": "original",
}
_ORDER = ("gradient_step", "mend", "rome", "memit", "alpha_edit", "forward_pass_shift")

_DEMO: dict[str, dict[str, dict[str, Any]]] = {
    "rome": {
        "ROME, last token": {"layer": 4, "position": "last", "clamp": 5.0, "prefixes": PREFIXES},
        "ROME, subject's token": {"layer": 0, "prefixes": PREFIXES},
    },
    "memit": {
        "MEMIT, last token": {
            "layers": [3, 4, 5],
            "position": "last",
            "weight": 100.0,
            "prefixes": PREFIXES,
        },
    },
    "alpha_edit": {
        "AlphaEdit, last token": {"layers": [3, 4, 5], "position": "last", "prefixes": PREFIXES},
    },
}
"""Settings for the demo model, where a method's own defaults are made for GPT-2 xl.

Chosen on records with even numbers. Attention has read the subject by layer 1 there, so ROME and
MEMIT do better at the prompt's last token than at the subject's; of ROME both are shown.
"""


def table1_methods(model: Any, fitted: Any = None) -> tuple[Method, ...]:
    """The model as it is, then every method there is, in the order of the paper's Table 1.

    Fine-tuning is done at the first layer and where the shift writes (layers 0 and 35 of GPT-2 xl,
    as in the paper); the gradient step takes the smallest step that makes the answer the new one;
    the others come with their own defaults. MEND takes part with `fitted`, a `bwlens.edit.Mend`.
    """
    held = editing_methods()
    layers = dict.fromkeys((0, default_layer(model)))
    tuned = [
        Method(f"fine-tuning, MLP {layer}", fine_tune, {"layers": [layer]}) for layer in layers
    ]
    own = {**held, "gradient_step": smallest_gradient_step, "mend": partial(mend, fitted=fitted)}
    left_out = {"fine_tune", "mapped_shift", *(("mend",) if fitted is None else ())}
    rest = [name for name in held if name not in _ORDER]
    names = [name for name in (*_ORDER, *rest) if name in held and name not in left_out]
    return (
        Method("original"),
        *tuned,
        *(
            Method(title, own[name], settings)
            for name in names
            for title, settings in _fitting(model, name).items()
        ),
    )


def preset(model: Any, name: str) -> Method:
    """A method by its name, under that name, with settings for those that cannot do without.

    Raises:
        ValueError: There is no such method.
    """
    function = named_method(name)
    if name == "gradient_step":
        return Method(name, smallest_gradient_step)
    if name == "fine_tune":
        return Method(name, fine_tune, {"layers": [default_layer(model)]})
    return Method(name, function, next(iter(_fitting(model, name).values())))


def _fitting(model: Any, name: str) -> dict[str, dict[str, Any]]:
    """What a method is called in a table, once or more, and the settings that go with it."""
    plain: dict[str, dict[str, Any]] = {method_title(name): {}}
    return _DEMO.get(name, plain) if is_demo(model) else plain


def method_title(name: str) -> str:
    """What a table calls a method."""
    return _TITLES.get(name, name.replace("_", " "))


def smallest_gradient_step(
    model: Any,
    edit: OneEdit,
    *,
    matrices: Sequence[str] = ("W_out",),
    layers: Sequence[int] | None = None,
    most: int = 20,
    prepend_bos: bool | None = None,
) -> WeightChange:
    """One gradient step, as small as makes the new answer the most probable one.

    The gradient is taken once; each try is one forward pass, after `most` of which that never
    flipped the answer there is no more. The step is within 3 % of the smallest.

    Raises:
        ValueError: No step flips the answer, or the step is so large that weights overflow.
    """
    (edit,) = as_edits(edit)
    batch = make_batch(model, edit.text, edit.target_new, prepend_bos=prepend_bos)
    (target,), last = batch.targets, int(batch.last[0])

    def flips(change: WeightChange) -> bool:
        with change.applied(model):
            logits = run(model, batch.tokens).logits[0]
        return logits[last : last + len(target)].argmax(-1).tolist() == list(target)

    if flips(WeightChange()):
        return WeightChange(note="the target is the answer already")
    unit = gradient_step(
        model, edit, lr=1.0, matrices=matrices, layers=layers, prepend_bos=prepend_bos
    )

    def works(steps: torch.Tensor) -> torch.Tensor:
        return torch.tensor([flips(float(steps) * unit)])

    lr = float(smallest_steps(works, torch.tensor([0.01]), within=1.03, most=most))
    if math.isnan(lr):
        raise ValueError(
            f"no gradient step within {most} tries makes {edit.target_new!r} the answer"
        )
    return lr * unit
