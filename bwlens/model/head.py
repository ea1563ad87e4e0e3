"""The road from a residual vector to the vocabulary: the model's own final norm and unembedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from bwlens.model.sites import check_model, check_stream


@dataclass(frozen=True, eq=False)
class Head:
    """The road from a residual vector to the vocabulary: final norm, unembedding, soft cap.

    `logits = cap(scale * (norm(v) W_U + b_U))`, with `cap(s) = soft_cap tanh(s / soft_cap)`.
    `norm` takes and gives [n, 1, d_model]; `eps` is the final norm's; `centred` says whether it
    subtracts the mean (LayerNorm) or not (RMSNorm).
    """

    norm: Callable[[Tensor], Tensor]
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"] | None
    soft_cap: float | None
    scale: float
    eps: float
    centred: bool


def head_of(model: Any) -> Head:
    """The model's own final norm and unembedding."""
    check_model(model)
    check_stream(model)
    norm = getattr(model, "ln_final", None)
    cfg = model.cfg
    hf_config = getattr(getattr(model, "original_model", None), "config", None)
    cap = getattr(cfg, "output_logits_soft_cap", None)
    if cap is None or cap <= 0:
        cap = getattr(hf_config, "final_logit_softcapping", None)
    scale = getattr(hf_config, "logit_scale", None) or 1.0
    scale /= getattr(hf_config, "logits_scaling", None) or 1.0
    return Head(
        norm=norm if norm is not None else lambda v: v,
        W_U=model.unembed.W_U.detach(),
        b_U=None if model.unembed.b_U is None else model.unembed.b_U.detach(),
        soft_cap=float(cap) if cap is not None and cap > 0 else None,
        scale=float(scale),
        eps=_eps_of(norm, cfg),
        centred=_is_centred(norm, cfg),
    )


def _eps_of(norm: Any, cfg: Any) -> float:
    """The epsilon inside the final norm; 0 where there is no norm."""
    if norm is None or isinstance(norm, nn.Identity):
        return 0.0
    own = getattr(norm, "original_component", None)
    for holder, name in ((own, "eps"), (own, "variance_epsilon"), (norm, "eps"), (cfg, "eps")):
        value = getattr(holder, name, None)
        if isinstance(value, float):
            return value
    return 1e-5


def _is_centred(norm: Any, cfg: Any) -> bool:
    """Whether the final norm subtracts the mean."""
    if norm is None or isinstance(norm, nn.Identity):
        return False
    uses_rms = getattr(norm, "uses_rms_norm", None)
    if uses_rms is None:
        uses_rms = str(getattr(cfg, "normalization_type", "LN")).startswith("RMS")
    return not uses_rms
