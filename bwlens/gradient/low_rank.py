"""A weight's gradient as the rows that made it.

A weight W [d_in, d_out] computes z = x W, one row per token position. Its gradient is a sum of one
outer product per row, dL/dW = sum_i outer(x_i, delta_i) = x^T delta, with x_i the row that entered
W and delta_i = dL/dz_i its vector-Jacobian product.

Sign: a gradient is dL/dW, the direction of ascent. A descent step is W - lr * gradient.

Source: Katz, Belinkov, Geva and Wolf, "Backward Lens", EMNLP 2024, section 4 and Lemma 4.1.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves unique and others of its functions untyped.)

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from bwlens.gradient.matrix import LowRankMatrix as LowRankMatrix
from bwlens.gradient.matrix import described


@dataclass(frozen=True, eq=False, repr=False)
class LowRankGradient(LowRankMatrix):
    """The gradient dL/dW = x^T delta of a weight W [d_in, d_out], and where its rows came from.

    - `x` [n, d_in]: the rows that entered W, in the units of the activations.
    - `delta` [n, d_out]: dL/dz, loss per unit of W's output.
    - `prompt`, `pos` [n], optional: the prompt and the token position each row came from.

    >>> LowRankGradient(torch.ones(1, 3), torch.ones(1, 2), prompt=torch.tensor([7])).prompts
    [7]
    """

    prompt: Int[Tensor, " n"] | None = None
    pos: Int[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, index in (("prompt", self.prompt), ("pos", self.pos)):
            if index is None:
                continue
            integers = not (index.is_floating_point() or index.is_complex())
            if index.shape != (self.n,) or not integers or index.dtype == torch.bool:
                raise ValueError(
                    f"{name} is {described(index)}; expected {self.n} integers, one per row of x."
                )
            object.__setattr__(self, name, index.to(self.device))

    @property
    def prompts(self) -> list[int]:
        """The numbers of the prompts with rows here, ascending; ValueError if none were kept."""
        return self._index("prompt").unique().tolist()

    def for_prompt(self, prompt: int) -> "LowRankGradient":
        """One prompt's part of the gradient; ValueError if it has no rows."""
        return self._rows_where("prompt", prompt)

    def at(self, pos: int) -> "LowRankGradient":
        """One token position's part, over all prompts; ValueError if it has no rows."""
        return self._rows_where("pos", pos)

    def split(self) -> "list[LowRankGradient]":
        """One gradient per prompt, in the order of `prompts`; their sum is this gradient.

        Raises ValueError if no prompt numbers were kept.

        >>> g = LowRankGradient(torch.ones(3, 8), torch.ones(3, 7), prompt=torch.tensor([0, 0, 1]))
        >>> [part.n for part in g.split()]
        [2, 1]
        """
        return [self.for_prompt(prompt) for prompt in self.prompts]

    def _index(self, name: str) -> Int[Tensor, " n"]:
        index = getattr(self, name)
        if index is None:
            raise ValueError(
                f"this gradient does not say which {name} its rows came from; expected "
                f"LowRankGradient(x, delta, {name}=...), one integer per row."
            )
        return index

    def _rows_where(self, name: str, value: int) -> "LowRankGradient":
        index = self._index(name)
        rows = (index == value).nonzero().flatten()
        if not len(rows):
            known = index.unique().tolist()
            shown = known if len(known) <= 8 else [*known[:4], "...", *known[-2:]]
            raise ValueError(f"no row has {name} {value}; expected one of {shown}.")
        parts = (None if part is None else part[rows] for part in (self.prompt, self.pos))
        return LowRankGradient(self.x[rows], self.delta[rows], *parts)
