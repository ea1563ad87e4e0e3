"""One thread at a time on one model: passes hang hooks into it, changes stand in its weights."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from threading import Lock, RLock, get_ident
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import nn

from bwlens.model.protocol import LensModel

Method = TypeVar("Method", bound=Callable[..., Any])

_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_owners: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
_making = Lock()


@contextmanager
def alone_with(model: LensModel) -> Generator[None, None, None]:
    """Other threads wait for the model; within one thread, this may nest.

    Bridges around one Hugging Face model are one model.

    Raises:
        RuntimeError: The model is changed for another thread, see `for_this_thread`.
    """
    one = _one(model)
    with _making:
        lock = _locks.setdefault(one, RLock())
    with lock:
        if any(owner != get_ident() for owner in _owners.get(one, ())):
            raise RuntimeError(
                "another thread has a change applied to this model for a time; wait until it is"
                " done, apply the change for all threads (change.apply(model) ..."
                " change.undo(model)), or give each thread a model of its own"
                " (change.edited(model))"
            )
        yield


@contextmanager
def for_this_thread(model: LensModel) -> Generator[None, None, None]:
    """Other threads are refused the model, as it is changed meanwhile.

    They do not wait: a thread that this one waits for would do so for ever.

    Raises:
        RuntimeError: It is changed for another thread already.
    """
    with alone_with(model):
        owners = _owners.setdefault(_one(model), [])
        owners.append(get_ident())
    try:
        yield
    finally:
        owners.pop()


def one_thread_at_a_time(method: Method) -> Method:
    """A function of a model that other threads wait for, from its first pass to its last."""

    @wraps(method)
    def alone(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, nn.Module):
            return method(model, *args, **kwargs)  # which says what is wrong with it
        with alone_with(cast(Any, model)):
            return method(model, *args, **kwargs)

    return cast(Method, alone)


def _one(model: LensModel) -> Any:
    return getattr(model, "original_model", model)
