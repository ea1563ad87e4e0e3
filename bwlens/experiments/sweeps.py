"""Experiments over thousands of edits: batched, killed and carried on, shared over processes.

Each batch is one part of a `bwlens.runs.parts.Run`, read once for all experiments: one forward and
one backward pass. What is on the disk is never worked on again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bwlens.data.given import Edits, as_edits
from bwlens.data.records import Records, checked_limit, read_records
from bwlens.experiments.base import Experiment, Result
from bwlens.experiments.running import MAX_MEMORY, Batches, joined
from bwlens.model.identity import fingerprint, model_label
from bwlens.model.prompts import Edit
from bwlens.runs.parts import (
    Failure,
    Part,
    Process,
    Run,
    read_failures,
    read_meta,
    read_table,
    table_names,
    whole,
)


@dataclass(frozen=True, eq=False)
class Results(Mapping[str, Result]):
    """The results in a sweep's folder by experiment, each read when it is asked for."""

    folder: Path
    experiments: dict[str, Experiment]
    failures: tuple[Failure, ...]

    def __getitem__(self, name: str) -> Result:
        experiment = self.experiments[name]
        return Result(experiment, joined([read_table(self.folder, name)]), self.failures)

    def __iter__(self) -> Iterator[str]:
        return iter(self.experiments)

    def __len__(self) -> int:
        return len(self.experiments)


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """What a sweep's folder holds."""

    folder: Path
    results: Results
    """By experiment, of the parts that are there; read from the folder each time."""
    failures: tuple[Failure, ...]
    """Edits that could not be measured, and records that could not be read."""
    finished: bool
    """Whether every part is there."""
    settings: dict[str, Any] = field(repr=False)
    """What the sweep was started with."""

    def __getitem__(self, name: str) -> Result:
        return self.results[name]

    def __repr__(self) -> str:
        state = "finished" if self.finished else "unfinished"
        return (
            f"Sweep({str(self.folder)!r}, {state}: {', '.join(self.results)};"
            f" {len(self.failures)} failed)"
        )

    @cached_property
    def index(self) -> Path:
        """The page with all figures; written when the sweep is finished."""
        return self.folder / "index.html"

    def write(self) -> Path:
        """Write every experiment's summary and figure, and a page with all of them."""
        from bwlens.experiments.gallery import gallery, section

        sections = {}
        for name, result in self.results.items():  # one at a time is in memory
            if not len(result.rows):
                continue
            with whole(self.folder / f"{name}.csv") as path:
                result.summary.to_csv(path, index=False)
            figure = result.figure()
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # it stands; laying out again takes most of a save
            with whole(self.folder / f"{name}.pdf") as path:
                figure.savefig(path, format="pdf", metadata={"CreationDate": None})
            sections[name] = section(result, figure)
        with whole(self.index) as path:
            path.write_text(gallery(self, sections), encoding="utf-8")
        return self.index


def sweep(
    experiments: str | Experiment | Sequence[str | Experiment],
    model: Any,
    data: str | Path | Edits,
    out: str | Path,
    *,
    prepend_bos: bool | None = None,
    max_memory: int = MAX_MEMORY,
    limit: int | None = None,
    progress: bool = True,
    page: bool = True,
    process: Process | None = None,
) -> Sweep:
    """Run experiments over a data set, into a folder, and carry on where it was left.

    Results are Parquet parts, each written whole or not at all; killed at any moment and started
    again with the same settings, a sweep ends with the rows of an undisturbed one. Started by
    `accelerate launch`, each process takes its share of the parts.

    Args:
        experiments: "paper" for all of its own, a name out of `EXPERIMENTS`, an experiment with its
            own settings, or several.
        model: A TransformerBridge or HookedTransformer.
        data: Edits, records, or what `read_records` takes.
        out: The folder.
        prepend_bos: Whether prompts get a BOS token; None is the model's own default.
        max_memory: Bytes that a batch may take, by a rough estimate.
        limit: Only so many of the edits, from the first; None or 0 for all.
        progress: Show a bar with rate and time left.
        page: Write summaries, figures and the page once all parts are there; `Sweep.write` does it
            later.
        process: Which of how many processes this is; None asks the environment.

    Raises:
        ValueError: The folder holds a sweep with other settings (the difference is named), no edit
            can be read, an unknown experiment, or settings that do not fit the model.
    """
    asked = [experiments] if isinstance(experiments, str | Experiment) else list(experiments)
    chosen = resolve(asked)
    if isinstance(data, str | Path):
        data = read_records(data)
    edits, source, problems = _edits(data, limit)
    chosen = [experiment.given(data) for experiment in chosen]
    if "paper" in asked:  # as many of them as the model can take
        chosen, unfit = _fitting(chosen, model)
        problems += unfit
    batches = Batches(chosen, model, edits, prepend_bos, max_memory)
    failures = [*problems, *batches.failures]
    settings = {
        "experiments": {experiment.name: experiment.settings for experiment in chosen},
        "model": {
            "name": model_label(model),
            "fingerprint": fingerprint(model),
            "dtype": str(model.cfg.dtype),
        },
        "data": {"source": source, "edits": len(edits), "fingerprint": _fingerprint(edits)},
        "prepend_bos": prepend_bos,
        "max_memory": max_memory,
    }
    held = Run(out, settings, batches.sizes)

    def work(number: int) -> Part:
        part = batches(number)
        # What could not be read at all is told with the first part.
        return part if number else Part(part.tables, [*failures, *part.failures])

    held.work(work, process=process, progress=progress)
    found = read_sweep(out)
    if page and found.finished:
        found.write()
    return found


def read_sweep(folder: str | Path) -> Sweep:
    """What a sweep's folder holds, finished or not.

    Raises:
        ValueError: The folder holds no sweep.
    """
    meta = read_meta(folder)
    if "experiments" not in meta["settings"]:
        raise ValueError(f"{str(folder)!r} holds no sweep of experiments")
    failures, held = tuple(read_failures(folder)), table_names(folder)
    experiments = {
        name: _made(name, settings)
        for name, settings in meta["settings"]["experiments"].items()
        if name in held
    }
    results = Results(Path(folder), experiments, failures)
    done = len(list((Path(folder) / "done").glob("part-*.json")))
    return Sweep(Path(folder), results, failures, done == meta["parts"], meta)


def resolve(asked: Sequence[str | Experiment]) -> list[Experiment]:
    """Experiments by name, or as they are.

    Raises:
        ValueError: Unknown name, none at all, or one twice.
    """
    from bwlens.experiments import EXPERIMENTS

    paper = [name for name, kind in EXPERIMENTS.items() if kind.in_paper]
    names = [name for one in asked for name in (paper if one == "paper" else [one])]
    unknown = [n for n in names if isinstance(n, str) and n not in EXPERIMENTS]
    if unknown or not names:
        found = f"no experiment {unknown[0]!r}" if unknown else "no experiment named"
        raise ValueError(f"{found}; there are paper (all of its own), {', '.join(EXPERIMENTS)}")
    chosen = [EXPERIMENTS[n]() if isinstance(n, str) else n for n in names]
    held = [experiment.name for experiment in chosen]
    twice = [name for name in held if held.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice; sweep it into two folders")
    return chosen


def _fitting(
    experiments: Sequence[Experiment], model: Any
) -> tuple[list[Experiment], list[Failure]]:
    """The experiments that a model can take, and why the others are left out."""
    fit, unfit = [], []
    for experiment in experiments:
        try:
            experiment.wanted(model)
            fit.append(experiment)
        except (NotImplementedError, ValueError) as error:
            unfit.append(Failure(-1, f"{experiment.name} was left out: {error}"))
    if not fit:
        raise ValueError(f"no experiment can be run on this model: {unfit[0].message}")
    return fit, unfit


def _made(name: str, settings: dict[str, Any]) -> Experiment:
    from bwlens.experiments import EXPERIMENTS

    try:
        return EXPERIMENTS[name](**{k: _tuples(v) for k, v in settings.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{name} was swept by another version of bwlens, whose settings this one does not have"
            f" ({error}); its rows are in Parquet files that pandas reads"
        ) from None


def _tuples(value: Any) -> Any:
    """Lists as JSON has them, at any depth, as settings have them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _edits(data: Any, limit: int | None) -> tuple[list[Edit], str, list[Failure]]:
    """The edits, where they come from, and the records that could not be read."""
    limit = checked_limit(limit)
    if isinstance(data, Records):
        # A problem's index counts records, the rows' items and their failures count edits.
        problems = [Failure(-1, str(problem)) for problem in data.problems]
        return data.edits[:limit], data.source, problems
    return as_edits(data)[:limit], "edits", []


def _fingerprint(edits: Iterable[Edit]) -> str:
    held = hashlib.sha256()
    for edit in edits:
        held.update(json.dumps(asdict(edit), sort_keys=True).encode())
    return held.hexdigest()[:16]
