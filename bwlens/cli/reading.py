"""`bwlens demo` and `bwlens lens`: what one gradient step would write, on the screen or a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bwlens.cli.shared import (
    Bos,
    Debug,
    DeviceMap,
    Dtype,
    Layers,
    Model,
    layers_of,
    load,
    quiet,
    readable_errors,
    writable_outputs,
)
from bwlens.runs.paths import writable

MATRICES = "W_in, W_gate, W_out, W_Q, W_K, W_V, W_O"
"""The matrices there are, for `--help`, which waits for no library."""


def demo(
    html: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("bwlens-demo.html"),
    debug: Debug = False,
) -> None:
    """Read a fact that the shipped model knows, and what one step towards another answer writes."""
    console = Console()
    with readable_errors(debug):
        writable(html, [".html"])
        from bwlens.demo import EXAMPLES

        example = EXAMPLES[0]
        lens = _lens(console, "demo", example.prompt, example.target_new, example.subject)
        console.print(lens)
        _save(console, lens, html)
        console.print(
            "Next: [bold]bwlens lens[/] with a prompt of your own, or"
            " [bold]bwlens.backward_lens(model, prompt, target)[/] in Python."
        )


def lens(
    prompt: Annotated[str, typer.Argument(help="The prompt, e.g. 'Lionel Messi plays for'.")],
    target: Annotated[
        str, typer.Option(help="What the model is to say next, with its blank, e.g. ' Paris'.")
    ],
    subject: Annotated[str | None, typer.Option(help="What the fact is about.")] = None,
    model: Model = "demo",
    matrix: Annotated[str, typer.Option(help=f"The matrix to print: {MATRICES}.")] = "W_out",
    layers: Layers = None,
    top_k: Annotated[int, typer.Option(min=1, help="Words kept at each end.")] = 10,
    normalize: Annotated[bool, typer.Option(help="Read vectors at unit length.")] = False,
    reading: Annotated[
        str,
        typer.Option(
            help="How gradients become words: plain (the paper's), dual, cosine, or effect (what a"
            " step on the matrix does, measured); several ('plain,dual') for the page to switch."
        ),
    ] = "plain",
    imprint: Annotated[
        str, typer.Option(help="How inputs become words: plain, dual or cosine.")
    ] = "plain",
    bias: Annotated[
        bool, typer.Option(help="Let plain readings have the final norm's bias in them.")
    ] = True,
    positions: Annotated[
        str | None, typer.Option(help="Read only these tokens: 'last' or 'subject'.")
    ] = None,
    temper: Annotated[
        float, typer.Option(help="For effect: likely words before unlikely ones, e.g. 0.1.")
    ] = 0.0,
    trust: Annotated[
        bool, typer.Option(help="Measure how far each layer's words are what a step does.")
    ] = False,
    bos: Bos = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the lens as a page to this file.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the lens as JSON to this file.")] = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    debug: Debug = False,
) -> None:
    """Print what one gradient step towards a target would write, layer by token."""
    console = Console()
    with readable_errors(debug):
        writable_outputs(html, json)
        wanted = layers_of(layers)
        _check(prompt, target, subject, matrix)
        readings = reading.split(",")
        if unknown := {*readings} - {"plain", "dual", "cosine", "effect"}:
            raise ValueError(
                f"--reading {', '.join(unknown)}: there are plain, dual, cosine and effect (and, in"
                f" Python, transported)"
            )
        if positions not in (None, "last", "subject"):
            raise ValueError(f"--positions {positions!r}: there are 'last' and 'subject'")
        from bwlens.show.terminal import TextTable

        found = _lens(
            console,
            model,
            prompt,
            target,
            subject,
            (dtype, device_map),
            layers=wanted,
            matrices=_read_with(matrix, readings),
            top_k=top_k,
            normalize=normalize,
            prepend_bos=bos,
            reading=readings,
            imprint=imprint,
            bias=bias,
            positions=positions,
            temper=temper,
            trust=trust,
        )
        console.print(TextTable(found, matrix))
        for path in (html, json):
            if path is not None:
                _save(console, found, path)


def _read_with(matrix: str, readings: list[str]) -> list[str] | None:
    """The matrices of the page; each costs passes of its own where effects are measured."""
    if "effect" in readings:
        return [matrix]
    return None if matrix in ("W_in", "W_out") else ["W_in", "W_out", matrix]


def _check(prompt: str, target: str, subject: str | None, matrix: str) -> None:
    """Refuse before anything is loaded what no model could take.

    Raises:
        ValueError: An empty prompt or target, a subject that is not in the prompt, or no such
            matrix.
    """
    if not prompt or not target:
        raise ValueError(
            f"the {'target' if prompt else 'prompt'} is empty; give it some text, as in"
            f" bwlens lens 'Lionel Messi plays for' --target ' Paris'"
        )
    if subject is not None and (not subject.strip() or subject not in prompt):
        raise ValueError(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
    if matrix not in MATRICES.split(", "):
        raise ValueError(f"--matrix {matrix!r}: there is no such matrix; there are {MATRICES}")


def _lens(
    console: Console,
    name: str,
    prompt: str,
    target: str,
    subject: str | None,
    placed: tuple[str, str | None] = ("float32", None),
    **options: Any,
) -> Any:
    """Load the model and read the lens, with a sign of life meanwhile."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Importing", total=3)
        import bwlens
        from bwlens.runs.parts import Process

        quiet()
        progress.update(task, advance=1, description=f"Loading {name}")
        model = load(name, *placed, Process())
        progress.update(task, advance=1, description="Reading the gradients")
        found = bwlens.backward_lens(model, prompt, target, subject=subject, **options)
        progress.update(task, advance=1)
    return found


def _save(console: Console, found: Any, path: Path) -> None:
    if path.suffix == ".html":
        found.report(path)
    else:
        found.save(path)
    console.print(f"Wrote [bold]{path}[/]", highlight=False, soft_wrap=True)
