"""`bwlens check`: whether what bwlens says of a model is true, measured on the model itself."""

from __future__ import annotations

import json as json_lines
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bwlens.cli.shared import (
    Debug,
    DeviceMap,
    Dtype,
    Layers,
    importing,
    layers_of,
    load,
    quiet,
    readable_errors,
)
from bwlens.runs.paths import writable


def check(
    model: Annotated[str, typer.Argument(help="'demo', a folder, or a name on the hub.")],
    prompt: Annotated[
        str | None, typer.Option(help="What to run it on; four tokens of any kind otherwise.")
    ] = None,
    matrix: Annotated[
        list[str] | None, typer.Option(help="A matrix to check; all that there are otherwise.")
    ] = None,
    layers: Layers = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the report as JSON to this file.")
    ] = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    debug: Debug = False,
) -> None:
    """Is what bwlens says of a model true? Head, gradients, steps, batches, tokens, measured on it.

    The exit code is 0 where no check fails, and 1 where one does.
    """
    console = Console()
    with readable_errors(debug):
        if json is not None:
            writable(json)
        chosen = layers_of(layers)
        with importing(console):
            import bwlens
            from bwlens.runs.parts import Process

            quiet()
        with console.status(f"Loading {model}"):
            loaded = load(model, dtype, device_map, Process.current())
        report = bwlens.check(loaded, prompt, matrices=matrix, layers=chosen)
        console.print(report)
        if json is not None:
            json.write_text(json_lines.dumps(report.to_dict(), indent=1))
            console.print(f"Wrote [bold]{json}[/]", highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)
