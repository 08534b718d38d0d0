"""Kill jobs at random moments, give the same command again, and compare the end with an undisturbed twin.

python tests/kills.py --kills 100
python tests/kills.py --kills 5 --only train-local,prepare-ray --seed 7 --keep /tmp/kills

Jobs: training (local, with loader processes, under Ray), a teacher cache, a search and a preparation of data. Victims:
the whole job with SIGKILL, or one loader process, worker or actor of it, or its driver alone. Sample logs, weights,
results, features, trials and files must be equal, byte for byte. It ends with a table, and with status 1 if anything
differs, or a local job without a loader process ends in a traceback. Only processes that it started are killed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs_here import JOB, ROOT, SMALL, Job, kill, result, tree

LINES, WEIGHTS = "samples.jsonl", "student.safetensors"
OF_A_START = {"images_per_second", "seconds", "timeline", "checkpoints", "resumed_from"}
"""Fields of a result that say how long it took, and from where."""
OFTEN = (
    "--train.epochs",
    "8",
    "--run.checkpoint-every",
    "0",
    "--run.checkpoint-steps",
    "3",
    "--run.log-samples",
    "true",
)
RAY = ("--launch.workers", "2", "--launch.cpus-per-worker", "1", "--launch.max-failures", "20")
LOCAL = ("--launch.backend", "local")
IMAGES, SECONDS = 600, 600


def job_script(name: str) -> list[str]:
    """The interpreter and the script of jobs/ of this name."""
    return [sys.executable, str(ROOT / "jobs" / name)]


def train(root: Path, *more: str) -> list[str]:
    """A run of 40 steps."""
    return [sys.executable, JOB, "demo", *SMALL, *OFTEN, "--run.tensorboard", "false", "--run.root", str(root), *more]


def cache(root: Path, *more: str) -> list[str]:
    """Features of 160 images in 6 views, in shards of 64."""
    own = ("--cache.root", str(root), "--cache.shard-rows", "64", "--data.views", "6", "--data.view-seed", "0")
    return [*job_script("cache_teacher.py"), "build", "demo", *SMALL, *own, *more]


def search(root: Path, *more: str) -> list[str]:
    """Four trials of six epochs. Of a grid: the other algorithms draw other configurations after a restart."""
    own = (
        "--search.trials",
        "4",
        "--search.epochs",
        "6",
        "--search.scheduler",
        "none",
        "--search.algorithm",
        "grid",
        "--search.points",
        "2",
    )
    one = (
        "--search.finalists",
        "0",
        "--search.concurrent",
        "1",
        "--search.space",
        "temperature",
        "--search.retries",
        "9",
    )
    return [*job_script("search.py"), "demo", *SMALL, *own, *one, "--run.root", str(root), *more]


def prepare(root: Path, *more: str) -> list[str]:
    """Shards of the images of `pictures`."""
    source = root.parent / "pictures"
    if not source.exists():
        pictures(source)
    own = ("--block-rows", "8", "--shard-rows", "40", "--workers", "2")
    return [*job_script("prepare_data.py"), "--source", str(source), "--target", str(root), *own, *more]


def pictures(folder: Path) -> None:
    """Class folders with small images of noise."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    for number in range(IMAGES):
        file = folder / "train" / f"class{number % 7}" / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)


def trained(root: Path) -> dict[str, Any]:
    """What a run leaves that must be equal."""
    run = root / "small"
    found = result(run)
    of_result = {f"result.json {name}": value for name, value in found.items() if name not in OF_A_START}
    return {**{name: (run / name).read_bytes() for name in (LINES, WEIGHTS)}, **of_result}


def cached(root: Path) -> dict[str, Any]:
    """The manifests, which have the digests of all features, and the files that they list."""
    found = {}
    for file in root.rglob("*.manifest.json"):
        value = json.loads(file.read_text())
        folder = file.with_name(file.name.removesuffix(".manifest.json"))
        for shard in value["shards"]:
            name, digest = shard[2], shard[4]
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, f"{folder / name} is damaged"
        found[str(file.relative_to(root))] = value["shards_sha256"]
    assert found
    return found


def searched(root: Path) -> dict[str, Any]:
    """Configuration, state and evaluations of every trial."""
    found: dict[str, Any] = {}
    for file in sorted((root / "small" / "trials").glob("*.json")):
        value = json.loads(file.read_text())
        looks = [(point["step"], point["top1"], point["cross_entropy"]) for point in value["curve"]]
        found[file.name] = (value["params"], value["state"], looks)
    assert found
    return found


def prepared(root: Path) -> dict[str, Any]:
    """All files of a set, without what Ray has said."""
    files = (file for file in root.iterdir() if not file.name.startswith(".") and file.name != "ray.log")
    return {file.name: file.read_bytes() for file in files}


def lines_below(root: Path) -> int:
    """Lines of samples and metrics so far."""
    # Not rglob, which does not bear that a checkpoint is removed meanwhile.
    files = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
    return sum(file.read_bytes().count(b"\n") for file in files if file.name in (LINES, "metrics.jsonl"))


def looks_below(root: Path) -> int:
    """Evaluations of a search's trials so far."""
    return sum(file.read_bytes().count(b'"cross_entropy"') for file in root.rglob("trials/*.json") if file.exists())


def files_below(root: Path) -> int:
    """Files so far."""
    return sum(len(files) for _, _, files in os.walk(root))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of job: its command, who is killed, what is compared, and how far it is."""

    command: Callable[..., list[str]]
    more: tuple[str, ...]
    victim: str
    compared: Callable[[Path], dict[str, Any]]
    progress: Callable[[Path], int]


KINDS = {
    "train-local": Kind(train, LOCAL, "job", trained, lines_below),
    "train-loader": Kind(train, (*LOCAL, "--data.loader-workers", "2"), "child", trained, lines_below),
    "cache-local": Kind(cache, LOCAL, "job", cached, files_below),
    "train-ray": Kind(train, RAY, "job", trained, lines_below),
    "train-driver": Kind(train, RAY, "driver", trained, lines_below),
    "train-worker": Kind(train, RAY, "ray", trained, lines_below),
    "cache-ray": Kind(cache, (), "job", cached, files_below),
    "cache-actor": Kind(cache, (), "ray", cached, files_below),
    "search-ray": Kind(search, (), "job", searched, looks_below),
    "search-actor": Kind(search, (), "ray", searched, looks_below),
    "prepare-ray": Kind(prepare, (), "job", prepared, files_below),
    "prepare-worker": Kind(prepare, (), "ray", prepared, files_below),
}


def title(pid: int) -> str:
    """The command line of a process; "" once it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def victims(kind: Kind, job: Job) -> list[int]:
    """The processes of which one is killed, or, of a whole job, all: loader processes, the driver, workers, actors or
    tasks of Ray."""
    if kind.victim == "driver":
        return [job.process.pid]
    below = tree(job.process.pid)
    if kind.victim == "job":
        return below
    if kind.victim == "child":
        return [pid for pid in below[1:] if "resource_tracker" not in title(pid) and title(pid)]
    # Not Ray's own agents: their node ends with them, and it is the only one here.
    titles = {pid: title(pid) for pid in below}
    return [
        pid for pid, name in titles.items() if name.startswith("ray::") and "Agent" not in name and "IDLE" not in name
    ]


def wait(kind: Kind, job: Job, root: Path, until: int) -> bool:
    """Wait until the job is so far; False if it ended before."""
    deadline = time.monotonic() + SECONDS
    while job.process.poll() is None:
        if kind.progress(root) >= until and victims(kind, job):
            return True
        assert time.monotonic() < deadline, f"no progress in {SECONDS} s:\n{job.log.read_text()[-3000:]}"
        time.sleep(0.02)
    return False


def attack(name: str, kind: Kind, folder: Path, kills: int, chance: random.Random) -> tuple[int, int, list[str]]:
    """Return the kills, the jobs that came to their end, and what was wrong."""
    twin, log = folder / "twin", folder / "log.txt"
    job = Job(kind.command(twin, *kind.more), log)
    if job.end(SECONDS):
        return 0, 0, [f"the twin failed:\n{log.read_text()[-2000:]}"]
    wanted, total = kind.compared(twin), kind.progress(twin)
    done, ends, problems = 0, 0, []
    while done < kills and not problems:
        root = folder / f"killed{ends}"
        moments = sorted(chance.randrange(total) for _ in range(min(kills - done, chance.randint(1, 4))))
        job = Job(kind.command(root, *kind.more), log)
        for moment in moments:
            if not wait(kind, job, root, moment):
                break
            time.sleep(chance.random() * 0.2)
            chosen = victims(kind, job)
            if job.process.poll() is not None or not chosen:
                break
            kill(chosen if kind.victim == "job" else [chance.choice(chosen)])
            done += 1
            if kind.victim in ("job", "driver"):
                job.process.wait()
            elif kind.victim == "child":
                job.end(SECONDS)  # it ends with a line, or goes on without the process
                if "Traceback" in log.read_text():
                    problems.append(f"{name}: more than a line:\n{log.read_text()[-2000:]}")
            if job.process.poll() is not None:
                job = Job(kind.command(root, *kind.more), log)
        status = job.end(SECONDS)
        for _ in range(3):
            if status == 1:  # a loader process was killed, or more workers than are started again
                job = Job(kind.command(root, *kind.more), log)
                status = job.end(SECONDS)
        if status:
            problems.append(f"{name}: status {status}:\n{log.read_text()[-2000:]}")
            break
        found = kind.compared(root)
        problems += [f"{name}: {key} differs" for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)]
        ends += 1
        print(f"{name}: {done} kills, {ends} ends, {len(problems)} problems", flush=True)
        if not problems:
            shutil.rmtree(root)
    return done, ends, problems


def main() -> int:
    """Run it for a command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="in all, dealt to the kinds in turn")
    parser.add_argument("--only", default=",".join(KINDS), help=f"kinds, of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="", help="folder for the runs; unset: a temporary one, removed at the end")
    options = parser.parse_args()
    names = options.only.split(",")
    folder = Path(options.keep or tempfile.mkdtemp(prefix="mimkd-kills-")).absolute()
    wrong: list[str] = []
    rows = []
    for number, name in enumerate(names):
        share = options.kills // len(names) + (number < options.kills % len(names))
        if not share:
            continue
        (folder / name).mkdir(parents=True)
        began = time.monotonic()
        done, ends, problems = attack(name, KINDS[name], folder / name, share, random.Random(f"{options.seed} {name}"))
        rows.append(f"{name:15} {done:5} kills {ends:4} ends equal to the twin, {time.monotonic() - began:5.0f} s")
        wrong += problems
    print("\n".join(rows))
    print("\n".join(wrong) or "nothing differs")
    if not options.keep and not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
