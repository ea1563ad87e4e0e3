"""`bwlens statistics`: what enters a model's weights over a text, for methods that need it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bwlens.cli.reading import _layers
from bwlens.cli.shared import (
    Bos,
    Debug,
    DeviceMap,
    Dtype,
    Model,
    importing,
    load,
    quiet,
    readable_errors,
)
from bwlens.runs.paths import writable


def statistics(
    text: Annotated[
        str, typer.Option(help="A .txt or .json file of documents, or a data set on the hub.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    model: Model = "demo",
    matrix: Annotated[
        str, typer.Option(help="Whose inputs, with commas between, e.g. W_out,W_O.")
    ] = "W_out,W_O",
    layers: Annotated[str | None, typer.Option(help="Layers, e.g. '0-5' or '0,3,7'.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Count so many tokens of the text.")] = 20_000,
    bos: Bos = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    debug: Debug = False,
) -> None:
    """Mean and second moment of the keys of weights, all in the same passes, for ROME and its like.

    The file is what --statistics of [bold]bwlens edit[/] and [bold]bwlens evaluate[/] take.
    """
    console = Console()
    with readable_errors(debug):
        writable(out, [".safetensors"])
        chosen = _layers(layers)
        with importing(console):
            import bwlens
            from bwlens.data.texts import read_texts
            from bwlens.edit.keys import key_taps
            from bwlens.model.tokens import text_to_ids
            from bwlens.model.weights import weight_of
            from bwlens.runs.parts import Process

        quiet()
        if text.endswith((".txt", ".json")) and not Path(text).is_file():
            raise ValueError(f"{text!r}: no such file; give documents to take statistics over")
        documents = read_texts(text)
        with console.status(f"Loading {model}"):
            loaded = load(model, dtype, device_map, Process.current())
        matrices = [name.strip() for name in matrix.split(",")]
        sites = [tap.site for tap in key_taps(loaded, matrices, chosen)]
        widths = {site.matrix: weight_of(loaded, site).shape[0] for site in sites}
        there = 0
        for document in documents:
            there += len(text_to_ids(loaded, document, bos))
            if there >= tokens:
                break
        counted, widest = min(there, tokens), max(widths, key=lambda name: widths[name])
        if counted < widths[widest]:
            why = "--tokens allows no more" if tokens <= there else "the text holds no more"
            raise ValueError(
                f"{counted:,} tokens are too few for keys of {widest}, which are {widths[widest]:,}"
                f" wide ({why}): their second moment would be singular. Take more than that, best"
                f" ten times as many"
            )
        found = bwlens.edit.key_statistics(
            loaded, documents, matrix=matrices, layers=chosen, max_tokens=tokens, prepend_bos=bos,
            cache=False,
        )  # fmt: skip
        for name, width in widths.items():
            n = next(one.n_tokens for site, one in found.items() if site.matrix == name)
            console.print(
                f"{name}: {n:,} tokens, {n / width:.1f} for each of a key's {width:,} numbers, in"
                f" {sum(site.matrix == name for site in found)} layers",
                highlight=False,
            )
        bwlens.edit.save_statistics(found, out)
        console.print(f"Wrote [bold]{out}[/]", highlight=False, soft_wrap=True)
