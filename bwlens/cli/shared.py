"""What the commands have in common: options, loading with a sign of life, errors for people."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bwlens.runs.paths import writable

# transformers' bar over a GGUF file's tensors heeds nothing else, and this only from the beginning.
os.environ.setdefault("TQDM_DISABLE", "1")

Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Model = Annotated[
    str,
    typer.Option(help="'demo', 'smollm2', a .gguf file, a folder, or a name on the hub."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="'demo', a file of records, or a data set on the hub.",
        show_default="demo, for the demo model",
    ),
]
Bos = Annotated[
    bool | None,
    typer.Option(
        help="Prepend a BOS token. The demo has none, as the paper; other models as TransformerLens"
        " has it for their architecture, mostly with one.",
        show_default="the model's own",
    ),
]
Dtype = Annotated[
    str, typer.Option(help="The weights' dtype: float32, bfloat16, float16 or float64.")
]
Layers = Annotated[str | None, typer.Option(help="Layers, e.g. '0-5' or '0,3,7'.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="Spread one model over devices: 'auto', as TransformerLens does.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A method's settings, e.g. layer=5; of one among several, e.g. rome.layer=5."
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(help="Key statistics, as `bwlens statistics` writes them, for ROME and its like."),
]
Seed = Annotated[int | None, typer.Option(help="Draw the --limit records at random, by this seed.")]


_MENDABLE = (ValueError, TypeError, NotImplementedError, ImportError, OSError, RuntimeError)


@contextmanager
def readable_errors(debug: bool) -> Iterator[None]:
    """What a user can mend as one line and exit code 1; with `debug` as it was raised.

    What bwlens warns of is one line as well, and goes on.
    """
    try:
        with warnings.catch_warnings():
            _say_warnings()
            yield
    except _MENDABLE as error:
        if debug:
            raise
        message = f"[bold red]Error:[/] {escaped(error)}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(1)


def _say_warnings() -> None:
    """Show the warnings of bwlens as notes, each once; those of others as Python does."""
    show, own, said = warnings.showwarning, str(Path(__file__).parents[1]), set[str]()

    def note(message: Any, category: Any, filename: str, *rest: Any, **options: Any) -> None:
        if not filename.startswith(own):
            show(message, category, filename, *rest, **options)
        elif (text := escaped(str(message))) not in said:
            said.add(text)
            Console(stderr=True).print(f"[bold]Note:[/] {text}", highlight=False, soft_wrap=True)

    warnings.filterwarnings("always", module=r"bwlens\.")
    warnings.showwarning = note


@contextmanager
def importing(console: Console) -> Iterator[None]:
    """A sign of life while the libraries are read in, which takes seconds."""
    with console.status("Importing"):
        yield


def load(name: str, dtype: str, device_map: str | None, process: Any) -> Any:
    """The model, on a GPU of its own where several processes share the work."""
    from bwlens.model.loading import as_dtype, load_model

    try:
        kind = as_dtype(dtype)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    if device_map is not None:
        if process.count > 1:
            raise ValueError("--device-map spreads one model over all devices; start one process")
        return load_model(name, dtype=kind, device_map=device_map)
    return load_model(name, dtype=kind, device=process.device())


def records_of(data: str | None, limit: int | None, seed: int | None, make: bool = False) -> Any:
    """The records, the first of them, or some drawn at random; a limit of 0 is none.

    With `make` they are made of bare requests.
    """
    from bwlens.data.making import make_records
    from bwlens.data.records import checked_limit, read_records

    limit = checked_limit(limit)
    if make:
        records = make_records(data or "demo")
        records = records if seed is not None else records[:limit]
    else:
        records = read_records(data or "demo", None if seed is not None else limit)
    if seed is not None and limit is not None and limit < len(records):
        return records.sample(limit, seed)
    return records


def quiet() -> None:
    """Keep the libraries' own bars and notes out of the picture."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.ERROR)


def escaped(error: Exception | str) -> str:
    """One line of plain text, whose brackets rich takes for no markup."""
    from rich.markup import escape

    return escape(" ".join(str(error).split()))


def layers_of(text: str | None) -> list[int] | None:
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


def writable_outputs(html: Path | None, json: Path | None) -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        ValueError: Another ending, or a folder that is not there.
    """
    for path, ending in ((html, ".html"), (json, ".json")):
        if path is not None:
            writable(path, [ending])
