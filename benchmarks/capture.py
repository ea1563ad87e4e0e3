"""Capturing x and delta, beside the bare passes and beside a full backward pass."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

import bwlens
from benchmarks.measure import Note, Row, peak_bytes, race, timed, weigh
from benchmarks.model import TARGET
from benchmarks.setting import Setting


def capture(setting: Setting) -> list[Row | Note]:
    """`bwlens.capture` of W_in and W_out in all layers."""
    model, tokens, repeats = setting.model, setting.tokens, setting.repeats

    def ours() -> Any:
        return bwlens.capture(model, tokens, TARGET)

    def floor() -> Any:
        return bare(model, tokens)

    def full() -> Any:
        loss_of(model, tokens).backward()

    def forget() -> None:
        for parameter in model.parameters():
            parameter.grad = None

    rows = [
        race("capture / bare forward + autograd.grad", timed(ours), timed(floor), repeats, 1.10),
        race("capture / full loss.backward()", timed(ours), timed(full, forget), repeats, 0.5),
    ]
    forget()
    weights = peak_bytes(full)
    forget()
    return [*rows, weigh("capture / full backward, peak memory", peak_bytes(ours), weights, 0.2)]


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens[None], return_type="logits")
    return torch.nn.functional.cross_entropy(logits[:, -1], torch.tensor([TARGET]))


def bare(model: Any, tokens: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """x and delta by PyTorch alone: a hook on each linear map, nothing checked or put in order."""
    xs: list[Tensor] = []
    zs: list[Tensor] = []

    def note(module: Any, args: Any, output: Tensor) -> None:
        xs.append(args[0].detach())
        zs.append(output)

    with ExitStack() as stack:
        for block in model.blocks:
            for linear in (getattr(block.mlp, "in"), block.mlp.out):
                handle = linear.original_component.register_forward_hook(note)
                stack.callback(handle.remove)
        loss = loss_of(model, tokens)
    return xs, torch.autograd.grad(loss, zs)
