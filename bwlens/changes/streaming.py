"""Examples in order, never all at once: counted, parted, as tokens, as gradients."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch leaves functions untyped.)

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from bwlens.data.examples import Example, examples_of
from bwlens.gradient.capturing import Gradients, capture
from bwlens.gradient.objectives import SFT
from bwlens.model.context import check_length
from bwlens.model.protocol import LensModel
from bwlens.runs.parts import Failure


def numbered(examples: Any) -> Iterator[tuple[int, Any]]:
    """Examples with their index, or why one cannot be used."""
    yield from enumerate(examples_of(examples))


def chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Several at a time."""
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def counted(examples: Any, part_size: int) -> tuple[list[int], str]:
    """How many there are in each part, and a mark of what they say."""
    if isinstance(examples, Iterator):
        raise TypeError(
            "examples are an iterator, which can be walked through once; give a list or a file, so"
            " that a run can be carried on"
        )
    mark, n = hashlib.sha256(), 0
    for _, one in numbered(examples):
        said = one.prompt + "\0" + one.text if isinstance(one, Example) else repr(one)
        mark.update(said.encode("utf-8", "surrogatepass"))
        n += 1
    if not n:
        raise ValueError("there is no example")
    return [min(part_size, n - at) for at in range(0, n, part_size)], mark.hexdigest()[:16]


class Parts:
    """The parts of the examples, read in order; a part before the last one read starts anew."""

    def __init__(self, examples: Any, part_size: int) -> None:
        self._examples, self._size = examples, part_size
        self._next, self._chunks = 0, chunks(numbered(examples), part_size)

    def part(self, number: int) -> list[tuple[int, Any]]:
        """The examples of one part."""
        if number < self._next:
            self._next, self._chunks = 0, chunks(numbered(self._examples), self._size)
        while True:
            chunk = next(self._chunks)
            self._next += 1
            if self._next == number + 1:
                return chunk


def tokenised(
    model: LensModel,
    some: Sequence[tuple[int, Any]],
    max_tokens: int,
    prepend_bos: bool | None,
    failures: list[Failure],
) -> list[tuple[int, Example, list[int], int]]:
    """Index, example, token ids and the first token that is learned."""
    rows = []
    for item, one in some:
        if not isinstance(one, Example):
            failures.append(Failure(item, f"{one.field} {one.message}"))
            continue
        try:
            ids, start = one.tokens(model, prepend_bos)
            ids = ids[:max_tokens]
            if len(ids) <= start:
                raise ValueError(f"its answer begins after {max_tokens} tokens (max_tokens)")
            check_length(model, [ids])
        except (ValueError, TypeError) as error:
            failures.append(Failure(item, str(error)))
            continue
        rows.append((item, one, ids, start))
    return rows


def captured(model: LensModel, batch: Any, matrices: Any, layers: Any) -> Gradients:
    """The gradients of a batch of `tokenised` examples, of what is learned of each."""
    masks = [[i >= start for i in range(len(ids))] for _, _, ids, start in batch]
    return capture(model, [ids for _, _, ids, _ in batch], SFT(masks), matrices, layers)
