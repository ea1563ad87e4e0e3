"""The figures of a sweep on one page, each with what the paper saw and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from bwlens.show.sheet import definitions, document, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bwlens.experiments.base import Result
    from bwlens.experiments.sweeps import Sweep

_MOST_FAILURES = 50


def gallery(sweep: Sweep, sections: Mapping[str, str]) -> str:
    """The whole page as text, around the `section` of each experiment that gave rows."""
    settings = sweep.settings["settings"]
    model, data = settings["model"]["name"], settings["data"]
    contents = "".join(
        f'<li><a href="#{name}">{escape(experiment.title)}</a> ({escape(experiment.source)})</li>'
        if name in sections
        else f"<li>{escape(experiment.title)}: no rows for this model and these edits</li>"
        for name, experiment in sweep.results.experiments.items()
    )
    return document(
        f"Backward Lens: {model}",
        f"<h1>The Backward Lens experiments on {escape(model)}: {data['edits']} edits</h1>"
        f"<ul>{contents}</ul>{''.join(sections.values())}{_failures(sweep)}"
        f"<h2>To make this again</h2>{_settings(sweep.settings)}",
    )


def section(result: Result, figure: Figure) -> str:
    """One experiment: its figure, what it shows, what was published."""
    experiment = result.experiment
    name = experiment.name
    files = " · ".join(
        f'<a href="{name}{ending}">{text}</a>'
        for ending, text in ((".csv", "summary"), (".pdf", "figure"), ("", "rows (Parquet)"))
    )
    prompts = result.rows["item"].nunique()
    return (
        f'<h2 id="{name}">{escape(experiment.title)}</h2>'
        f'<figure class="wide"><div class="sheet scroll">{svg(figure)}</div><figcaption>'
        f"{escape(experiment.source)} of the paper; means over {prompts} prompts, bands are 95 %"
        f" bootstrap intervals. {files}</figcaption></figure>"
        f"<p>{escape(experiment.caption)}</p><p>In the paper: {escape(experiment.published)}</p>"
    )


def _failures(sweep: Sweep) -> str:
    if not sweep.failures:
        return ""
    shown = sweep.failures[:_MOST_FAILURES]
    rest = len(sweep.failures) - len(shown)
    items = "".join(f"<li>{escape(failure.message)}</li>" for failure in shown)
    more = f"<li>and {rest} more</li>" if rest else ""
    return f"<h2>Left out</h2><ul>{items}{more}</ul>"


def _settings(meta: dict[str, Any]) -> str:
    rows = [
        (f"{group} {name}" if group else name, str(value))
        for group, held in (*meta["settings"].items(), ("", meta["versions"]))
        for name, value in (held.items() if isinstance(held, dict) else [("", held)])
    ]
    return definitions(rows, "small", code=True)
