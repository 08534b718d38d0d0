"""Execution of units of work on all nodes by Ray Data, with progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import ray
import ray.data

from mimkd_ray import storage
from mimkd_ray.data.prepare.unit_progress import Progress
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.errors import LOST_LOADER, DamagedDataError, UserError
from mimkd_ray.secret_urls import Carried

RETRY_WAITS_S = (5.0, 20.0, 60.0)
"""Pauses before a unit is repeated whose storage failed for longer than attempts.py tries."""

MAX_RETRIES = 3
"""Repetitions of a task of which a loader process was killed."""

MAX_TASKS = 2000
"""Most tasks for the units: each costs Ray some 10 ms; units are still committed one by one."""

ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, DamagedDataError, storage.StorageError)
}
"""Errors with a message for the user, sent to the driver by name."""


class Unit(Protocol):
    """Restartable, picklable work."""

    @property
    def bytes(self) -> int:
        """Size of the unit in bytes."""
        ...

    def __call__(self) -> Done:
        """Do the work. May be called again after a failure."""
        ...


def quiet_and_patient() -> None:
    """Configure Ray Data for units: progress is shown here, and a unit, or a cluster that grows, may take long."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1
    context.retried_map_errors = [LOST_LOADER]
    context.max_map_retries = MAX_RETRIES
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def run_units(units: Sequence[Unit], title: str, workers: int = 0) -> Iterator[Done]:
    """Run the units on all nodes of the connected Ray, one CPU each, and yield the result of each when it ends.

    `workers` limits the number that run at the same time (each holds its data in memory); 0 = one per CPU. Raises a
    unit's UserError, DamagedDataError or StorageError; committed results are kept. Ray repeats the tasks of nodes that
    die.
    """
    quiet_and_patient()
    rows = [{"unit": ray.cloudpickle.dumps((unit, Carried()))} for unit in units]
    tasks = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_TASKS))
    done = tasks.map(do_unit, num_cpus=1, **({"concurrency": workers} if workers else {}))
    with Progress(title, sum(unit.bytes for unit in units)) as progress:
        for result in done.iter_rows():
            if result["error"]:
                raise ERRORS[result["error"]](result["message"])
            progress.add(Done(result["rows"], result["bytes"]))
            yield Done(result["rows"], result["bytes"])


def do_unit(row: dict[str, Any], sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Run a unit in a task. After a failure of storage it waits and tries again; errors for the user are returned as a
    result."""
    unit: Unit = ray.cloudpickle.loads(row["unit"])[0]
    for wait in (*RETRY_WAITS_S, None):
        try:
            done = unit()
            return {"error": "", "message": "", "rows": done.rows, "bytes": done.bytes}
        except storage.StorageError as error:
            if wait is None:
                return _answer(storage.StorageError, f"{error}; start again when it answers: what is finished stays")
            sleep(wait)
        except (UserError, DamagedDataError) as error:
            return _answer(type(error), str(error))
    raise AssertionError("unreachable")


def _answer(kind: type[Exception], message: str) -> dict[str, Any]:
    return {"error": kind.__name__, "message": message, "rows": 0, "bytes": 0}
