"""A prompt run again and again, each time with something added where a weight's z passes.

The rows of a batch are all the same prompt, and differ in what is added to them. So the blocks
below the lowest change need not run: they give what they gave before. And only the positions whose
logits are wanted pass the unembedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bwlens.model.locking import alone_with
from bwlens.model.passes import in_eval_mode
from bwlens.model.places import Point

Addition = Float[Tensor, "rows pos width"]
"""What is added to what passes a point, for each row; 0 where nothing is."""


class Replay:
    """One prompt's forward pass, to be run again under changes.

    Args:
        model: A TransformerBridge or HookedTransformer.
        tokens: Token ids [pos] of one prompt.
        positions: The positions whose logits are wanted.

    Attributes:
        logits: Those logits [position, d_vocab] without any change, float32 at least.
    """

    def __init__(self, model: Any, tokens: Int[Tensor, " pos"], positions: Sequence[int]) -> None:
        self._model, self._tokens = model, tokens
        self._positions = torch.tensor(list(positions), device=tokens.device)
        self._left: list[Any] = [None] * len(model.blocks)
        hooks = [(block, self._keep(layer)) for layer, block in enumerate(model.blocks)]
        self.logits: Float[Tensor, "position d_vocab"] = self._run(1, hooks)[0]

    def __call__(
        self, additions: Mapping[tuple[Point, ...], Addition], layer: int = 0
    ) -> Float[Tensor, "rows position d_vocab"]:
        """The logits of each row, with its own additions.

        Args:
            additions: What is added where z passes: at the first of the points that fires.
            layer: No addition is in a block below this one.
        """
        n_rows = len(next(iter(additions.values())))
        hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        for points, added in additions.items():
            once = _Adding(added)
            hooks += [(point.module, once.at(point)) for point in points]
        logits = self._run(n_rows, hooks, layer)
        return logits

    def reading(self, places: Sequence[int]) -> Replay:
        """The same with only some of its positions, as places among them; no pass is run."""
        other = copy(self)
        other.logits = self.logits[list(places)]
        other._positions = self._positions[list(places)]
        return other

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._left[layer] = output

        return hook

    def _run(
        self, n_rows: int, hooks: list[tuple[nn.Module, Callable[..., Any]]], layer: int = 0
    ) -> Tensor:
        model = self._model
        with ExitStack() as stack:
            stack.enter_context(alone_with(model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(in_eval_mode(model))
            for below in range(layer):
                stack.enter_context(_giving(model.blocks[below], self._left[layer - 1], n_rows))
            for module, hook in hooks:
                stack.callback(module.register_forward_hook(hook).remove)
            # Not before the final norm: GPT-2 reshapes what leaves it to all positions.
            only = model.unembed.register_forward_pre_hook(self._wanted, with_kwargs=True)
            stack.callback(only.remove)
            tokens = self._tokens.expand(n_rows, -1)
            logits = model(tokens, return_type="logits", padding_side="right")
        return logits if logits.dtype == torch.float64 else logits.float()

    def _wanted(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Let only the positions that are wanted on."""
        if args:
            return (args[0][:, self._positions.to(args[0].device)], *args[1:]), kwargs
        name, stream = next(iter(kwargs.items()))
        return args, {**kwargs, name: stream[:, self._positions.to(stream.device)]}


class _giving:
    """Make a block give what it gave before, without running."""

    def __init__(self, block: nn.Module, output: Any, n_rows: int) -> None:
        self._block, self._output, self._n = block, output, n_rows

    def __enter__(self) -> None:
        output = self._output

        def expanded(part: Any) -> Any:
            if not isinstance(part, Tensor) or part.ndim < 2:
                return part
            return part.expand(self._n, *part.shape[1:])

        given = tuple(map(expanded, output)) if isinstance(output, tuple) else expanded(output)
        self._block.__dict__["forward"] = lambda *args, **kwargs: given

    def __exit__(self, *_: Any) -> None:
        del self._block.__dict__["forward"]


class _Adding:
    """Adds to what passes the first of some points that fires."""

    def __init__(self, added: Addition) -> None:
        self._added = added
        self._point: Point | None = None

    def at(self, point: Point) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._point not in (None, point):
                return None  # what was added there is in it already
            self._point = point
            z = output[0] if isinstance(output, tuple) else output
            changed = z + self._added.to(z).view_as(z)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook
