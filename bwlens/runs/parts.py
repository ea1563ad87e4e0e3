"""Long work in parts on disk: written whole or not at all, carried on when started again, shared.

A run is a folder. `run.json` holds what defines it (settings, versions, fingerprints); each table
has a folder of Parquet files, one a part; `done/` has a mark for each finished part, written
last, with the items that failed. A part without its mark is done again, so that a run which was
killed at any moment ends with the rows of an undisturbed one.

Several processes share a run without speaking to one another: process i of n takes every n-th
part. Who started them is told by the environment that `accelerate launch` and `torchrun` set.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = {"format": "bwlens.parts", "version": 1}
_MARKS = "done"


@dataclass(frozen=True)
class Failure:
    """An item that could not be worked on: its index, and what was wrong.

    The index is the one that rows have as `item`; -1 for what never became an item.
    """

    item: int
    message: str


@dataclass(frozen=True)
class Part:
    """What the work on one part gave: rows of each table, and the items that failed."""

    tables: Mapping[str, pd.DataFrame]
    failures: Sequence[Failure] = ()


@dataclass(frozen=True)
class Process:
    """Which of how many processes this one is."""

    index: int = 0
    count: int = 1
    local_index: int = 0

    @staticmethod
    def current() -> Process:
        """This process, as `accelerate launch` or `torchrun` numbered it; alone without them."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        index, count, local = (os.environ.get(name, "") for name in names)
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            return Process()
        return Process(int(index), int(count), int(local) if local.isdigit() else int(index))

    def device(self) -> str | None:
        """A device of its own for each process of several, where there are GPUs; else None."""
        import torch

        if self.count > 1 and torch.cuda.is_available():
            return f"cuda:{self.local_index % torch.cuda.device_count()}"
        return None


class Run:
    """A run's folder: what it was started with, and which parts are there.

    Args:
        folder: Where it lies; made if it is not there.
        settings: All that the rows depend on, as JSON holds it.
        sizes: Number of items of each part.

    Raises:
        ValueError: The folder holds a run of other settings, versions or data (the difference is
            named), or something else.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping[str, Any], sizes: Sequence[int]
    ) -> None:
        self.folder, self._sizes = Path(folder), list(sizes)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot make the folder {str(folder)!r} for the results ({error.strerror}); name"
                f" one that can be written"
            ) from error
        self._open(
            {
                **_FORMAT,
                "settings": dict(settings),
                "versions": {n: version(n) for n in ("bwlens", "transformer_lens", "torch")},
                "parts": len(self._sizes),
                "items": sum(self._sizes),
            }
        )
        (self.folder / _MARKS).mkdir(exist_ok=True)

    def done(self, part: int) -> bool:
        """Whether a part is finished."""
        return self._mark(part).is_file()

    @property
    def finished(self) -> bool:
        """Whether every part is."""
        return all(map(self.done, range(len(self._sizes))))

    def work(
        self,
        work: Callable[[int], Part],
        *,
        process: Process | None = None,
        progress: bool = True,
        label: str = "Sweeping",
    ) -> None:
        """Do this process' parts that are not there yet, and write each as it is finished."""
        process = process or Process.current()
        mine = range(process.index, len(self._sizes), process.count)
        left = [part for part in mine if not self.done(part)]
        for part in left:
            self._sweep_up(part)
        total = sum(self._sizes[part] for part in mine)
        ahead = total - sum(self._sizes[part] for part in left)
        shown = progress and process.index == 0
        if process.count > 1:
            label = f"{label} (process 1 of {process.count})"
        with progress_bar(label, total, ahead, shown) as advance:
            for part in left:
                self._write(part, work(part))
                advance(self._sizes[part])

    def _open(self, meta: dict[str, Any]) -> None:
        """Write run.json, or compare with the one that is there; the first process wins."""
        path = self.folder / "run.json"
        text = json.dumps(meta, indent=1, ensure_ascii=False)
        if not path.exists():
            strangers = {p.name for p in self.folder.iterdir() if not p.name.startswith(".")}
            if strangers := sorted(strangers - {_MARKS, path.name}):
                raise ValueError(
                    f"{str(self.folder)!r} holds {strangers[0]!r} but no run.json; name a new or"
                    f" empty folder for the results"
                )
            part = self.folder / f".run.json.{os.getpid()}.tmp"
            part.write_text(text, encoding="utf-8")
            try:
                os.link(part, path)  # fails where another process was first
                return
            except FileExistsError:
                pass
            except OSError:  # a file system without links, as mounted drives are
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        there, now = _flat(read_meta(self.folder)), _flat(json.loads(text))
        # Settings first: the number of parts follows from them.
        keys = sorted({*there, *now}, key=lambda key: (not key.startswith("settings."), key))
        differing = [
            f"{key.removeprefix('settings.')} was {there.get(key, 'not set')!r}, is"
            f" {now.get(key, 'not set')!r}"
            for key in keys
            if there.get(key) != now.get(key)
        ]
        if differing:
            raise ValueError(
                f"{str(self.folder)!r} holds a run with other settings: {'; '.join(differing[:6])}."
                f" Give the settings it was started with to carry it on, or another folder"
            )

    def _mark(self, part: int) -> Path:
        return self.folder / _MARKS / f"part-{part:05d}.json"

    def _write(self, part: int, done: Part) -> None:
        for name, rows in done.tables.items():
            (self.folder / name).mkdir(exist_ok=True)
            with whole(self.folder / name / f"part-{part:05d}.parquet") as path:
                rows.to_parquet(path, index=False, compression="zstd")
        with whole(self._mark(part)) as path:
            rows = {name: len(table) for name, table in done.tables.items()}
            mark = {"rows": rows, "failures": [asdict(failure) for failure in done.failures]}
            path.write_text(json.dumps(mark, ensure_ascii=False), encoding="utf-8")

    def _sweep_up(self, part: int) -> None:
        """Remove what a killed process left half written."""
        for path in self.folder.glob(f"*/.part-{part:05d}.*.tmp"):
            path.unlink(missing_ok=True)


def in_parts(
    work: Callable[[int], Part],
    sizes: Sequence[int],
    settings: Mapping[str, Any],
    folder: str | os.PathLike[str] | None,
    *,
    progress: bool = True,
    label: str = "Working",
) -> dict[str, pd.DataFrame]:
    """The tables of work in parts; what a folder holds is carried on, without one nothing is kept.

    Raises:
        ValueError: The folder holds a run of other settings, or something else.
    """
    with TemporaryDirectory() as scratch:
        place = Path(scratch) / "run" if folder is None else Path(folder)
        Run(place, settings, sizes).work(work, progress=progress, label=label)
        return read_tables(place)


def read_meta(folder: str | Path) -> dict[str, Any]:
    """What a run was started with: settings, versions, fingerprints.

    Raises:
        ValueError: The folder holds no run.
    """
    path = Path(folder) / "run.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} holds no run of bwlens: {path.name}: {error}") from error
    if {name: meta.get(name) for name in _FORMAT} != _FORMAT:
        raise ValueError(f"{str(path)!r} is no run of this version of bwlens; expected {_FORMAT}")
    return meta


def table_names(folder: str | Path) -> list[str]:
    """The tables that the finished parts of a run have.

    Raises:
        ValueError: The folder holds no run.
    """
    read_meta(folder)
    return list(dict.fromkeys(name for mark in _marks(folder).values() for name in mark["rows"]))


def read_table(folder: str | Path, name: str) -> pd.DataFrame:
    """One table of a run, the finished parts joined in their order; texts as categories.

    Raises:
        ValueError: The folder holds no run, or no such table.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    if name not in (names := table_names(folder)):
        raise ValueError(f"{str(folder)!r} has no table {name!r}; it has {', '.join(names)}")
    held = [s for s, mark in _marks(folder).items() if mark["rows"].get(name)]
    if not held:
        return pd.DataFrame()
    paths = [Path(folder) / name / f"{stem}.parquet" for stem in held]
    schema = pq.read_schema(paths[0])
    texts = [one.name for one in schema if one.type in (pa.string(), pa.large_string())]
    # A part whose lists are all empty does not know of what.
    table = pa.concat_tables(
        (pq.read_table(path, read_dictionary=texts) for path in paths), promote_options="default"
    )
    return table.unify_dictionaries().to_pandas(self_destruct=True, split_blocks=True)


def read_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """Every table of a run, as `read_table` gives it.

    Raises:
        ValueError: The folder holds no run.
    """
    return {name: read_table(folder, name) for name in table_names(folder)}


def read_failures(folder: str | Path) -> list[Failure]:
    """The items of a run that could not be worked on, in the order of the data."""
    listed = [Failure(**each) for mark in _marks(folder).values() for each in mark["failures"]]
    return sorted(listed, key=lambda failure: failure.item)


def bars_can_be_drawn() -> bool:
    """In Jupyter rich draws bars by ipywidgets; without them it would show a warning instead."""
    from rich import get_console

    return not get_console().is_jupyter or find_spec("ipywidgets") is not None


@contextmanager
def progress_bar(
    label: str, total: int, ahead: int = 0, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left; yields a function that adds to what is done."""
    if not shown or not bars_can_be_drawn():
        yield lambda n: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=total, completed=ahead, rate="")
        start, done = time.monotonic(), 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            rate = done / max(time.monotonic() - start, 1e-9)
            bar.update(task, advance=n, rate=f"{rate:.3g}/s")

        yield advance


def _marks(folder: str | Path) -> dict[str, Any]:
    paths = sorted((Path(folder) / _MARKS).glob("part-*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when it is whole and on the disk.

    If writing it fails, what stood at `path` stays as it was.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}.tmp")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested settings as one level, `settings.model.name`, to say where two differ."""
    if not isinstance(value, dict):
        return {key: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{key}.{name}" if key else name)
    return flat
