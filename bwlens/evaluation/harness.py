"""Edit, measure, undo: record by record, with one method or several.

A record is turned into tokens once for all methods. Then each method's change is computed, applied,
asked everything in one padded forward pass where that can be, and undone bit for bit.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwlens.data.given import as_records, own_records
from bwlens.data.prose import read_prose
from bwlens.evaluation.evaluation import COLUMNS, MEASURED, Evaluation
from bwlens.evaluation.measuring import Bench, Options, row_of
from bwlens.evaluation.methods import Method, methods_of
from bwlens.evaluation.questions import Questions, questions_of
from bwlens.model.identity import is_demo, model_label
from bwlens.model.sites import check_model
from bwlens.model.targets import unwarned, warn_of_edits
from bwlens.runs.parts import Failure, Part, Process, Run, progress_bar, read_failures, read_tables

if TYPE_CHECKING:
    import pandas as pd

PART_ROWS = 10
"""Rows of a part on disk, or those of one record where it has more: what a killed run loses."""

_HOPELESS = 10
"""A method that fails on each of so many first records cannot run here, and is left out."""

_LEFT_OUT = "cannot run here and is left out"

_PROBLEMS = (ValueError, RuntimeError, ArithmeticError)
"""What may be wrong with one record or one edit; anything else is a mistake in the code."""


def evaluate(
    model: Any,
    methods: Any,
    records: Any = None,
    *,
    settings: Mapping[str, Any] | None = None,
    perplexity_text: str | Path | Sequence[str] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """Edit each record's fact by itself, measure what came of it, undo it.

    Args:
        model: A TransformerBridge or HookedTransformer; it is left as it was found.
        methods: A method's name ("rome", or "none" for the model as it is), a function
            `method(model, edit) -> WeightChange`, a list of these, or a mapping from the names
            that rows are to have.
        records: Records or mappings of their fields, one or several, or what `read_records` takes
            by name. None is the demo's, for the demo model alone: its facts say nothing of another.
        settings: Keyword arguments of the method, where it is one; of several, those of each by
            its name, `{"rome": {"layer": 5}}`.
        perplexity_text: What perplexity is measured on: "demo", a file, a data set's name or
            texts. None is the demo's stories for the demo model, and no perplexity for others.
        out: A folder for the rows. A run that was killed goes on where it was when it is started
            again, and processes started by `accelerate launch` or `torchrun` share it.
        progress: Show a bar.
        **options: See `Options`.

    Returns:
        A row for each record and method. What a record has no data for is nan in its row.

    Raises:
        ValueError: No such method, setting, option or text; no records for a model that is not
            the demo model; no usable record; no method can run here (one of several is left out,
            which `notes` say); `out` holds another run.
        TypeError: Edits, or something else that is no record, where records are meant.

    Source: Meng et al., NeurIPS 2022 (CounterFact); Katz et al., EMNLP 2024, Table 1.

    Example:
        >>> records = bwlens.read_records("demo", limit=20)             # doctest: +SKIP
        >>> bwlens.evaluate(model, "forward_pass_shift", records).summary   # doctest: +SKIP
    """
    chosen = Options.of(options)
    harness = Harness(model, methods_of(methods, settings), records, perplexity_text, chosen)
    return harness.run(out, progress)


class Harness:
    """An evaluation that is set up: it says how long it will take, then does it.

    Args:
        model: A TransformerBridge or HookedTransformer.
        methods: What `methods_of` gives.
        records: As for `evaluate`.
        perplexity_text: As for `evaluate`.
        options: What is measured, and how.

    Raises:
        ValueError: As `evaluate` does.
    """

    def __init__(
        self,
        model: Any,
        methods: Sequence[Method],
        records: Any = None,
        perplexity_text: str | Path | Sequence[str] | None = None,
        options: Options | None = None,
    ) -> None:
        check_model(model)
        self.records = records = as_records(own_records(model, records))
        self.model, self.methods = model, tuple(methods)
        self.options = options or Options()
        if perplexity_text is None and is_demo(model):
            perplexity_text = "demo"
        sentences: Sequence[str] = ()
        if perplexity_text is not None and self.options.perplexity_every:
            sentences = read_prose(perplexity_text)
        self._bench = Bench.of(model, records, sentences, self.options)
        self._failed: Counter[str] = Counter()
        self._able: set[str] = set()
        self._left_out: dict[str, Failure] = {}

    @unwarned()
    def estimate(self) -> float:
        """Seconds that `run` will take, by trying each method on a record.

        What a method loads or makes at its first call is out of the way then.

        Raises:
            ValueError: No method can run here.
        """
        n = len(self.records)
        total, tried = 0.0, []
        for method in self.methods:
            if (item := self._first_that_can_be(method)) is None:
                continue
            _, spent = self._row(method, item, periodic=False)
            total += n * (spent["edit"] + spent["answers"])
            tried.append((method, item))
        _, spent = self._row(*tried[-1], periodic=True)
        for what in ("generation", "perplexity"):  # the same for every method
            if every := getattr(self.options, f"{what}_every"):
                total += len(tried) * -(-n // every) * spent[what]
        return total / Process.current().count

    def run(self, out: str | Path | None = None, progress: bool = True) -> Evaluation:
        """Do the work; with `out`, in parts on disk, carrying on what is there.

        With several processes, the rows are those that are finished by all of them so far.

        Raises:
            ValueError: No method can run here, or `out` holds another run.
        """
        warn_of_edits(self.model, (record.edit for record in self.records))
        n, size = len(self.records), self._part_size
        sizes = [min(size, n - start) for start in range(0, n, size)]
        if out is not None:
            run = Run(out, self.settings(), sizes)
            self._take_up(out)
            if Process.current().index:  # by the first records, whichever this process has
                for method in self._in_play():
                    if method.name not in self._able:
                        self._first_that_can_be(method)
            run.work(self._part, progress=progress, label="Evaluating")
            tables = read_tables(out)
            return self._evaluation([tables["rows"]] if tables else [], read_failures(out))
        tables, failures = [], []
        with progress_bar("Evaluating", n, shown=progress) as advance:
            for part, size in enumerate(sizes):
                done = self._part(part)
                tables.append(done.tables["rows"])
                failures += done.failures
                advance(size)
        return self._evaluation(tables, failures)

    def settings(self) -> dict[str, Any]:
        """All that the rows hang on, as JSON holds it."""
        from bwlens.model.identity import fingerprint

        return {
            "model": {"name": model_label(self.model), "fingerprint": fingerprint(self.model)},
            "records": _digest(map(repr, self.records)),
            "methods": {method.name: method.described() for method in self.methods},
            "perplexity_text": _digest(map(repr, self._bench.prose)),
            "options": asdict(self.options),
        }

    @property
    def _part_size(self) -> int:
        """Few records come in two parts still, to be shared and carried on."""
        records = max(1, PART_ROWS // len(self.methods))
        return min(records, -(-len(self.records) // 2))

    @unwarned()
    def _part(self, part: int) -> Part:
        import pandas as pd

        rows: list[dict[str, Any]] = []
        failures: list[tuple[Method, Failure]] = []
        size = self._part_size
        for item in range(part * size, min((part + 1) * size, len(self.records))):
            questions = None  # the same for all methods
            for method in self._in_play():
                try:
                    questions = questions or self._questions(item)
                    rows.append(row_of(self._bench, method, item, self.records[item], questions)[0])
                    self._able.add(method.name)
                except _PROBLEMS as error:
                    failures.append((method, Failure(item, f"{method.name}: {error}")))
                    self._count(method, error)
        table = pd.DataFrame(rows, columns=COLUMNS)
        kept = [failure for method, failure in failures if method.name not in self._left_out]
        # A column without a value in this part is still one of numbers.
        return Part(
            {"rows": table.astype(dict.fromkeys(MEASURED, float))},
            [*self._left_out.values(), *kept],
        )

    def _questions(self, item: int) -> Questions:
        return questions_of(self.model, self.records[item], self.options.prepend_bos)

    def _row(
        self, method: Method, item: int, periodic: bool
    ) -> tuple[dict[str, Any], dict[str, float]]:
        questions = self._questions(item)
        return row_of(self._bench, method, item, self.records[item], questions, periodic)

    def _in_play(self) -> list[Method]:
        return [method for method in self.methods if method.name not in self._left_out]

    def _take_up(self, folder: str | Path) -> None:
        """What the finished parts of a run say of its methods, so that none is tried in vain."""
        if tables := read_tables(folder):
            self._able |= {str(name) for name in tables["rows"]["method"].unique()}
        for failure in read_failures(folder):
            for name in (method.name for method in self.methods):
                if failure.message.startswith(f"{name} {_LEFT_OUT}"):
                    self._left_out[name] = failure
                elif failure.message.startswith(f"{name}: "):
                    self._failed[name] += 1

    def _count(self, method: Method, error: Exception) -> None:
        """Leave a method out that this model or its settings are not for, and go on with others.

        Raises:
            ValueError: There is no other left.
        """
        self._failed[method.name] += 1
        most = min(_HOPELESS, len(self.records))
        never = isinstance(error, NotImplementedError)
        if method.name in self._able or (self._failed[method.name] < most and not never):
            return
        why = "" if never else f" (it fails on each of the first {most} records)"
        message = f"{method.name} {_LEFT_OUT}{why}: {error}"
        self._left_out[method.name] = Failure(-1, message)
        if not self._in_play():
            raise ValueError("; ".join(one.message for one in self._left_out.values())) from error

    def _first_that_can_be(self, method: Method) -> int | None:
        """The first record that a method can deal with; None where it is left out."""
        for item in range(len(self.records)):
            try:
                self._row(method, item, periodic=False)
            except _PROBLEMS as error:
                self._count(method, error)
                if method.name in self._left_out:
                    return None
            else:
                self._able.add(method.name)
                return item
        raise AssertionError("left out before")

    def _evaluation(
        self, tables: Sequence[pd.DataFrame], failures: Sequence[Failure]
    ) -> Evaluation:
        import pandas as pd

        some = [table for table in tables if len(table)]
        rows = pd.concat(some, ignore_index=True) if some else pd.DataFrame(columns=COLUMNS)
        # What comes from the disk holds words as categories.
        rows = rows.astype(dict.fromkeys(("relation", "method", "note"), "str"))
        # Every part says which methods are left out; what they failed on first is said by that.
        gone = tuple(f"{name}: " for name in self._left_out)
        kept = [f for f in dict.fromkeys(failures) if f.item < 0 or not f.message.startswith(gone)]
        return Evaluation(rows, tuple(kept), len(self.records))


def _digest(texts: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text.encode() + b"\0")
    return whole.hexdigest()[:16]
