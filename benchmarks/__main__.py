"""`python -m benchmarks [name ...] [--repeats N] [--quick] ...`; `--help` has the rest."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.batch import batch
from benchmarks.capture import capture
from benchmarks.changes import changes
from benchmarks.edits import edits, searches
from benchmarks.evaluate import evaluate
from benchmarks.heads import heads
from benchmarks.lens import lens
from benchmarks.measure import Note, Row, count_cpu_seconds
from benchmarks.model import SMALL, TINY
from benchmarks.rank import rank
from benchmarks.readings import readings
from benchmarks.readout import readout
from benchmarks.setting import REAL, Setting
from benchmarks.sweep import sweep


def table(setting: Setting) -> list[Row | Note]:
    """The lens table; it draws on the tests' made-up lenses, and so needs what the tests need."""
    try:
        from benchmarks.table import table
    except ModuleNotFoundError as error:
        return [Note(f"table: needs {error.name}; pip install -e '.[test]'")]
    return table(setting)


BENCHMARKS: dict[str, Callable[[Setting], list[Row | Note]]] = {
    "capture": capture,
    "readout": readout,
    "lens": lens,
    "readings": readings,
    "edits": edits,
    "values": searches,
    "rank": rank,
    "batch": batch,
    "heads": heads,
    "sweep": sweep,
    "evaluate": evaluate,
    "changes": changes,
    "table": table,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks named, all by default, and print a table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description="How fast bwlens is beside the least work possible."
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--repeats", type=int, help="pairs timed; the median counts (default 7)")
    parser.add_argument("--prompts", type=int, help="how many, where there are several")
    parser.add_argument(
        "--model", help="of `readings`, `edits` and `values` (default smollm2, where it is)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all?")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread's CPU seconds, for a busy machine"
    )
    parser.add_argument(
        "--peer", metavar="PYTHON", help="an interpreter with transformer_lens 4.2, for `lens`"
    )
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    for name in ("repeats", "prompts"):
        if (number := getattr(asked, name)) is not None and number < 1:
            parser.error(f"--{name} is {number}; expected 1 or more")
    setting = Setting(
        TINY if asked.quick else SMALL,
        asked.repeats or (1 if asked.quick else 7),
        peer=asked.peer,
        cpu_time=asked.cpu_time,
        prompts=asked.prompts,
        real_name=asked.model or ("demo" if asked.quick else REAL),
    )
    if asked.cpu_time:
        count_cpu_seconds()
    console = Console()
    groups = []
    for name in asked.names or BENCHMARKS:
        with console.status(name):
            groups.append(BENCHMARKS[name](setting))
    console.print(_printed(groups, setting))
    notes = [one.text for group in groups for one in group if isinstance(one, Note)]
    for note in [*notes, _conditions()]:
        console.print(note, highlight=False, markup=False)


def _printed(groups: list[list[Row | Note]], setting: Setting) -> Table:
    rows = Table(
        title=f"Random GPT-2: {setting.shape}; {setting.repeats} pairs",
        caption=f"Medians, in {'CPU seconds of one thread' if setting.cpu_time else 'wall time'};"
        " the ratio is the median over the pairs, with their quartiles.",
    )
    rows.add_column("what")
    for column in ("ours", "reference", "ratio", "target"):
        rows.add_column(column, justify="right")
    rows.add_column("met?", justify="center")
    for group in groups:
        for row in group:
            if isinstance(row, Row):
                rows.add_row(*_cells(row, setting))
        rows.add_section()
    return rows


def _cells(row: Row, setting: Setting) -> list[str]:
    ratio = f"{row.ratio:.3g}"
    if row.spread is not None:
        ratio += " ({:.3g}-{:.3g})".format(*row.spread)
    if setting.quick:  # too small for targets to mean anything
        return [row.what, row.ours, row.reference, ratio, "", ""]
    target = f"{'≥' if row.more_is_better else '≤'} {row.target:g}"
    met = "[green]yes[/]" if row.met else "[bold red]no[/]"
    return [row.what, row.ours, row.reference, ratio, target, met]


def _conditions() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer_lens"))
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return (
        f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores; {versions};"
        f" load average at the end {load}"
    )


if __name__ == "__main__":
    main()
