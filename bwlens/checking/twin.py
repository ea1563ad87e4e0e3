"""Whether a bridge computes what the Hugging Face model inside it would compute without it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from bwlens.checking.report import Finding
from bwlens.model.probing import logits_and
from bwlens.model.prompts import Batch

_NAME = "Hugging Face"


def same_as_hugging_face(model: Any, batch: Batch) -> Finding:
    """The bridge's logits against those of a plain model of the same class, config and weights."""
    wrapped: Any = getattr(model, "original_model", None)
    if not hasattr(type(wrapped), "_from_config"):
        return Finding.skipped(_NAME, "the model wraps no Hugging Face model to compare with")
    if getattr(model, "compatibility_mode", False):
        why = "compatibility mode has processed the weights; check the model before it"
        return Finding.skipped(_NAME, why)
    devices = {p.device for p in wrapped.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        return Finding.skipped(_NAME, "the model is spread over several devices, or not in memory")
    twin = twin_of(wrapped)
    if isinstance(twin, str):
        return Finding.skipped(_NAME, twin)
    own, _ = logits_and(model, set(), batch.tokens)
    with torch.no_grad():
        plain = twin(batch.tokens, use_cache=False).logits
    own, plain = own.flatten(0, -2).double(), plain.flatten(0, -2).double().to(own.device)
    spread = (plain - plain.mean(1, keepdim=True)).norm(dim=1).clamp_min(1e-30)
    error = float(((own - plain).norm(dim=1) / spread).max())
    limit = max(1e-3, 8 * torch.finfo(model.unembed.W_U.dtype).eps)
    figures = f"logits off by {error:.1e} of their spread"
    ok = "TransformerLens computes what transformers computes"
    fails = (
        "TransformerLens runs this model otherwise than transformers does (an option of its config"
        " that the bridge does not know), or the bridge's own q, k and v were edited: bwlens is"
        " true to what the bridge computes, which is not what the model was trained as"
    )
    return Finding.measured(_NAME, figures, error, limit, ok=ok, fails=fails)


def twin_of(wrapped: nn.Module) -> nn.Module | str:
    """A plain model that computes with the very weights of a bridged one, or why there is none.

    The bridge stands in the wrapped model's own tree, so a second one is made from the config,
    without weights, and given the first one's: nothing is copied.
    """
    from accelerate import init_empty_weights

    tensors: dict[str, Any] = dict(wrapped.named_parameters(remove_duplicate=False))
    tensors |= dict(wrapped.named_buffers(remove_duplicate=False))
    own = {re.sub(r"\b_original_component\.", "", name): t for name, t in tensors.items()}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), init_empty_weights(include_buffers=False):
        made: Any = type(wrapped)
        twin = made._from_config(wrapped.config)
    missing = []
    for name, tensor in twin.state_dict(keep_vars=True).items():
        given = own.get(name)
        if given is None or given.shape != tensor.shape:
            missing.append(name)
            continue
        module, _, attribute = name.rpartition(".")
        owner = twin.get_submodule(module)
        if attribute in owner._parameters:
            owner._parameters[attribute] = nn.Parameter(given.detach(), requires_grad=False)
        else:
            owner._buffers[attribute] = given.detach()
    if missing:
        return (
            f"{len(missing)} weights of {type(wrapped).__name__} are not to be found in the bridge"
            f" ({missing[0]}, ...), so no plain model can be made of them"
        )
    home = next(iter(own.values())).device
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(home)
    return twin.eval()
