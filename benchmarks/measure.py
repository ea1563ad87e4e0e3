"""Two things side by side, in time and in memory."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

_clock = time.perf_counter


@dataclass(frozen=True)
class Row:
    """One comparison, as it is printed."""

    what: str
    ours: str
    reference: str
    ratio: float
    target: float
    spread: tuple[float, float] | None = None
    more_is_better: bool = False

    @property
    def met(self) -> bool:
        """Whether the ratio is within the target."""
        return self.ratio >= self.target if self.more_is_better else self.ratio <= self.target


@dataclass(frozen=True)
class Note:
    """What is to be said about a comparison, below the table."""

    text: str


def count_cpu_seconds() -> None:
    """From now on one thread works, and its CPU seconds are counted instead of the wall clock's.

    Steady on a machine that is busy with other work, where threads wait for one another.
    """
    global _clock
    _clock = time.process_time
    torch.set_num_threads(1)


def timed(run: Callable[[], Any], before: Callable[[], Any] = gc.collect) -> Callable[[], float]:
    """A function that runs `before`, then `run`, and returns the seconds of the latter."""

    def seconds() -> float:
        before()
        start = _clock()
        result = run()
        elapsed = _clock() - start
        del result  # its memory is given back off the clock
        return elapsed

    return seconds


def race(
    what: str,
    ours: Callable[[], float],
    reference: Callable[[], float],
    repeats: int,
    target: float,
    throughput: bool = False,
) -> Row:
    """Time both in turn: one pair to warm up, unless one is all, and `repeats` that count.

    Each side first in every other pair, so that neither a drifting machine nor what the other
    leaves in the caches favours one. The ratio is the median over the pairs, its spread their
    quartiles; times are medians. With `throughput` the ratio is the other way up, more is better.
    """
    pairs = []
    gc.freeze()  # collecting before each run then looks at what the runs left alone
    try:
        for index in range(repeats + (repeats > 1)):
            if index % 2:
                late = reference()
                pairs.append((ours(), late))
            else:
                pairs.append((ours(), reference()))
    finally:
        gc.unfreeze()
    pairs = pairs[-repeats:]
    ratios = [b / a if throughput else a / b for a, b in pairs]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if repeats > 1 else ratios * 3
    return Row(
        what,
        seconds(median(a for a, _ in pairs)),
        seconds(median(b for _, b in pairs)),
        median(ratios),
        target,
        (low, high),
        throughput,
    )


def weigh(what: str, ours: int, reference: int, target: float) -> Row:
    """A comparison of two sizes in bytes."""
    return Row(what, size(ours), size(reference), ours / reference, target)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that torch's CPU allocator had handed out at once during a run.

    Above what was held before, exact and the same each time, as it is the allocator's own count:
    the process' resident size would add what libraries keep for later, and the peak of loading.
    """
    gc.collect()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        result = run()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    now = peak = 0
    for event in events:
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def held_bytes(thing: Any) -> int:
    """Bytes of all tensor memory that can be reached from an object, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    open_ = [thing]
    while open_:
        one = open_.pop()
        if id(one) in seen or one is None or isinstance(one, str | int | float | bool):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            open_ += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            open_ += one
        else:
            open_ += getattr(one, "__dict__", {}).values()
    return sum(storages.values())


def seconds(value: float) -> str:
    """A time, for people."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def size(n_bytes: float) -> str:
    """A size, for people."""
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.1f} KiB"
