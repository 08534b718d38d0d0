"""Cost of a search: trials per hour with a cache and in packs, the start of a trial, and memory over many trials.

Trials per hour of 8 trials of a CIFAR-100 search (ResNet-32x4 teacher, ResNet-8x4 student), wall clock of the whole
commands, on all cores:

* `jobs_live`: jobs/cifar100.py once for each trial, one after the other with all threads; the teacher runs in each.
* `tune_cache`: jobs/search.py with a cache of the teacher that was built before. Its building time is shown beside it.
* `pack_live`: jobs/search.py --search.pack 4, the teacher runs once for each pack. `pack_cache`: with the cache.

All train the same 8 configurations (the default space, drawn by one seed, no scheduler), each with its own loss, on the
same batches, with the same evaluations and checkpoints. A search runs as many trials or packs at a time as there are
cores, each with one thread: its default.

The lower limit for `tune_cache` is the start of the search, and for each of its trials the start and the training of a
student outside a search, as many at a time, with one thread each. Two kinds of these are trained: `jobs_cache` is each
configuration as a separate job with the cache, so that the rest is the cost of Tune; `plain` is the student without any
teacher, so that the rest includes the critics of these configurations.

The start of a trial is counted from its request to its first step. Then many tiny trials run on a Ray of this script
that outlives them (search_tiny.py): memory during the search, and what the trials leave behind.

Not measured: GPUs, several nodes, ASHA (it would stop other trials in each arm), finals. Teachers are random unless
--weights is given: speed does not depend on it. An epoch is far shorter than CIFAR-100's, so the cache's canary, a
batch of the teacher for each epoch, is off. Trials are short (--steps), so starts weigh more than in a real search;
their duration is among the figures.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import image_set
from cache import NOTHING, small_images
from ray_overhead import seconds_by_stage
from report import finish, parser, table
from search_tiny import environment, tiny

from mimkd_ray.config import CacheConfig, Config, LaunchConfig, RunConfig, SearchConfig, SearchJob
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.config.jobs.search import search_job
from mimkd_ray.recipes import CIFAR_RECIPES
from mimkd_ray.search.configs import Made, TrialConfigs, trial_config
from mimkd_ray.search.optuna_study import draw_pack
from mimkd_ray.search.spaces import find_spaces
from mimkd_ray.search.trial_files import Table

JOBS = Path(__file__).resolve().parents[1] / "jobs"
ARMS = ("jobs_live", "tune_cache", "pack_live", "pack_cache", "plain", "jobs_cache")
UNSEARCHED = ("plain", "jobs_cache")
"""Arms with which the search with the cache is compared; not part of the comparison of arms."""
TRIALS, PACK, EPOCHS = 8, 4, 2
HOLDOUT = 0.1
STAGES = {
    "parsed": "process, imports, command line",
    "checked": "checks before the start",
    "worker": "worker",
    "asked": "placement, process, imports",
    "data": "opening the data",
    "teacher": "teacher, and its check",
    "cache": "cache; checks of a pack",
    "built": "student, loader",
    "first_batch": "first batch",
    "first_step": "first step",
    "all": "in all",
}


@dataclass(frozen=True)
class Ran:
    """A trial that was trained: Unix times."""

    asked: float
    marks: dict[str, float]
    ended: float

    def start(self) -> dict[str, float]:
        """Return the seconds of each stage up to the first step, and their sum."""
        return seconds_by_stage(self.asked, self.marks)


@contextmanager
def running(job: str, config: Config, name: str, folder: Path, threads: int = 0) -> Iterator[Callable[[], None]]:
    """Start a job of ours with this config; yield the function that waits for its end. 0 threads: as many as it takes
    by default."""
    file, log = folder / f"{name}.json", folder / f"{name}.log"
    file.write_text(json.dumps(to_dict(config)))
    own = environment() | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, str(JOBS / job), "--config", str(file)]
    with log.open("wb") as out, subprocess.Popen(command, env=own, stdout=out, stderr=subprocess.STDOUT) as process:

        def wait() -> None:
            if process.wait():
                raise SystemExit(f"{name} ended with {process.returncode}:\n{log.read_text()[-3000:]}")

        try:
            yield wait
        finally:
            process.terminate()  # no effect on a process that has ended


class Arms:
    """The arms, and the time that each took so far."""

    def __init__(self, job: SearchJob, cached: SearchJob, planned: Sequence[Made], folder: Path, args: Any) -> None:
        self.job, self.cached, self.planned, self.folder = job, cached, planned, folder
        self.threads, self.cores = args.threads, os.cpu_count() or 1
        self.seconds: dict[str, float] = {}
        self.ran: dict[str, list[Ran]] = {}
        self.began: dict[str, float] = {}
        self.steps: set[int] = set()

    def measure(self, arm: str, part: int) -> None:
        """Run an arm. Those of separate processes have two parts, before and after the others."""
        if arm == "jobs_live":
            half = len(self.planned) // 2
            for at in range(part * half, (part + 1) * half):
                self.lone(arm, [self.as_job(self.planned[at], f"{arm}-{at}")], self.threads)
        elif arm == "jobs_cache":
            half = len(self.planned) // 2
            jobs = [
                replace(self.as_job(self.planned[at], f"{arm}-{at}"), cache=self.cached.cache)
                for at in range(part * half, (part + 1) * half)
            ]
            for first in range(0, half, self.cores):
                self.lone(arm, jobs[first : first + self.cores], 1)
        elif arm == "plain":
            plain = [self.as_job(self.planned[0], f"{arm}-{part}-{core}") for core in range(self.cores)]
            self.lone(arm, [replace(config, loss=NOTHING) for config in plain], 1)
        elif part == 0:
            job = self.cached if arm.endswith("cache") else self.job
            pack = PACK if arm.startswith("pack") else 1
            self.search(arm, replace(job, run=replace(job.run, name=arm), search=replace(job.search, pack=pack)))

    def as_job(self, planned: Made, name: str) -> Config:
        """Return a trial's config as a separate job."""
        config = planned.config
        run = replace(config.run, root=str(self.folder), name=name)
        return replace(config, run=run, launch=LaunchConfig(backend="local", gpu="off"))

    def lone(self, arm: str, configs: Sequence[Config], threads: int) -> None:
        """Run jobs at the same time."""
        began = time.time()
        names = [config.run.name for config in configs]
        with ExitStack() as stack:
            started = [running("cifar100.py", c, c.run.name, self.folder, threads) for c in configs]
            for wait in [stack.enter_context(each) for each in started]:
                wait()
        self.seconds[arm] = self.seconds.get(arm, 0.0) + time.time() - began
        for name in names:
            self.note(arm, began, self.folder / name)
        print(f"{', '.join(names)}: {time.time() - began:.1f} s", flush=True)

    def search(self, arm: str, job: SearchJob) -> None:
        """Run a search, which must train the planned configurations."""
        self.began[arm] = time.time()
        with running("search.py", job, arm, self.folder) as wait:
            wait()
        self.seconds[arm] = time.time() - self.began[arm]
        rows = Table(str(self.folder / arm), "top1").rows
        wanted = sorted(str(planned.params) for planned in self.planned)
        if sorted(str(row.params) for row in rows.values()) != wanted or {r.state for r in rows.values()} != {
            "completed"
        }:
            raise SystemExit(f"{arm}: its trials are not those that were planned, or failed: {list(rows.values())}")
        for name in rows:
            trial, _, member = name.partition("/")
            place = self.folder / arm / "tune" / f"trial-{trial}"
            asked = (place / "params.json").stat().st_mtime
            self.note(arm, asked, max(place.glob("checkpoint_*")) / member)
        print(f"{arm}: {self.seconds[arm]:.1f} s", flush=True)

    def note(self, arm: str, asked: float, place: Path) -> None:
        """Record a finished run."""
        file = place / "result.json"
        result = json.loads(file.read_text())
        self.steps.add(result["steps"])
        self.ran.setdefault(arm, []).append(Ran(asked, result["timeline"], file.stat().st_mtime))

    def figures(self) -> dict[str, float]:
        """Return the times of the arms, and their ratios if both were run."""
        if len(self.steps) != 1:
            raise SystemExit(f"runs have different numbers of steps: {self.steps}")
        figures: dict[str, float] = {"steps": float(*self.steps)}
        for arm, seconds in self.seconds.items():
            figures[f"{arm}/seconds"] = seconds
            if arm not in UNSEARCHED:
                figures[f"{arm}/trials_per_hour"] = TRIALS * 3600 / seconds
        for arm in ("tune_cache", "pack_live", "pack_cache"):
            if {arm, "jobs_live"} <= self.seconds.keys():
                figures[f"{arm}_over_jobs_live"] = self.seconds["jobs_live"] / self.seconds[arm]
        if "tune_cache" in self.ran:
            figures |= self.over_students()
        return figures | self.starts()

    def over_students(self) -> dict[str, float]:
        """Return the time of the search with the cache, compared with its start and students outside a search."""
        trials = self.ran["tune_cache"]
        start = min(each.asked for each in trials) - self.began["tune_cache"]
        trial_starts = sum(each.start()["all"] for each in trials)
        figures = {"search_start_seconds": start, "sum_of_trial_starts_seconds": trial_starts}
        for arm in UNSEARCHED:
            if arm in self.ran:
                student = statistics.fmean(each.ended - each.marks["first_step"] for each in self.ran[arm])
                wanted = start + (trial_starts + TRIALS * student) / self.cores
                figures |= {
                    f"{arm}_student_seconds": student,
                    f"b_over_{arm}_plus_startup": self.seconds["tune_cache"] / wanted,
                }
        return figures

    def starts(self) -> dict[str, float]:
        """Return the medians of the seconds of each stage of a trial's start; those of a search with and without a new
        process."""
        kinds = {"jobs_live": self.ran.get("jobs_live", [])}
        for arm in ("tune_cache", "pack_live"):
            trials = sorted(self.ran.get(arm, []), key=lambda each: each.asked)
            at_a_time = self.cores * (PACK if arm == "pack_live" else 1)
            kinds |= {f"{arm}_first": trials[:at_a_time], f"{arm}_next": trials[at_a_time:]}
        found = {kind: [each.start() for each in trials] for kind, trials in kinds.items() if trials}
        middle = {
            kind: {stage: statistics.median(start[stage] for start in starts) for stage in starts[0]}
            for kind, starts in found.items()
        }
        rows = [
            [text, *(f"{stages[stage]:.2f}" if stage in stages else "" for stages in middle.values())]
            for stage, text in STAGES.items()
        ]
        print("\n" + table(["seconds to the first step", *middle], rows) + "\n", flush=True)
        return {
            f"start/{kind}/{stage}_seconds": value for kind, stages in middle.items() for stage, value in stages.items()
        }


def imports() -> float:
    """Return the seconds in which a fresh process imports the modules of a trial's process."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "import mimkd_ray.on_ray.search.tune_trials"], env=environment(), check=True
        )
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def base_job(args: Any, folder: Path) -> SearchJob:
    """Return the search without a cache, on images that give each trial the requested steps."""
    rows = round(args.steps // EPOCHS * 64 / (1 - HOLDOUT)) + 64
    images = image_set.images(args.cifar, rows) if args.cifar else small_images(rows)
    image_set.write_parquet(images, folder / "data" / "train-00000-of-00001.parquet")
    recipe = CIFAR_RECIPES["resnet32x4_resnet8x4"]()
    return search_job(
        replace(
            recipe,
            data=replace(recipe.data, root=str(folder / "data"), views=EPOCHS, store=str(folder / "store")),
            teacher=replace(recipe.teacher, weights=args.weights, allow_chance=True),
            train=replace(recipe.train, epochs=EPOCHS, information_rows=64),
            launch=LaunchConfig(gpu="off"),
            run=RunConfig(root=str(folder)),
        ),
        search=SearchConfig(algorithm="random", scheduler="none", trials=TRIALS, holdout=HOLDOUT, finalists=0),
    )


def build_cache(job: SearchJob, folder: Path) -> float:
    """Build the cache that the search needs, with all cores; return its seconds."""
    widest = TrialConfigs(trial_config(job, job.search), find_spaces(job.search.space)).widest()
    config = replace(widest, launch=LaunchConfig(backend="local", gpu="off"))
    began = time.time()
    with running("cache_teacher.py", config, "cache-build", folder) as wait:
        wait()
    return time.time() - began


def arms(args: Any, folder: Path) -> dict[str, float]:
    """Return the figures of the requested arms."""
    job = base_job(args, folder)
    cached = replace(job, cache=CacheConfig(root=str(folder / "cache"), canary=0.0, calibration_rows=512))
    configs = TrialConfigs(trial_config(job, job.search), find_spaces(job.search.space))
    planned = [configs(params) for params in draw_pack(replace(job.search, pack=TRIALS), configs, 0, [])]
    teachers = sum(each.config.loss.uses_teacher for each in planned)
    print(f"{TRIALS} configurations, {teachers} of which use the teacher", flush=True)
    figures = {"trials_with_teacher": float(teachers), "imports_seconds": imports()}
    if {"tune_cache", "pack_cache", "jobs_cache"} & set(args.only):
        figures["cache_build_seconds"] = build_cache(cached, folder)
        print(f"cache built in {figures['cache_build_seconds']:.1f} s", flush=True)
    own = Arms(job, cached, planned, folder, args)
    for part, order in enumerate(
        (("jobs_live", "plain", "jobs_cache", *ARMS[1:4]), ("jobs_cache", "plain", "jobs_live"))
    ):
        for arm in order:
            if arm in args.only:
                own.measure(arm, part)
    return figures | own.figures()


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--cifar", metavar="DIR", help="Parquet files of CIFAR-100 (default: generated images)")
    options.add_argument("--weights", default="random", help="weights of the teacher")
    options.add_argument("--steps", type=int, default=200, help="steps of a trial, of 64 images")
    options.add_argument("--only", nargs="*", choices=ARMS, default=list(ARMS), help="which arms")
    options.add_argument("--tiny", type=int, default=200, help="number of tiny trials")
    options.add_argument("--skip-tiny", action="store_true", help="leave them out")
    args = options.parse_args()
    targets: dict[str, tuple[Literal[">=", "<="], float]] = {
        "pack_live_over_jobs_live": (">=", 1.8),
        "b_over_plain_plus_startup": ("<=", 1.1),
        "b_over_jobs_cache_plus_startup": ("<=", 1.1),
        "tiny/trials_ended": (">=", args.tiny),
        "tiny/trials_failed": ("<=", 0),
        "tiny/driver_growth_megabytes": ("<=", 50),
        "tiny/head_growth_megabytes": ("<=", 50),
        "tiny/leaked_processes": ("<=", 0),
        "tiny/leaked_placement_groups": ("<=", 0),
    }
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="search-") as name:
        if args.only:
            figures |= arms(args, Path(name))
        if not args.skip_tiny:
            figures |= tiny(args.tiny, os.cpu_count() or 1, Path(name))
    shown = [[key, value] for key, value in figures.items() if "_megabytes_at_" not in key and "start/" not in key]
    print("\n" + table(["figure", "measured"], shown))
    return finish("search", figures, {key: t for key, t in targets.items() if key in figures}, args.json)


if __name__ == "__main__":
    sys.exit(main())
