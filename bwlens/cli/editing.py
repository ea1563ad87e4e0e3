"""`bwlens edit` and `bwlens evaluate`: change a fact, and measure how well methods do that."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    Settings,
    Statistics,
    escaped,
    importing,
    load,
    quiet,
    readable_errors,
    records_of,
)
from bwlens.runs.paths import writable, writable_folder

METHODS = (
    "alpha_edit, fine_tune, forward_pass_shift, gradient_step, mapped_shift, memit, mend, rome,"
    " subject_shift"
)
"""The editing methods there are, for `--help`, which waits for no library."""


def edit(
    prompt: Annotated[str, typer.Argument(help="A template, e.g. 'The mother tongue of {} is'.")],
    subject: Annotated[str, typer.Option(help="What the fact is about.")],
    target: Annotated[
        str, typer.Option(help="The answer to be written, with its blank, e.g. ' French'.")
    ],
    method: Annotated[str, typer.Option(help=f"How to edit: {METHODS}.")] = "forward_pass_shift",
    model: Model = "demo",
    settings: Settings = None,
    statistics: Statistics = None,
    neighbour: Annotated[
        list[str] | None, typer.Option(help="Another prompt, which should stay as it is.")
    ] = None,
    bos: Bos = None,
    save: Annotated[Path | None, typer.Option(help="Write the change to this file.")] = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Edit a fact, and print the likeliest words before and after, neighbours included."""
    console = Console()
    with readable_errors(debug):
        if save is not None:
            writable(save)
        with importing(console):
            import bwlens
            from bwlens.evaluation.before_after import before_after, demo_company
            from bwlens.evaluation.methods import methods_of, named_method, with_statistics
            from bwlens.evaluation.presets import preset
            from bwlens.model.identity import is_demo
            from bwlens.runs.parts import Process

        quiet()
        fact = bwlens.Edit(prompt, subject, target)
        named_method(method)  # a wrong name or setting is told before anything is loaded
        given = _settings(settings)
        keys = None if statistics is None else bwlens.edit.load_statistics(statistics)
        with console.status(f"Loading {model}"):
            loaded = load(model, dtype, None, Process())
        (chosen,) = methods_of(preset(loaded, method), given)
        if keys is not None:
            (chosen,) = with_statistics([chosen], keys)
        with console.status(f"Editing with {method}"):
            try:
                change = chosen(loaded, fact, bos)
            except TypeError as error:
                if not settings:
                    raise
                raise ValueError(
                    f"{method} cannot take --set {' '.join(settings)}: {error}"
                ) from error
            known = demo_company(fact) if is_demo(loaded) else ([], [])
            neighbours = neighbour or known[1]
            told = before_after(loaded, fact, change, known[0], neighbours, prepend_bos=bos)
        console.print(told)
        console.print(str(change), style="dim", markup=False, highlight=False, soft_wrap=True)
        if not neighbours:
            console.print("No neighbours are known; give some with --neighbour.", style="dim")
        if save is not None:
            change.save(save)
            console.print(f"Wrote [bold]{save}[/]", highlight=False, soft_wrap=True)


def evaluate(
    what: Annotated[
        str | None, typer.Argument(help="'table1' for all methods there are.", show_default=False)
    ] = None,
    methods: Annotated[
        str, typer.Option(help=f"Methods with commas between: none, {METHODS}.")
    ] = "none,forward_pass_shift",
    settings: Settings = None,
    statistics: Statistics = None,
    data: Data = None,
    model: Model = "demo",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; a run there is carried on.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Only so many records; 0 for all. table1 of the demo takes 100 at random."
        ),
    ] = None,
    seed: Seed = None,
    make: Annotated[
        bool,
        typer.Option(
            "--make",
            help="The data are bare requests: a relation's other templates become paraphrases,"
            " subjects with the same answer neighbours.",
        ),
    ] = False,
    known: Annotated[
        bool, typer.Option("--known", help="Only facts whose true answer the model prefers.")
    ] = False,
    prose: Annotated[
        str | None, typer.Option(help="A text for perplexity: a file, or a data set.")
    ] = None,
    generation_every: Annotated[
        int, typer.Option(min=0, help="Generate text for every so many records; 0 for none.")
    ] = 10,
    perplexity_every: Annotated[
        int, typer.Option(min=0, help="Measure perplexity for every so many records; 0 for none.")
    ] = 10,
    bos: Bos = None,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    debug: Debug = False,
) -> None:
    """Edit the fact of each record with each method, and measure what came of it.

    With --out a run that was killed is carried on when it is started again, and
    [bold]accelerate launch --multi_gpu --num_processes N -m bwlens evaluate ...[/] shares it over
    processes or GPUs.
    """
    with readable_errors(debug):
        from bwlens.runs.parts import Process

        process = Process.current()
        console = Console(quiet=process.index > 0)
        if what not in (None, "table1"):
            raise ValueError(f"{what!r}: there is 'table1', or --methods with names")
        if process.count > 1 and out is None:
            raise ValueError("several processes share a folder; name one with --out")
        if out is not None:
            writable_folder(out)
        with importing(console):
            from bwlens.data.given import own_records
            from bwlens.edit import load_statistics
            from bwlens.evaluation.harness import Harness
            from bwlens.evaluation.known import known_records
            from bwlens.evaluation.measuring import Options
            from bwlens.evaluation.methods import methods_of, named_method, with_statistics
            from bwlens.evaluation.presets import preset, table1_methods
            from bwlens.evaluation.table import Table1

        quiet()
        names = [name.strip() for name in methods.split(",")] if what is None else []
        for name in names:
            named_method(name)
        given = _settings(settings)
        keys = None if statistics is None else load_statistics(statistics)
        if what == "table1" and limit is None and data in (None, "demo"):
            limit, seed = 100, seed or 0
        if known:  # how many have to be asked for so many known ones is not yet told
            records = records_of(data, None, None, make)
            records = records.shuffled(seed) if seed is not None else records
        else:
            records = records_of(data, limit, seed, make)
        for problem in records.problems[:20]:
            console.print(f"Left out: {escaped(str(problem))}", highlight=False)
        if len(records.problems) > 20:
            console.print(f"Left out: {len(records.problems) - 20:,} more", highlight=False)
        loaded = load(model, dtype, device_map, process)
        own_records(loaded, data)
        if known:
            records = known_records(loaded, records, limit=limit or None, prepend_bos=bos)
        presets = [preset(loaded, name) for name in names] or table1_methods(loaded)
        chosen = methods_of(presets, given)
        if keys is not None:
            chosen = with_statistics(chosen, keys)
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
            told = failure.message if failure.item < 0 else told
            console.print(f"Left out: {escaped(told)}", highlight=False)
        if out is not None and process.index == 0:
            for name in ("table1.csv", "table1.tex", "table1.txt", "table1.pdf"):
                Table1(found).save(out / name)
            console.print(f"Wrote [bold]{out}[/]", highlight=False, soft_wrap=True)


def _settings(listed: list[str] | None) -> dict[str, Any]:
    """Settings out of 'layer=5': numbers, lists and the like as Python writes them, else text.

    'rome.layer=5' is one of rome's: {"rome": {"layer": 5}}.

    Raises:
        ValueError: There is no name, or no value, or some say whose they are and others do not.
    """
    import ast

    found: dict[str, Any] = {}
    for one in listed or ():
        name, equals, value = (part.strip() for part in one.partition("="))
        method, _, name = name.rpartition(".")
        if not (name.isidentifier() and equals and value):
            raise ValueError(
                f"--set {one!r}: expected a name and a value, such as layer=5 or rome.layer=5"
            )
        whose = found.setdefault(method, {}) if method else found
        try:
            whose[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            whose[name] = value
    mixed = any("." in one.partition("=")[0] for one in listed or ())
    if mixed and not all("." in one.partition("=")[0] for one in listed or ()):
        raise ValueError(
            f"--set {' '.join(listed or ())}: some settings say whose they are and others do not;"
            f" write each as rome.layer=5"
        )
    return found


def _duration(seconds: float) -> str:
    """A time for people: '40 s', '12 min', '3 h 20 min'."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
