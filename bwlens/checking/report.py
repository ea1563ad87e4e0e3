"""What the checks of a model found, as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["ok", "fails", "not checked"]
_SIGNS: dict[Verdict, str] = {"ok": "✓", "fails": "✗", "not checked": "–"}
_COLORS: dict[Verdict, str] = {"ok": "green", "fails": "bold red", "not checked": "yellow"}


@dataclass(frozen=True)
class Finding:
    """One check: its verdict, its figures, and what they mean or what to do.

    Attributes:
        name: What was checked ("head", "gradient of W_in", ...).
        verdict: "ok", "fails" or "not checked".
        figures: What was measured, in words.
        meaning: What the check says where it is ok, why it was not made, or what to do.
        error: The figure that decided, a share (0 is perfect); None where there is none.
        limit: What `error` may be at most.
    """

    name: str
    verdict: Verdict
    figures: str
    meaning: str
    error: float | None = None
    limit: float | None = None

    @classmethod
    def measured(
        cls, name: str, figures: str, error: float, limit: float, *, ok: str, fails: str
    ) -> Finding:
        """What an error says beside its limit, in the one case and in the other."""
        good = error <= limit
        return cls(name, "ok" if good else "fails", figures, ok if good else fails, error, limit)

    @classmethod
    def skipped(cls, name: str, why: str) -> Finding:
        """A check that was not made."""
        return cls(name, "not checked", "-", why)


@dataclass(frozen=True)
class CheckReport:
    """The checks of one model; a table in Jupyter and in a terminal.

    Attributes:
        model: The model's name, as far as it has one.
        findings: One for each check, in order.
        seconds: How long they took.
    """

    model: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no check fails; what was not checked counts for neither."""
        return not any(finding.verdict == "fails" for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name; KeyError if there is none."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        names = ", ".join(finding.name for finding in self.findings)
        raise KeyError(f"no check {name!r}; there are {names}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row a check, with the columns of `Finding`."""
        import pandas as pd

        return pd.DataFrame([asdict(finding) for finding in self.findings])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return {"model": self.model, "ok": self.ok, "seconds": self.seconds, "findings": findings}

    @property
    def summary(self) -> str:
        """One line: how many of each verdict."""
        counts = [
            f"{number} {verdict}"
            for verdict in _SIGNS
            if (number := sum(finding.verdict == verdict for finding in self.findings))
        ]
        return f"{self.model}: {', '.join(counts)}, in {self.seconds:.1f} s"

    def __repr__(self) -> str:
        width = max((len(finding.name) for finding in self.findings), default=0)
        lines = [self.summary]
        for finding in self.findings:
            lines.append(
                f"  {_SIGNS[finding.verdict]} {finding.name:<{width}}  {finding.verdict:<11}"
                f"  {finding.figures}"
            )
            if finding.verdict != "ok":
                lines.append(f"    {'':<{width}}  {finding.meaning}")
        return "\n".join(lines)

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.summary, title_justify="left", box=None, pad_edge=False)
        table.add_column("check", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        table.add_column("figures", ratio=2)
        table.add_column("what it means", ratio=3, style="dim")
        for finding in self.findings:
            verdict = f"{_SIGNS[finding.verdict]} {finding.verdict}"
            table.add_row(
                Text(finding.name),
                Text(verdict, style=_COLORS[finding.verdict]),
                Text(finding.figures),
                Text(finding.meaning),
            )
        return table

    def _repr_html_(self) -> str:
        names = ("check", "verdict", "figures", "what it means")
        head = "".join(f'<th style="text-align:left">{name}</th>' for name in names)
        rows = ""
        for finding in self.findings:
            verdict = f"{_SIGNS[finding.verdict]} {finding.verdict}"
            bold = ";font-weight:bold" if finding.verdict == "fails" else ""
            cells = (finding.name, verdict, finding.figures, finding.meaning)
            rows += "<tr>"
            for text, style in zip(cells, ("", bold, "", ""), strict=True):
                rows += f'<td style="text-align:left;vertical-align:top{style}">{escape(text)}</td>'
            rows += "</tr>"
        return (
            f"<table><caption>{escape(self.summary)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )
