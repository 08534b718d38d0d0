"""The command line of jobs/prepare_data.py, and the data preparation that it starts.

Exit status: 0 done, 1 the run failed, 2 bad input, 3 stopped (SIGTERM), 130 interrupted. Errors are one
line on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from mimkd_ray import console, storage
from mimkd_ray.cli import command_line
from mimkd_ray.config import PrepareConfig
from mimkd_ray.data.prepare.make_shards import Unit, prepare
from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.data.sources.shard_manifest import Manifest
from mimkd_ray.errors import UserError, count
from mimkd_ray.on_ray.nodes import environment


@dataclass(frozen=True, kw_only=True)
class PrepareJob(PrepareConfig):
    """Preparation of a data set: shuffled shards of equal blocks. A run that was killed resumes when it is started
    again."""

    address: str = ""
    """Ray cluster to use, host:port of its head or `auto`; unset: RAY_ADDRESS, else this process starts Ray."""
    workers: int = 0
    """Units at the same time, each of which takes a CPU and 1 to 2 GB of memory; 0 = one per CPU of the cluster."""
    wait_minutes: float = 0.0
    """Minutes for which to wait for a CPU of the cluster, while other jobs hold all of them."""
    verbose: bool = False
    """Show what Ray and its workers print themselves, which else goes to ray.log in the target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: give 1 or more, or 0 for one per CPU")
        if self.wait_minutes < 0:
            raise UserError(f"--wait-minutes {self.wait_minutes:g}: give 0 or more")


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the job for a command line; return the exit status."""
    program = program or sys.argv[0]

    def work() -> int:
        job = command_line.from_flags(PrepareJob, sys.argv[1:] if argv is None else argv, prog=program)
        if job is not None:
            print(summary(prepare_with_ray(job), job.target), flush=True)
        return 0

    return command_line.guarded(program, work, "the same command goes on from what is finished")


def prepare_with_ray(job: PrepareJob) -> Manifest:
    """Prepare a split on a cluster, or on a Ray of this process, which is started if there is work and ends with it."""
    own: list[bool] = []  # one entry once Ray is connected

    def run(units: Sequence[Unit], title: str) -> Iterator[Done]:
        environment.prepare(job.address)
        from mimkd_ray.on_ray import run_work_units  # Ray takes seconds to import and reads its environment on import
        from mimkd_ray.on_ray.driver_console import joined
        from mimkd_ray.on_ray.nodes.placement import wait_for_room

        if not own:
            target = storage.absolute(job.target)
            own.append(connected.enter_context(joined(job.address, "--address", target, job.verbose)))
        if not own[0]:
            wait_for_room(1, 1, 0, 60 * job.wait_minutes, "unit", patience="--wait-minutes")
        return run_work_units.run_units(units, title, job.workers)

    with ExitStack() as connected, console.phase(f"split '{job.split}' of {job.source}: looking what is there"):
        return prepare(job, run)


def summary(manifest: Manifest, target: str) -> str:
    """Return a summary of a finished split, in two lines."""
    total = sum(shard.bytes for shard in manifest.shards)
    blocks = sum(len(shard.blocks) for shard in manifest.shards)
    left_out = f"{count(manifest.damaged, 'damaged image')} left out (see {manifest.split}.damaged.json)"
    return (
        f"{target}: split '{manifest.split}' holds {count(manifest.rows, 'image')} of "
        f"{count(len(manifest.classes), 'class', 'classes')}, {total / 1e6:,.1f} MB in "
        f"{count(len(manifest.shards), 'shard')} and {count(blocks, 'block')} of {manifest.block_rows}\n"
        f"{left_out if manifest.damaged else 'no damaged images'}; digest {manifest.digest}"
    )
