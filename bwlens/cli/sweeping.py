"""`bwlens sweep`: the paper's experiments over a data set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bwlens.cli.shared import (
    Bos,
    Data,
    Debug,
    DeviceMap,
    Dtype,
    Model,
    Seed,
    escaped,
    importing,
    load,
    quiet,
    readable_errors,
    records_of,
)
from bwlens.runs.paths import writable_folder

EXPERIMENTS = (
    "gradient_rank, segment_norms, target_rank, layer_cosine, naive_reading, imprint_shift,"
    " step_sizes, reading_fidelity, residual_removal"
)
"""The experiments there are, for `--help`, which waits for no library."""


def sweep(
    experiment: Annotated[
        list[str],
        typer.Argument(help=f"'paper' for all of its own, or names of some: {EXPERIMENTS}."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    data: Data = None,
    model: Model = "demo",
    limit: Annotated[
        int | None,
        typer.Option(help="Only so many edits; 0 for all. 'paper' takes 100 at random, as it did."),
    ] = None,
    seed: Seed = None,
    max_memory: Annotated[
        str, typer.Option(help="Memory that a batch may take, e.g. '512MB' or '8GB'.")
    ] = "1GB",
    bos: Bos = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    debug: Debug = False,
) -> None:
    """Run the paper's experiments over a data set: batched, resumable, shared over processes.

    Killed and started again, it carries on. To share it over processes or GPUs, start it with
    [bold]accelerate launch --multi_gpu --num_processes N -m bwlens sweep ...[/] (without GPUs too).
    """
    with readable_errors(debug):
        from bwlens.runs.parts import Process

        process = Process.current()
        console = Console(quiet=process.index > 0)
        with importing(console):
            from bwlens.data.given import own_records
            from bwlens.experiments.sweeps import resolve
            from bwlens.experiments.sweeps import sweep as run

        resolve(experiment)  # a wrong name is told before anything is loaded
        memory = _bytes(max_memory)
        writable_folder(out)
        quiet()
        if limit is None and "paper" in experiment:
            limit, seed = 100, seed or 0
        records = records_of(data, limit, seed)
        loaded = load(model, dtype, device_map, process)
        own_records(loaded, data)
        found = run(
            experiment,
            loaded,
            records,
            out,
            prepend_bos=bos,
            max_memory=memory,
        )
        for failure in found.failures[:20]:
            console.print(f"Left out: {escaped(failure.message)}", highlight=False)
        if len(found.failures) > 20:
            console.print(f"... and {len(found.failures) - 20} more; see the page")
        if found.finished:
            console.print(f"Wrote [bold]{found.index}[/]", highlight=False, soft_wrap=True)
        else:
            console.print("This process' share is done; the last to finish writes the page.")


def _bytes(text: str) -> int:
    """Bytes out of '512MB', '1.5 GB' or a plain number.

    Raises:
        ValueError: The text says no such thing.
    """
    units = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    try:
        assert match is not None
        number, unit = float(match[1]), units[match[2].upper().replace("I", "")]
    except (AssertionError, ValueError, KeyError):
        raise ValueError(f"--max-memory {text!r}: expected a size such as '512MB'") from None
    return int(number * unit)
