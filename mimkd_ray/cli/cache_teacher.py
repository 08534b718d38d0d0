"""The command line of jobs/cache_teacher.py: plan and build a cache, on a cluster or locally; maintain caches.

Exit status: 0 done, 1 the job failed (or `verify` found damage), 2 bad input, 3 stopped (SIGTERM), 130 interrupted.
Errors are one line on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mimkd_ray import console, storage
from mimkd_ray.cache_build.build_cache import Built, build
from mimkd_ray.cache_build.build_setup import Runner, Setup
from mimkd_ray.cache_build.build_units import in_process
from mimkd_ray.cache_build.measured_plan import measured_plan
from mimkd_ray.cli import command_line
from mimkd_ray.cli.local_launch import pick_device
from mimkd_ray.cli.training import absolute
from mimkd_ray.config import Config
from mimkd_ray.config.form.values import check_values
from mimkd_ray.errors import UserError, count
from mimkd_ray.on_ray.nodes import environment
from mimkd_ray.secret_urls import hide
from mimkd_ray.teacher_cache import admin

ADMIN = ("ls", "verify", "gc")
PLANNING = "measuring what the cache costs"


@dataclass(frozen=True, kw_only=True)
class RootConfig:
    """The place of caches."""

    root: str = ""
    """Folder or URL that contains the caches."""

    def __post_init__(self) -> None:
        hide(self, "root")


@dataclass(frozen=True, kw_only=True)
class AdminJob:
    """ls: list caches. verify: compare every object with its manifest. gc: find objects that no manifest lists."""

    cache: RootConfig = field(default_factory=RootConfig)
    mend: bool = False
    """verify: remove damaged objects, so that the next build makes them anew."""
    delete: bool = False
    """gc: remove the objects that it finds."""
    hours: float = 24.0
    """gc: least age in hours of removed objects that belong to no finished view, because a build may be in progress."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.hours < 0:
            raise UserError(f"--hours {self.hours:g}: give 0 or more; objects of a build in progress are young")


def main(
    recipes: Mapping[str, Callable[[], Config]], argv: Sequence[str] | None = None, program: str | None = None
) -> int:
    """Run ``cache_teacher.py [build|plan] [RECIPE] [--field.path value ...]`` or ``ls|verify|gc --cache.root URL``;
    return the exit status."""
    program = program or sys.argv[0]
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in ("build", "plan", *ADMIN) else "build"

    def work() -> int:
        if command in ADMIN:
            return look_after(command, arguments, f"{program} {command}")
        usage = f"{program} [build|plan|{'|'.join(ADMIN)}]"
        config = command_line.parse(recipes, next(iter(recipes)), arguments, usage)
        if config is not None:
            with console.phase("teacher cache", said=False):
                make(absolute(config), only_plan=command == "plan")
        return 0

    return command_line.guarded(program, work, "the same command goes on from what is finished")


def look_after(command: str, arguments: Sequence[str], program: str) -> int:
    """Run ls, verify or gc; return the exit status."""
    job = command_line.from_flags(AdminJob, arguments, prog=program)
    if job is None:
        return 0
    root = storage.absolute(job.cache.root) if job.cache.root else ""
    found = admin.Verified()
    lines = {
        "ls": lambda: admin.ls(root),
        "verify": lambda: admin.verify(root, job.mend, found),
        "gc": lambda: admin.gc(root, job.hours, job.delete),
    }[command]()
    for line in lines:
        print(line, flush=True)
    if command == "verify":
        hint = (
            "; give the build command again" if job.mend else "; --mend true removes them, and a build makes them anew"
        )
        print(
            f"{found.objects:,} objects, {found.bytes / 1e6:,.1f} MB: {found.damaged:,} damaged or gone"
            f"{hint if found.damaged else ''}"
        )
    return 1 if found.damaged and not job.mend else 0


def make(config: Config, only_plan: bool = False) -> Built | None:
    """Print the plan and build the cache: with Ray, or (launch.backend local) in this process."""
    storage.be_patient(config.storage.patience_minutes)
    if config.launch.backend == "local":
        with console.phase(PLANNING):
            setup = Setup(config, pick_device(config.launch, 0))
            plan = measured_plan(setup).text()
        console.line(plan)
        return None if only_plan else finish(setup, in_process(setup))
    environment.prepare(config.launch.address)
    from mimkd_ray.on_ray import cache_actors  # Ray takes seconds to import and reads its environment on import
    from mimkd_ray.on_ray.driver_console import joined

    folder = "" if only_plan else config.cache.root  # a plan writes nothing
    with joined(config.launch.address, "--launch.address", folder, config.launch.verbose) as own:
        with console.phase(PLANNING):
            cluster = cache_actors.Cluster(config, own)
            plan = cluster.plan()
        console.line(plan)
        return None if only_plan else finish(cluster.setup(), cluster.run)


def finish(setup: Setup, run: Runner) -> Built:
    """Build, and print a summary of the cache."""
    built = build(setup, run)
    damaged = f"without features: {count(built.damaged, 'damaged image')}" if built.damaged else "no damaged images"
    console.line(
        f"{setup.config.cache.root}: {count(built.rows, 'image')} x {count(built.views, 'view')}, "
        f"{built.bytes / 1e6:,.1f} MB; {damaged}\n"
        + "\n".join(f"  {label}: {key}" for label, key in built.keys.items())
    )
    return built
