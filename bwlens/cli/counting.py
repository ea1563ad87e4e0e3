"""`bwlens statistics`: what enters a model's weights over a text, for methods that need it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bwlens.cli.shared import (
    Bos,
    Debug,
    DeviceMap,
    Dtype,
    Layers,
    Model,
    importing,
    layers_of,
    load,
    quiet,
    readable_errors,
)
from bwlens.runs.paths import writable

_TOKENS_A_NUMBER = 12
"""On SmolLM2, 11 tokens for each number of a key did as well as more."""


def statistics(
    text: Annotated[
        str, typer.Option(help="A .txt or .json file of documents, or a data set on the hub.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="A file to write, .safetensors; without, they are kept in the cache folder alone,"
            " where edit and evaluate find them for this model."
        ),
    ] = None,
    model: Model = "demo",
    matrix: Annotated[
        str, typer.Option(help="Whose inputs, with commas between, e.g. W_out,W_O.")
    ] = "W_out,W_O",
    layers: Layers = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Count so many tokens of the text; by default 12 for each number of a key."
        ),
    ] = None,
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
        if out is not None:
            writable(out, [".safetensors"])
        chosen = layers_of(layers)
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
        widest = max(widths, key=lambda name: widths[name])
        tokens = tokens or _TOKENS_A_NUMBER * widths[widest]
        there = 0
        for document in documents:
            there += len(text_to_ids(loaded, document, bos))
            if there >= tokens:
                break
        counted = min(there, tokens)
        if counted < widths[widest]:
            why = "--tokens allows no more" if tokens <= there else "the text holds no more"
            raise ValueError(
                f"{counted:,} tokens are too few for keys of {widest}, which are {widths[widest]:,}"
                f" wide ({why}): their second moment would be singular. Take more than that, best"
                f" ten times as many"
            )
        found = bwlens.edit.key_statistics(
            loaded, documents, matrix=matrices, layers=chosen, max_tokens=tokens, prepend_bos=bos
        )
        for name, width in widths.items():
            of_matrix = [one for site, one in found.items() if site.matrix == name]
            n, several = of_matrix[0].n_tokens, len(of_matrix)
            console.print(
                f"{name}: {n:,} tokens, {n / width:.1f} for each of a key's {width:,} numbers, in"
                f" {several} {'layer' if several == 1 else 'layers'}",
                highlight=False,
            )
            for one in of_matrix:
                if one.convergence is not None:
                    console.print(
                        f"  whitened by half of them, keys of layer {one.layer} have cosine"
                        f" {one.convergence:.2f} with those whitened by all",
                        highlight=False,
                    )
        if out is None:
            console.print("Kept in the cache folder, for this model's edits")
            return
        bwlens.edit.save_statistics(found, out)
        console.print(f"Wrote [bold]{out}[/]", highlight=False, soft_wrap=True)
