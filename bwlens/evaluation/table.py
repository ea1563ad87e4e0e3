"""The paper's Table 1 for any model: methods by metrics, as text, CSV, LaTeX and a figure."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwlens.evaluation.evaluation import Evaluation
from bwlens.evaluation.harness import Harness
from bwlens.evaluation.measuring import Options
from bwlens.evaluation.methods import methods_of
from bwlens.evaluation.presets import table1_methods
from bwlens.runs.parts import whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BLOCKS = {
    "Accuracy": ("efficacy", "paraphrase", "neighbourhood", "greedy", "GE", "perplexity"),
    "Success": ("S", "ES", "PS", "NS", "EM", "PM", "NM", "seconds"),
}
"""Columns, as the Backward Lens paper and as ROME's have them."""

COLUMNS = tuple(name for names in BLOCKS.values() for name in names)

SMALLER_IS_BETTER = ("perplexity", "seconds")

_PANELS = (
    "S", "ES", "PS", "NS", "efficacy", "paraphrase", "neighbourhood", "GE", "perplexity", "seconds",
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Table1:
    """Methods by metrics.

    Attributes:
        evaluation: The rows it is made of.

    Example:
        >>> table = table1(bwlens.load_model("demo"), records=records)   # doctest: +SKIP
        >>> table.save("table1.tex")                             # doctest: +SKIP
    """

    evaluation: Evaluation

    @cached_property
    def means(self) -> pd.DataFrame:
        """The means, a row for each method and a column for each of `COLUMNS`; nan is blank."""
        return self._wide("mean")

    def text(self) -> str:
        """The table as text, with half the width of each 95 % interval."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120)
        console.print(self)
        held = console.file
        assert isinstance(held, io.StringIO)
        return held.getvalue()

    def csv(self) -> str:
        """Means and ends of the 95 % intervals, a line for each method."""
        wide = self.means.copy()
        for end in ("low", "high"):
            for name, column in self._wide(end).items():
                wide[f"{name}_{end}"] = column
        return wide.to_csv(index_label="method")

    def latex(self) -> str:
        r"""A LaTeX table for `\usepackage{booktabs}`, the best of each column in bold."""
        best = self._best()
        lines = [r"\begin{tabular}{l" + "r" * len(COLUMNS) + "}", r"\toprule"]
        spans, at = [], 2
        for title, names in BLOCKS.items():
            spans.append((title, at, at + len(names) - 1))
            at += len(names)
        lines.append(
            " & ".join(["", *(rf"\multicolumn{{{b - a + 1}}}{{c}}{{{t}}}" for t, a, b in spans)])
            + r" \\"
        )
        lines.append(" ".join(rf"\cmidrule(lr){{{a}-{b}}}" for _, a, b in spans))
        lines.append(" & ".join(["method", *map(_latex, COLUMNS)]) + r" \\")
        lines.append(r"\midrule")
        for method, row in self._rows().items():
            cells = [
                rf"\textbf{{{_number(name, row[name])}}}"
                if method in best[name]
                else _number(name, row[name])
                for name in COLUMNS
            ]
            lines.append(" & ".join([_latex(method), *cells]) + r" \\")
        notes = [f"% {' '.join(note.split())}" for note in self.evaluation.notes]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes, ""])

    def figure(self) -> Figure:
        """A panel for each metric, methods as dots with their 95 % intervals."""
        from matplotlib.ticker import NullFormatter

        from bwlens.show import drawing

        shown = [name for name in _PANELS if self.means[name].notna().any()]
        methods = list(self.means.index)
        columns = min(5, max(1, len(shown)))
        n_rows = -(-len(shown) // columns)
        size = (1.25 * columns + 1.3, (0.16 * len(methods) + 0.55) * n_rows)
        figure = drawing.Drawing(figsize=size, layout="constrained")
        grid = figure.subplots(n_rows, columns, squeeze=False, sharey=True)
        low, high = self._wide("low"), self._wide("high")
        for ax, name in zip(grid.flat, shown, strict=False):
            for at, method in enumerate(methods):
                color = drawing.line_color(at)
                ax.plot(
                    [low.loc[method, name], high.loc[method, name]], [at, at], color=color, lw=1
                )
                ax.plot(self.means.loc[method, name], at, "o", color=color, markersize=3)
            ax.set_title(name + (" (s)" if name == "seconds" else ""), fontsize=7, pad=3)
            values = self.means[name]
            if name in SMALLER_IS_BETTER and values.max() > 8 * values.min():
                ax.set_xscale("log")
                ax.xaxis.set_minor_formatter(NullFormatter())  # too many for a small panel
            ax.grid(axis="x", lw=0.3, alpha=0.5)
            ax.set_yticks(range(len(methods)), [drawing.label(m, 24) for m in methods])
            drawing.plain(ax)
        grid[0, 0].set_ylim(len(methods) - 0.5, -0.5)  # shared by all: the first method on top
        for ax in list(grid.flat)[len(shown) :]:
            ax.remove()
        return figure

    def save(self, path: str | Path) -> Path:
        """Write the table: .csv, .tex, .txt, or the figure: .pdf, .svg, .png; the path is returned.

        Raises:
            ValueError: Another suffix.
        """
        path = Path(path)
        kinds = {".csv": self.csv, ".tex": self.latex, ".txt": self.text}
        if path.suffix in kinds:
            text = kinds[path.suffix]()
            with whole(path) as draft:
                draft.write_text(text, encoding="utf-8")
        elif path.suffix in (".pdf", ".svg", ".png"):
            with whole(path) as draft:
                self.figure().savefig(draft, format=path.suffix[1:], dpi=220)
        else:
            raise ValueError(
                f"{str(path)!r}: a table is written as .csv, .tex or .txt, its figure as .pdf, .svg"
                f" or .png"
            )
        return path

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        from rich.measure import Measurement
        from rich.text import Text

        wide = options.update(max_width=10_000)
        whole = [self._block(title, intervals=True) for title in BLOCKS]
        fits = all(Measurement.get(console, wide, t).maximum <= options.max_width for t in whole)
        yield from whole if fits else [self._block(title, intervals=False) for title in BLOCKS]
        yield Text(self._caption(fits))

    def _block(self, title: str, intervals: bool) -> Any:
        """The columns of one paper, in a terminal; without intervals it is half as wide."""
        from rich.table import Table

        low, high, best = self._rows("low"), self._rows("high"), self._best()
        padding = (0, 1) if intervals else (0, 1, 0, 0)
        table = Table(title=title, title_justify="left", box=None, padding=padding)
        table.add_column("method", no_wrap=True)
        for name in BLOCKS[title]:
            table.add_column(name, justify="right", no_wrap=True)
        for method, row in self._rows().items():
            cells = []
            for name in BLOCKS[title]:
                half = (high[method][name] - low[method][name]) / 2
                cell = _number(name, row[name])
                if cell and intervals and name != "seconds":
                    cell += f" [dim]±{_number(name, half)}[/]"
                cells.append(f"[bold]{cell}[/]" if method in best[name] else cell)
            table.add_row(method, *cells)
        return table

    def __repr__(self) -> str:
        return self.text().rstrip()

    def _repr_html_(self) -> str:
        html = self.means.to_html(float_format="%.4g", na_rep="")
        return f"{html}<p>{escape(self._caption())}</p>"

    def _caption(self, intervals: bool = False) -> str:
        e = self.evaluation
        text = (
            f"{e.n_records} records; percent, GE in bits x 100, perplexity per token, seconds an"
            f" edit{'; ± is half of a 95 % bootstrap interval' if intervals else ''}."
        )
        if blank := [name for name in COLUMNS if not self.means[name].notna().any()]:
            text += f" Blank for want of data: {', '.join(blank)}."
        if failed := len(e.failures) - len(e.notes):
            text += f" {failed} edits failed and are left out."
        return " ".join([text, *(f"Note: {note}." for note in e.notes)])

    def _wide(self, column: str) -> pd.DataFrame:
        wide = self.evaluation.summary.pivot(index="method", columns="metric", values=column)
        return wide.reindex(index=self.evaluation.methods, columns=list(COLUMNS)).astype(float)

    def _rows(self, column: str = "mean") -> dict[str, dict[str, float]]:
        wide = self._wide(column)
        values = wide.to_numpy(dtype=float).tolist()
        return {
            method: dict(zip(COLUMNS, row, strict=True))
            for method, row in zip(self.evaluation.methods, values, strict=True)
        }

    def _best(self) -> dict[str, list[str]]:
        """The best methods of each column, the model as it is aside."""
        rows = {m: row for m, row in self._rows().items() if not math.isnan(row["seconds"])}
        best: dict[str, list[str]] = {}
        for name in COLUMNS:
            values = {m: row[name] for m, row in rows.items() if not math.isnan(row[name])}
            top = (min if name in SMALLER_IS_BETTER else max)(values.values(), default=math.nan)
            best[name] = [method for method, value in values.items() if value == top]
        return best


def table1(
    model: Any,
    methods: Any = None,
    records: Any = None,
    *,
    perplexity_text: str | Path | Sequence[str] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Table1:
    """The paper's Table 1: every method on the same records, with the columns of both papers.

    Args:
        model: A TransformerBridge or HookedTransformer.
        methods: As for `evaluate`; None for the model as it is and all methods that bwlens has.
        records: As for `evaluate`.
        perplexity_text: As for `evaluate`.
        out: A folder for the rows, to carry on a run that was killed.
        progress: Show a bar.
        **options: See `bwlens.evaluation.Options`.

    Raises:
        ValueError: As `evaluate` does.
        TypeError: As `evaluate` does.

    Source: Backward Lens, Table 1; Meng et al. 2022, Table 4.
    """
    chosen = table1_methods(model) if methods is None else methods_of(methods)
    harness = Harness(model, chosen, records, perplexity_text, Options.of(options))
    return Table1(harness.run(out, progress))


def _number(name: str, value: float) -> str:
    if math.isnan(value):
        return ""
    if name == "seconds":
        return f"{value:.3g}"
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def _latex(text: str) -> str:
    """Text as LaTeX sets it."""
    special = {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        **{c: "\\" + c for c in "&%$#_{}"},
    }  # fmt: skip
    return "".join(special.get(c, c) for c in text)
