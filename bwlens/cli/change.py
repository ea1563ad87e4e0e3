"""`bwlens change` and `bwlens dataset`: changes of weights and data sets in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bwlens.cli.shared import (
    Bos,
    Debug,
    Dtype,
    Layers,
    Model,
    importing,
    layers_of,
    load,
    quiet,
    readable_errors,
    writable_outputs,
)
from bwlens.runs.paths import writable_folder


def change(
    what: Annotated[
        str,
        typer.Argument(
            help="A PEFT adapter's folder, a checkpoint (folder or file), a file of a WeightChange."
        ),
    ],
    base: Annotated[
        str, typer.Option("--base", help="The model whose weights are changed, as --model.")
    ] = "demo",
    before: Annotated[
        Path | None,
        typer.Option(help="Compare with this checkpoint, not with the base's own weights."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Which of several adapters, with commas between to add up.")
    ] = None,
    differences: Annotated[
        bool, typer.Option("--differences", help="The file holds differences, not weights.")
    ] = False,
    reading: Annotated[str, typer.Option(help="dual, cosine or plain.")] = "dual",
    directions: Annotated[int, typer.Option(min=1, help="Read so many of each matrix.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Rows kept of a full difference.")] = 16,
    layers: Layers = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A .txt file, a prompt a line, to measure the effect on.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write JSON to this file.")] = None,
    bos: Bos = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Say in words what a change of a model's weights answers to, writes and does."""
    console = Console()
    with readable_errors(debug):
        writable_outputs(html, json)
        chosen = layers_of(layers)
        if not Path(what).expanduser().exists():
            raise ValueError(f"there is no {what!r}; name an adapter's or a checkpoint's folder")
        lines = None
        if prompts is not None:
            lines = [line for line in prompts.read_text("utf-8").splitlines() if line.strip()]
        with importing(console):
            import bwlens
            from bwlens.runs.parts import Process
        quiet()
        with console.status(f"Loading {base}"):
            model = load(base, dtype, None, Process())
        with console.status("Reading the change"):
            lens = bwlens.read_change(
                model,
                what if before is None else (before, what),
                adapter=adapter.split(",") if adapter else None,
                differences=differences,
                reading=reading,  # pyright: ignore[reportArgumentType]
                directions=directions,
                rank=rank,
                layers=chosen,
                prompts=lines,
                prepend_bos=bos,
            )
        console.print(repr(lens), highlight=False, markup=False, soft_wrap=True)
        for path in (html, json):
            if path is not None:
                console.print(f"Wrote [bold]{lens.save(path)}[/]", highlight=False, soft_wrap=True)


def dataset(
    source: Annotated[
        str, typer.Argument(help="A .jsonl, .json, .csv or .txt file, or a data set on the hub.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of the results; carried on if there.")],
    model: Model = "demo",
    matrix: Annotated[str, typer.Option(help="W_out or W_O.")] = "W_out",
    layers: Layers = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples read at once.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer examples are cut.")] = 256,
    search: Annotated[
        str | None, typer.Option(help="Print the examples that promote this word.")
    ] = None,
    bos: Bos = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Say in words what training on a data set would write; with a page to search."""
    console = Console()
    with readable_errors(debug):
        writable_folder(out)
        chosen = layers_of(layers)
        with importing(console):
            import bwlens
            from bwlens.runs.parts import Process
        quiet()
        with console.status(f"Loading {model}"):
            loaded = load(model, dtype, None, Process())
        lens = bwlens.read_dataset(
            loaded,
            source,
            out,
            matrix=matrix,
            layers=chosen,
            batch_size=batch_size,
            max_tokens=max_tokens,
            prepend_bos=bos,
        )
        console.print(repr(lens), highlight=False, markup=False, soft_wrap=True)
        for failure in lens.failures[:5]:
            console.print(f"not read: example {failure.item}: {failure.message}", markup=False)
        if search is not None:
            found = lens.search(search)[["item", "layer", "size", "text"]].head(10)
            console.print(found.to_string(index=False), markup=False, soft_wrap=True)
        page = lens.save(out / "index.html")
        console.print(f"Wrote [bold]{page}[/]", highlight=False, soft_wrap=True)
