"""How long a prompt may be: what the model can read, and what it was made to read."""

# pyright: reportPrivateUsage=false
# (torch has no other way to a module's own children and tensors.)

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bwlens.model.passes import device_of, run
from bwlens.model.protocol import LensModel
from bwlens.model.reasons import one_line

_OFFSETS = range(9)
"""Rows that a table of positions may have beyond its context: OPT's begins at 2."""

_RUNS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""The longest prompt past its context that a model has been seen to read."""


def check_length(model: LensModel, rows: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that the model cannot read, and warn of those longer than it was made for.

    A table of positions ends where it does; a model without one (rotary, ALiBi) mostly reads on,
    which is tried, once a length.

    Raises:
        ValueError: A prompt is longer than the model can read.
    """
    n_ctx = getattr(model.cfg, "n_ctx", None)
    longest = max(range(len(rows)), key=lambda index: len(rows[index]))
    length = len(rows[longest])
    if n_ctx is None or length <= n_ctx:
        return
    has = f"prompt {longest} has {length} tokens, but"
    if has_table(model, n_ctx):
        raise ValueError(f"{has} the model's context holds {n_ctx}; shorten it")
    if length > (_RUNS.get(model) or n_ctx):
        if (error := _failure(model, rows[longest])) is not None:
            raise ValueError(
                f"{has} the model was made for {n_ctx} and cannot read so many ({error}); shorten"
                f" it"
            )
        _RUNS[model] = length
    warnings.warn(
        f"a prompt is longer than the {n_ctx} tokens that the model was made for; it reads on, but"
        f" may not understand what it reads",
        stacklevel=1,
    )


def has_table(model: LensModel, n_ctx: int) -> bool:
    """Whether the model looks its positions up in a table as long as its context.

    An embedding beside the tokens' own (GPT-2, OPT), or a buffer of sines or a mask of that length
    (GPT-J, GPT-Neo, HookedTransformer).
    """
    lengths = [n_ctx + offset for offset in _OFFSETS]
    tokens = {id(module) for module in model.get_submodule("embed").modules()}
    for module in model.modules():
        own = isinstance(module, nn.Embedding) and id(module) not in tokens
        if own and module.num_embeddings in lengths:
            return True
        if any(
            buffer is not None and buffer.ndim > 1 and set(buffer.shape) & set(lengths)
            for buffer in module._buffers.values()
        ):
            return True
    return False


def _failure(model: LensModel, row: Sequence[int]) -> str | None:
    """Why the model does not read these tokens; None where it does."""
    try:
        run(model, torch.tensor([list(row)], device=device_of(model)))
    except (RuntimeError, IndexError, ValueError) as error:
        return one_line(error)
    return None
