"""Modules that deal with each token by itself, and letting only some tokens pass them.

Where passes differ at some tokens alone, the others need not be computed again: what left these
modules before stands there. Attention's own arithmetic still sees every token.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch and transformers leave some of their functions untyped.)
# pyright: reportPrivateUsage=false
# (torch has no other way to a module's own hooks.)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bwlens.model.blocks import dense_mlps


@dataclass(frozen=True, eq=False)
class Partly:
    """Modules that only some tokens pass.

    Attributes:
        rows: Those tokens' rows of the flattened batch.
        left: Each module, with what left it when all passed [batch, pos, d].
    """

    rows: Int[Tensor, " n"]
    left: Mapping[nn.Module, Tensor]

    def passing(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Tensor:
        """What the module's forward gives these tokens, among what left it at the others."""
        left = self.left[module]
        n_tokens, rows = left.shape[:-1].numel(), self.rows.to(left.device)

        def few(given: Any) -> Any:
            by_token = isinstance(given, Tensor) and given.shape[:-1].numel() == n_tokens
            return given.flatten(0, -2)[rows][None] if by_token else given

        new = forward(*map(few, args), **{name: few(given) for name, given in kwargs.items()})
        return left.flatten(0, -2).index_copy(0, rows, new.flatten(0, -2)).view(left.shape)


def linear_maps(module: nn.Module) -> list[nn.Module]:
    """The linear maps inside a module."""
    return [part for part in module.modules() if isinstance(part, nn.Linear | Conv1D)]


def token_wise(block: nn.Module) -> list[nn.Module]:
    """The parts of a block that deal with each token by itself, none inside another.

    MLPs that nobody watches or changes from inside, and linear maps.
    """
    mlps = [mlp for mlp in dense_mlps(block) if not any(map(_hooked, mlp.modules()))]
    within = {part for mlp in mlps for part in mlp.modules()}
    return [*mlps, *(part for part in linear_maps(block) if part not in within)]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
