"""The `bwlens` command: `bwlens demo`, `lens`, `sweep`, `edit` and `evaluate`.

Errors that a user can mend are one readable line and exit code 1; `--debug` shows the traceback.
Wrong usage exits with 2, as every command does.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Read what a language model learns: the Backward Lens for TransformerLens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
_Dtype = Annotated[str, typer.Option(help="The weights' dtype, e.g. 'bfloat16'.")]
_DeviceMap = Annotated[
    str | None, typer.Option(help="Spread one model over devices: 'auto', as TransformerLens does.")
]
_Seed = Annotated[
    int | None, typer.Option(help="Draw the --limit records at random, by this seed.")
]
_Html = Annotated[Path | None, typer.Option(help="Write the lens as a page to this file.")]


@app.command()
def demo(
    html: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("bwlens-demo.html"),
    debug: _Debug = False,
) -> None:
    """Read a fact that the shipped model knows, and what one step towards another answer writes."""
    console = Console()
    with _readable_errors(debug):
        _writable(html)
        from bwlens.demo import EXAMPLES

        example = EXAMPLES[0]
        lens = _lens(console, "demo", example.prompt, example.target_new, example.subject)
        console.print(lens)
        _save(console, lens, html)
        console.print(
            "Next: [bold]bwlens lens[/] with a prompt of your own, or"
            " [bold]bwlens.backward_lens(model, prompt, target)[/] in Python."
        )


@app.command()
def lens(
    prompt: Annotated[str, typer.Argument(help="The prompt, e.g. 'Lionel Messi plays for'.")],
    target: Annotated[str, typer.Option(help="What the model is to say next, e.g. ' Paris'.")],
    subject: Annotated[str | None, typer.Option(help="What the fact is about.")] = None,
    model: Annotated[str, typer.Option(help="'demo', a folder, or a name on the hub.")] = "demo",
    matrix: Annotated[str, typer.Option(help="The matrix to print.")] = "W_out",
    layers: Annotated[str | None, typer.Option(help="Layers, e.g. '0-5' or '0,3,7'.")] = None,
    top_k: Annotated[int, typer.Option(help="Words kept at each end.")] = 10,
    normalize: Annotated[bool, typer.Option(help="Read vectors at unit length.")] = False,
    bos: Annotated[bool | None, typer.Option(help="Prepend a BOS token.")] = None,
    html: _Html = None,
    json: Annotated[Path | None, typer.Option(help="Write the lens as JSON to this file.")] = None,
    debug: _Debug = False,
) -> None:
    """Print what one gradient step towards a target would write, layer by token."""
    console = Console()
    with _readable_errors(debug):
        for path in (html, json):
            if path is not None:
                _writable(path)
        from bwlens.show.terminal import text_table

        found = _lens(
            console,
            model,
            prompt,
            target,
            subject,
            layers=_layers(layers),
            matrices=None if matrix in ("W_in", "W_out") else ["W_in", "W_out", matrix],
            top_k=top_k,
            normalize=normalize,
            prepend_bos=bos,
        )
        console.print(text_table(found, matrix))
        for path in (html, json):
            if path is not None:
                _save(console, found, path)


@app.command()
def sweep(
    experiment: Annotated[
        list[str],
        typer.Argument(help="'paper' for all experiments, or names such as gradient_rank."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    data: Annotated[
        str, typer.Option(help="'demo', a file of records, or a data set on the hub.")
    ] = "demo",
    model: Annotated[str, typer.Option(help="'demo', a folder, or a name on the hub.")] = "demo",
    limit: Annotated[
        int | None,
        typer.Option(help="Only so many edits; 0 for all. 'paper' takes 100 at random, as it did."),
    ] = None,
    seed: _Seed = None,
    max_memory: Annotated[
        str, typer.Option(help="Memory that a batch may take, e.g. '512MB' or '8GB'.")
    ] = "1GB",
    bos: Annotated[bool | None, typer.Option(help="Prepend a BOS token.")] = None,
    dtype: _Dtype = "float32",
    device_map: _DeviceMap = None,
    debug: _Debug = False,
) -> None:
    """Run the paper's experiments over a data set: batched, resumable, shared over processes.

    Killed and started again, it carries on. To share it over processes or GPUs, start it with
    [bold]accelerate launch --multi_gpu --num_processes N -m bwlens sweep ...[/] (without GPUs too).
    """
    with _readable_errors(debug):
        from bwlens.parts import Process

        process = Process.current()
        console = Console(quiet=process.index > 0)
        with _importing(console):
            from bwlens.experiments.sweep import resolve
            from bwlens.experiments.sweep import sweep as run

        resolve(experiment)  # a wrong name is told before anything is loaded
        memory = _bytes(max_memory)
        _quiet()
        if limit is None and "paper" in experiment:
            limit, seed = 100, seed or 0
        records = _records(data, limit or None, seed)
        loaded = _load(model, dtype, device_map, process)
        found = run(
            experiment,
            loaded,
            records,
            out,
            prepend_bos=bos,
            max_memory=memory,
        )
        for failure in found.failures[:20]:
            console.print(f"Left out: {_escaped(failure.message)}", highlight=False)
        if len(found.failures) > 20:
            console.print(f"... and {len(found.failures) - 20} more; see the page")
        if found.finished:
            console.print(f"Wrote [bold]{found.index}[/]", highlight=False, soft_wrap=True)
        else:
            console.print("This process' share is done; the last to finish writes the page.")


@app.command()
def edit(
    prompt: Annotated[str, typer.Argument(help="A template, e.g. 'The mother tongue of {} is'.")],
    subject: Annotated[str, typer.Option(help="What the fact is about.")],
    target: Annotated[str, typer.Option(help="The answer to be written, e.g. ' French'.")],
    method: Annotated[str, typer.Option(help="How to edit.")] = "forward_pass_shift",
    model: Annotated[str, typer.Option(help="'demo', a folder, or a name on the hub.")] = "demo",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="The method's settings, e.g. layer=5.")
    ] = None,
    neighbour: Annotated[
        list[str] | None, typer.Option(help="Another prompt, which should stay as it is.")
    ] = None,
    bos: Annotated[bool | None, typer.Option(help="Prepend a BOS token.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the change to this file.")] = None,
    dtype: _Dtype = "float32",
    debug: _Debug = False,
) -> None:
    """Edit a fact, and print the likeliest words before and after, neighbours included."""
    console = Console()
    with _readable_errors(debug):
        if save is not None:
            _writable(save)
        with _importing(console):
            import bwlens
            from bwlens.evaluate.before_after import before_after, demo_company
            from bwlens.evaluate.methods import methods_of
            from bwlens.evaluate.presets import preset
            from bwlens.parts import Process

        _quiet()
        fact = bwlens.Edit(prompt, subject, target if target[:1].isspace() else f" {target}")
        with console.status(f"Loading {model}"):
            loaded = _load(model, dtype, None, Process())
        (chosen,) = methods_of(preset(loaded, method), _settings(settings))
        with console.status(f"Editing with {method}"):
            change = chosen(loaded, fact, bos)
            known = demo_company(fact) if model == "demo" else ([], [])
            neighbours = neighbour or known[1]
            told = before_after(loaded, fact, change, known[0], neighbours, prepend_bos=bos)
        console.print(told)
        console.print(str(change), style="dim", markup=False, highlight=False, soft_wrap=True)
        if not neighbours:
            console.print("No neighbours are known; give some with --neighbour.", style="dim")
        if save is not None:
            change.save(save)
            console.print(f"Wrote [bold]{save}[/]", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    what: Annotated[
        str | None, typer.Argument(help="'table1' for all methods there are.", show_default=False)
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Methods, e.g. 'none,rome,memit'.")
    ] = "none,forward_pass_shift",
    data: Annotated[
        str, typer.Option(help="'demo', a file of records, or a data set on the hub.")
    ] = "demo",
    model: Annotated[str, typer.Option(help="'demo', a folder, or a name on the hub.")] = "demo",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; a run there is carried on.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only so many records; 100 for table1 of the demo.")
    ] = None,
    seed: _Seed = None,
    prose: Annotated[
        str | None, typer.Option(help="A text for perplexity: a file, or a data set.")
    ] = None,
    generation_every: Annotated[
        int, typer.Option(help="Generate text for every so many records; 0 for none.")
    ] = 10,
    perplexity_every: Annotated[
        int, typer.Option(help="Measure perplexity for every so many records; 0 for none.")
    ] = 10,
    bos: Annotated[bool | None, typer.Option(help="Prepend a BOS token.")] = None,
    dtype: _Dtype = "float32",
    device_map: _DeviceMap = None,
    debug: _Debug = False,
) -> None:
    """Edit the fact of each record with each method, and measure what came of it.

    With --out a run that was killed is carried on when it is started again, and
    [bold]accelerate launch -m bwlens evaluate ...[/] shares it over processes or GPUs.
    """
    with _readable_errors(debug):
        from bwlens.parts import Process

        process = Process.current()
        console = Console(quiet=process.index > 0)
        if what not in (None, "table1"):
            raise ValueError(f"{what!r}: there is 'table1', or --methods with names")
        if process.count > 1 and out is None:
            raise ValueError("several processes share a folder; name one with --out")
        with _importing(console):
            from bwlens.evaluate.harness import Harness
            from bwlens.evaluate.measuring import Options
            from bwlens.evaluate.methods import methods_of
            from bwlens.evaluate.presets import preset, table1_methods
            from bwlens.evaluate.table import Table1

        _quiet()
        if what == "table1" and limit is None and data == "demo":
            limit, seed = 100, seed or 0
        records = _records(data, limit, seed)
        for problem in records.problems[:20]:
            console.print(f"Left out: {_escaped(str(problem))}", highlight=False)
        loaded = _load(model, dtype, device_map, process)
        chosen = (
            table1_methods(loaded)
            if what == "table1"
            else methods_of([preset(loaded, name.strip()) for name in methods.split(",")])
        )
        options = Options(
            generation_every=generation_every, perplexity_every=perplexity_every, prepend_bos=bos
        )
        harness = Harness(loaded, chosen, records, prose, options)
        if out is None or not (out / "run.json").exists():
            with console.status("Trying each method once"):
                seconds = harness.estimate()
            console.print(
                f"{len(records)} records, {len(chosen)} methods: about {_duration(seconds)}",
                highlight=False,
            )
        found = harness.run(out)
        console.print(Table1(found))
        for failure in found.failures[:20]:
            told = f"Record {failure.item}: {failure.message}"
            console.print(f"Left out: {_escaped(told)}", highlight=False)
        if out is not None and process.index == 0:
            for name in ("table1.csv", "table1.tex", "table1.txt", "table1.pdf"):
                Table1(found).save(out / name)
            console.print(f"Wrote [bold]{out}[/]", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    app()


def _lens(
    console: Console, name: str, prompt: str, target: str, subject: str | None, **options: Any
) -> Any:
    """Load the model and read the lens, with a sign of life meanwhile."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Importing", total=3)
        import bwlens

        _quiet()
        progress.update(task, advance=1, description=f"Loading {name}")
        model = bwlens.load_model(name)
        progress.update(task, advance=1, description="Reading the gradients")
        found = bwlens.backward_lens(model, prompt, target, subject=subject, **options)
        progress.update(task, advance=1)
    return found


@contextmanager
def _importing(console: Console) -> Iterator[None]:
    """A sign of life while the libraries are read in, which takes seconds."""
    with console.status("Importing"):
        yield


def _load(name: str, dtype: str, device_map: str | None, process: Any) -> Any:
    """The model, on a GPU of its own where several processes share the work."""
    import torch

    from bwlens.models import load_model

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"--dtype {dtype!r}: expected float32, bfloat16 or float16")
    if device_map is not None:
        if process.count > 1:
            raise ValueError("--device-map spreads one model over all devices; start one process")
        return load_model(name, dtype=kind, device_map=device_map)
    return load_model(name, dtype=kind, device=process.device())


def _records(data: str, limit: int | None, seed: int | None) -> Any:
    """The records, the first of them, or some drawn at random."""
    from bwlens.evaluate.records import read_records

    records = read_records(data, None if seed is not None else limit)
    if seed is not None and limit is not None and limit < len(records):
        return records.sample(limit, seed)
    return records


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


def _settings(listed: list[str] | None) -> dict[str, Any]:
    """Settings out of 'layer=5': numbers, lists and the like as Python writes them, else text.

    Raises:
        ValueError: There is no name, or no value.
    """
    import ast

    found: dict[str, Any] = {}
    for one in listed or ():
        name, equals, value = one.partition("=")
        if not (name.strip().isidentifier() and equals and value.strip()):
            raise ValueError(f"--set {one!r}: expected a name and a value, such as layer=5")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            found[name.strip()] = value.strip()
    return found


def _duration(seconds: float) -> str:
    """A time for people: '40 s', '12 min', '3 h 20 min'."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _quiet() -> None:
    """Keep the libraries' own bars and notes out of the picture."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.ERROR)


def _layers(text: str | None) -> list[int] | None:
    """Layers from '0-5', '0,3,7', '-1' or a mixture.

    Raises:
        ValueError: The text says no such thing.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().lstrip("-").partition("-")
        negative = part.strip().startswith("-")
        if not first.isdigit() or (dash and (negative or not last.isdigit())):
            raise ValueError(f"--layers {text!r}: expected layers such as '0-5', '0,3,7' or '-1'")
        low = -int(first) if negative else int(first)
        found += range(low, int(last) + 1) if dash else [low]
    if not found:
        raise ValueError(f"--layers {text!r} names no layer; write '0-5', not '5-0'")
    return found


def _writable(path: Path) -> None:
    """Say before the work, not after it, that a file cannot be written."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {str(path)!r}; name a file in a folder that exists")


def _save(console: Console, found: Any, path: Path) -> None:
    if path.suffix == ".html":
        found.report(path)
    else:
        found.save(path)
    console.print(f"Wrote [bold]{path}[/]", highlight=False, soft_wrap=True)


@contextmanager
def _readable_errors(debug: bool) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, OSError, RuntimeError) as error:
        if debug:
            raise
        message = f"[bold red]Error:[/] {_escaped(error)}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(1)


def _escaped(error: Exception | str) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))
