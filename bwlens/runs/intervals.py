"""Means over prompts with bootstrap confidence intervals, many groups at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 1000
"""Number of bootstrap resamples."""


class MeanCI(NamedTuple):
    """Means of groups with the ends of their intervals; nan for a group without values."""

    mean: Float[np.ndarray, " groups"]
    low: Float[np.ndarray, " groups"]
    high: Float[np.ndarray, " groups"]
    n: Int[np.ndarray, " groups"]


def mean_ci(
    values: Float[np.ndarray, "prompts groups"], level: float = 0.95, seed: int = 0
) -> MeanCI:
    """The mean of each column over the prompts that have a value, with its bootstrap interval.

    The percentile bootstrap: prompts are drawn with replacement, all columns of a prompt together,
    and the interval holds the middle `level` of the resampled means. nan marks a missing value.
    A group with an infinite value has no finite mean, and no interval: its ends are the mean.

    Raises:
        ValueError: `level` is not between 0 and 1.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    >>> mean_ci(np.array([[1.0], [1.0], [1.0]])).high
    array([1.])
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, such as 0.95")
    there = ~np.isnan(values)
    filled = np.where(there, values, 0.0)
    counts = there.sum(0)
    n_prompts = len(values)
    if n_prompts == 0:
        blank = np.full(values.shape[1], np.nan)
        return MeanCI(blank, blank, blank, counts)
    draws = resamples(n_prompts, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(0) / counts
        means = (draws @ filled) / (draws @ there.astype(float))
    return MeanCI(mean, *percentiles(means, mean, level), counts)


def resamples(n: int, seed: int = 0) -> Float[np.ndarray, "resample n"]:
    """How often each of n prompts is drawn in each bootstrap sample; the same for a seed.

    The means of all groups in all samples are then one matrix product.
    """
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return drawn.astype(float)  # products of integers are not left to BLAS


def percentiles(
    resampled: Float[np.ndarray, "resample groups"],
    mean: Float[np.ndarray, " groups"],
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " groups"], Float[np.ndarray, " groups"]]:
    """The ends of the middle `level` of resampled means; those of a mean not finite are itself."""
    ends = np.full((2, len(mean)), np.nan)
    if (some := np.isfinite(mean)).any():
        tail = (1 - level) / 2
        ends[:, some] = np.nanquantile(resampled[:, some], (tail, 1 - tail), axis=0)
    # Where all values are alike, rounding must not put the mean outside its interval.
    return np.fmin(ends[0], mean), np.fmax(ends[1], mean)


def summarize(
    rows: pd.DataFrame,
    by: Sequence[str],
    values: Sequence[str],
    unit: str = "item",
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The mean over prompts of each value in each group, tidy, with counts and intervals.

    Args:
        rows: Tidy rows; several of one prompt in one group are averaged first, so that each
            prompt has one vote.
        by: Columns that make a group.
        values: Columns to average; nan is no value.
        unit: The column that names the prompt.
        level: Share of the resampled means that an interval holds.
        seed: Of the bootstrap.

    Returns:
        Columns `by`, then `quantity`, `mean`, `low`, `high`, `n` (prompts with a value).
    """
    import pandas as pd

    by = list(by)
    grouped = rows.groupby(by, sort=False, observed=True, dropna=False)
    group = grouped.ngroup().to_numpy()
    names = rows[by].drop_duplicates(ignore_index=True)
    prompt, prompts = pd.factorize(rows[unit])
    cell = prompt * len(names) + group
    shape = (len(prompts), len(names))
    frames = []
    for value in values:
        column = rows[value].to_numpy(dtype=float)
        there = ~np.isnan(column)
        total, count = (
            np.bincount(cell[there], weights, minlength=shape[0] * shape[1]).reshape(shape)
            for weights in (column[there], None)
        )
        with np.errstate(invalid="ignore"):
            found = mean_ci(total / count, level, seed)
        groups = names.assign(quantity=value, **found._asdict())
        frames.append(groups[groups["n"] > 0])
    summary = pd.concat(frames, ignore_index=True)
    texts = summary.select_dtypes("category").columns
    return summary.astype(dict.fromkeys(texts, str))
