"""What experiments on heads share: some prompts come first, others judge, by targets' ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bwlens.runs.intervals import summarize

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TOP = (1, 2, 3)
"""A target counts as said where it is among so many of the likeliest."""

_STYLES: list[Any] = [
    "-", "--", ":", "-.", (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (5, 1)), (0, (1, 3)),
]  # fmt: skip


def check_split(n: int, n_targets: int, first: int, name: str, verb: str) -> None:
    """Refuse prompts of which none is left for one of both uses."""
    if n != n_targets:
        raise ValueError(f"{n} prompts but {n_targets} targets; expected one for each")
    if not 1 <= first < n:
        raise ValueError(
            f"{name} is {first} of {n} prompts; expected at least one that {verb} and one that"
            f" judges"
        )


def check_names(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that are not known, and none."""
    if not given or {*given} - {*known}:
        raise ValueError(f"{what} {list(given)!r}; expected some of {', '.join(known)}")


def by_rank(ranks: Sequence[int]) -> pd.DataFrame:
    """A row a prompt: `prompt`, `rank` of the target's first token (0: the answer), `top1` to 3."""
    import pandas as pd

    at = np.asarray(ranks)
    columns = {f"top{k}": at < k for k in TOP}
    return pd.DataFrame({"prompt": range(len(at)), "rank": at, **columns})


def means(rows: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """The mean of a column over prompts with its 95 % interval and `n`, in each group."""
    return summarize(rows, by, [value], unit="prompt").drop(columns="quantity")


def lines(summary: pd.DataFrame, kinds: Sequence[str], by: str, over: str) -> tuple[Figure, Any]:
    """A line with its interval for each kind, over a setting."""
    from bwlens.show.drawing import axes, plain

    figure, ax = axes(None, (3.6, 2.6))
    for kind, style in zip(kinds, _STYLES, strict=False):
        own: Any = summary[summary[by] == kind]
        line = own.sort_values(over)
        if len(line):
            (drawn,) = ax.plot(line[over], line["mean"], linestyle=style, label=kind, lw=1)
            color = drawn.get_color()
            ax.fill_between(line[over], line["low"], line["high"], color=color, alpha=0.1)
    ax.legend(fontsize=5, frameon=False)
    plain(ax)
    return figure, ax
