"""Execution of units of work on all nodes by Ray Data, with progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import ray
import ray.data

from mimkd_ray.data.prepare.unit_progress import Progress
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.errors import LOST_LOADER
from mimkd_ray.on_ray.remote_errors import ERRORS, kind_of, raise_told, with_patience
from mimkd_ray.secret_urls import Carried

MAX_RETRIES = 3
"""Repetitions of a task of which a loader process was killed."""

MAX_TASKS = 2000
"""Most tasks for the units: each costs Ray some 10 ms; units are still committed one by one."""


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
                raise_told(result["error"], result["message"])
            progress.add(Done(result["rows"], result["bytes"]))
            yield Done(result["rows"], result["bytes"])


def do_unit(row: dict[str, Any], sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Run a unit in a task. After a failure of storage it waits and tries again; errors for the user are returned as a
    result."""
    unit: Unit = ray.cloudpickle.loads(row["unit"])[0]
    try:
        [done] = with_patience(lambda: [unit()], sleep)
    except ERRORS as error:
        return answer(error)
    return answer(None, done)


def answer(error: Exception | None, done: Done = Done(0, 0)) -> dict[str, Any]:  # noqa: B008
    """Return the row of a result: what was done, or the error, by name."""
    kind = kind_of(error) if error is not None else ""
    return {"error": kind, "message": str(error or ""), "rows": done.rows, "bytes": done.bytes}
