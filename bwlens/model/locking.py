"""One pass at a time on one model: passes hang hooks into it and switch its modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_making = Lock()


@contextmanager
def alone_with(model: Any) -> Iterator[None]:
    """Keep other threads' passes away from a model; within one thread, passes may nest.

    Bridges around one Hugging Face model are one model.
    """
    with _making:
        lock = _locks.setdefault(getattr(model, "original_model", model), RLock())
    with lock:
        yield
