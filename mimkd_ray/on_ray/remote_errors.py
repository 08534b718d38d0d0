"""Errors with a sentence for the user, from another process of Ray: they are sent by name, or raised as they were."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import ray
from ray.exceptions import RayTaskError

from mimkd_ray.errors import DamagedDataError, Interrupted, NonFiniteLossError, UserError
from mimkd_ray.storage import AccessError, StorageError

T = TypeVar("T")

ERRORS = (UserError, DamagedDataError, NonFiniteLossError, Interrupted, StorageError, AccessError)
"""Errors that a restart does not cure."""

RETRY_WAITS_S = (5.0, 20.0, 60.0)
"""Pauses before work is repeated whose storage failed for longer than retries.py tries."""


def kind_of(error: Exception) -> str:
    """Return the name by which an error is sent, that of the nearest class in ERRORS: errors have subclasses."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind in ERRORS)


def raise_told(kind: str, message: str) -> NoReturn:
    """Raise the error that was sent."""
    raise {each.__name__: each for each in ERRORS}[kind](message)


def fetch(answer: Any) -> Any:
    """Return what a task returns. Raises its error as it was raised there, without Ray's traceback around it."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        if isinstance(error.cause, ERRORS):
            raise error.cause from None
        raise


def with_patience(work: Callable[[], Iterable[T]], sleep: Callable[[float], None] = time.sleep) -> Iterator[T]:
    """Yield what ``work()`` gives. After a failure of storage it waits and asks for the work anew, of which the caller
    leaves out what has been given."""
    for wait in (*RETRY_WAITS_S, None):
        try:
            yield from work()
            return
        except StorageError as error:
            if wait is None:
                raise StorageError(f"{error}; start again when it answers: what is finished stays") from error
            sleep(wait)
