"""`bwlens heads`: which heads a loss asks most of, and what they read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bwlens.cli.shared import (
    Bos,
    Debug,
    DeviceMap,
    Dtype,
    Model,
    escaped,
    importing,
    load,
    quiet,
    readable_errors,
)
from bwlens.runs.paths import writable


def heads(
    prompt: Annotated[str, typer.Argument(help="The prompt, e.g. 'The capital of France is'.")],
    target: Annotated[
        str, typer.Option(help="What the model is to say next, with its blank, e.g. ' Paris'.")
    ],
    model: Model = "demo",
    top_k: Annotated[int, typer.Option(min=1, help="Heads to print.")] = 10,
    bos: Bos = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the layer x head picture to this file.")
    ] = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    debug: Debug = False,
) -> None:
    """Print the heads that a loss asks most of (||R||), and what they read and write."""
    console = Console()
    with readable_errors(debug):
        if html is not None:
            writable(html, [".html"])
        if not prompt.strip() or not target.strip():
            raise ValueError("the prompt and --target need some text")
        with importing(console):
            import bwlens
            from bwlens.runs.parts import Process
            from bwlens.show.heads import head_table
        quiet()
        with console.status("Loading"):
            loaded = load(model, dtype, device_map, Process.current())
        frame = bwlens.head_words(loaded, prompt, target, top_k, top_k=4, prepend_bos=bos)
        table = Table(title=escaped(f"{prompt} ->{target}"))
        for name in ("head", "||R||", "from", "to", "R", "A", "writes", "effect"):
            table.add_column(name)
        for row in frame.to_dict("records"):
            words = [" ".join(word.strip() for word in row[key]) for key in ("writes", "effect")]
            table.add_row(
                f"L{row['layer']} H{row['head']}", f"{row['norm']:.2e}", escaped(row["query"]),
                escaped(row["key"]), f"{row['R']:+.1e}", f"{row['A']:.2f}",
                *map(escaped, words),
            )  # fmt: skip
        console.print(table)
        console.print("R < 0: a step down the loss attends more.")
        if html is not None:
            maps = bwlens.reversed_attention(loaded, prompt, target, prepend_bos=bos)
            html.write_text(head_table(maps).page(), encoding="utf-8")
            console.print(f"Wrote [bold]{html}[/]", highlight=False, soft_wrap=True)
