"""What an evaluation found: a row for each record and method, means, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from bwlens.evaluation.metrics import METRICS
from bwlens.runs.intervals import percentiles, resamples
from bwlens.runs.parts import Failure

if TYPE_CHECKING:
    import pandas as pd

MEASURED = tuple(name for name in METRICS if name != "S")
"""The metrics of a single row; S is a mean's."""

COLUMNS = ["item", "case_id", "relation", "method", *MEASURED, "norm", "note"]
"""The columns of the rows."""

_OF_SCORE = ("ES", "PS", "NS")


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Rows of measurements, with what can be said about them.

    Attributes:
        rows: A row for each record and method; columns are `METRICS` (in percent; nan where there
            was nothing to measure), the change's `norm`, and what the method had to say (`note`).
        failures: What could not be edited or measured; -1 stands for all records of a method.
        n_records: Number of records the evaluation was about.

    Example:
        >>> evaluation = bwlens.evaluate(model, ["rome", "memit"])   # doctest: +SKIP
        >>> evaluation["rome"].compare(evaluation["memit"])          # doctest: +SKIP
    """

    rows: pd.DataFrame
    failures: tuple[Failure, ...] = ()
    n_records: int = 0

    @property
    def methods(self) -> list[str]:
        """The methods' names, in their order."""
        return list(dict.fromkeys(self.rows["method"]))

    @property
    def notes(self) -> list[str]:
        """What concerns a method as such: that it cannot run here, and why."""
        return [failure.message for failure in self.failures if failure.item < 0]

    @property
    def blank(self) -> list[str]:
        """The metrics that no row has a value of."""
        return [name for name in MEASURED if not self.rows[name].notna().any()]

    def __getitem__(self, method: str) -> Evaluation:
        """The rows of one method.

        Raises:
            KeyError: There is no such method here.
        """
        if method not in self.methods:
            raise KeyError(f"{method!r} was not evaluated here; {', '.join(self.methods)} were")
        kept = self.rows[self.rows["method"] == method].reset_index(drop=True)
        return replace(self, rows=kept)

    @staticmethod
    def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
        """The methods of several evaluations of the same records beside each other.

        Raises:
            ValueError: None are given, their records differ, or two hold the same method.
        """
        import pandas as pd

        if not evaluations:
            raise ValueError("there are no evaluations to join")
        first = evaluations[0]
        cases: dict[int, int] = {}
        methods: list[str] = []
        for one in evaluations:
            if again := [name for name in one.methods if name in methods]:
                raise ValueError(f"{again[0]!r} is in two of the evaluations; expected it in one")
            methods += one.methods
            here = dict(zip(one.rows["item"], one.rows["case_id"], strict=True))
            if one.n_records != first.n_records or any(
                cases.get(item, case) != case for item, case in here.items()
            ):
                raise ValueError("the evaluations are not of the same records")
            cases |= here
        rows = pd.concat([one.rows for one in evaluations], ignore_index=True)
        failures = tuple(dict.fromkeys(f for one in evaluations for f in one.failures))
        return Evaluation(rows, failures, first.n_records)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """For each method and metric: `mean`, spread `sd` over records, 95 % interval, `n`.

        The interval `low` to `high` is the percentile bootstrap's over records. S is the harmonic
        mean of the means of ES, PS and NS over the records that have all three, and has no spread.
        """
        import pandas as pd

        frames = [
            _summary(self[method].rows.set_index("item")).assign(method=method)
            for method in self.methods
        ]
        columns = ["method", "metric", "mean", "sd", "low", "high", "n"]
        if not frames:
            return pd.DataFrame(columns=columns)
        return pd.concat(frames, ignore_index=True).loc[:, columns]

    def compare(self, other: Evaluation) -> pd.DataFrame:
        """Differences between two methods on the records that both have, `self - other`.

        Returns:
            `metric`, the mean `difference`, its 95 % bootstrap interval `low` to `high` over
            records (pairs are drawn together) and `n`. Where the interval does not hold 0, the
            methods differ by more than the choice of records explains.

        Raises:
            ValueError: Either holds several methods, or they have no record in common.
        """
        import pandas as pd

        for one in (self, other):
            if len(one.methods) != 1:
                raise ValueError(
                    f"expected one method on each side, found {', '.join(one.methods) or 'none'};"
                    f" pick one, as in evaluation['rome']"
                )
        a, b = (one.rows.set_index("item") for one in (self, other))
        both = a.index.intersection(b.index)
        if not len(both) or (a.loc[both, "case_id"] != b.loc[both, "case_id"]).any():
            raise ValueError("the two evaluations are not of the same records")
        mine, theirs = (_values(one.loc[both]) for one in (a, b))
        # What one side lacks, the other is not to be judged by.
        gaps = np.isnan(mine) | np.isnan(theirs)
        mine, theirs = (np.where(gaps, np.nan, values) for values in (mine, theirs))
        found = [_means(values) for values in (mine, theirs)]
        gap, resampled = found[0][0] - found[1][0], found[0][1] - found[1][1]
        low, high = percentiles(resampled, gap)
        table = pd.DataFrame(
            {
                "metric": list(METRICS),
                "difference": gap,
                "low": low,
                "high": high,
                "n": _counts(mine),
            }
        )
        return table.loc[table["n"] > 0].reset_index(drop=True)

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failures" if self.failures else ""
        return (
            f"Evaluation({', '.join(self.methods) or 'nothing'}; {self.rows['item'].nunique()} of"
            f" {self.n_records} records{failed})"
        )

    def _repr_html_(self) -> str:
        table = self.summary.pivot_table(
            index="method", columns="metric", values="mean", sort=False
        )
        return f"<p>{self!r}</p>{table.to_html(float_format='%.4g', na_rep='')}"


def _summary(rows: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    values = _values(rows)
    mean, resampled = _means(values)
    low, high = percentiles(resampled, mean)
    spread = [rows[name].std() if name in rows else np.nan for name in METRICS]
    counts = _counts(values)
    table = {
        "metric": list(METRICS), "mean": mean, "sd": spread, "low": low, "high": high, "n": counts,
    }  # fmt: skip
    return pd.DataFrame(table).loc[counts > 0]


def _values(rows: pd.DataFrame) -> Float[np.ndarray, "records metrics"]:
    return rows.loc[:, list(MEASURED)].to_numpy(dtype=float)


def _counts(values: Float[np.ndarray, "records metrics"]) -> np.ndarray:
    """Records with a value, of each of `METRICS`."""
    there = ~np.isnan(values)
    whole = there[:, [MEASURED.index(name) for name in _OF_SCORE]].all(1)
    return np.concatenate([[whole.sum()], there.sum(0)])


def _means(
    values: Float[np.ndarray, "records metrics"],
) -> tuple[Float[np.ndarray, " all"], Float[np.ndarray, "resample all"]]:
    """The means of `METRICS`, and those of bootstrap samples; the same draws each time."""
    n = len(values)
    weights = np.concatenate([np.ones((1, n)), resamples(n)])
    there = ~np.isnan(values)
    whole = there[:, [MEASURED.index(name) for name in _OF_SCORE]].all(1)
    three = values[:, [MEASURED.index(name) for name in _OF_SCORE]][whole]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ np.where(there, values, 0.0)) / (weights @ there.astype(float))
        parts = (weights[:, whole] @ three) / weights[:, whole].sum(1, keepdims=True)
        score = len(_OF_SCORE) / (1 / parts).sum(1)  # 1 / 0 is inf, and the score 0
    together = np.concatenate([score[:, None], means], 1)
    return together[0], together[1:]
