"""From `ray job submit` to the first step on a warm local cluster: our job against a bare TorchTrainer's.

One head with two CPUs takes jobs in turns, in alternating order, and figures are medians of the rounds and of their
ratios. Ours is jobs/imagenet.py on digits with a teacher, a student and MIMKD's terms, on two workers;
`job_start_bare.py` has a teacher, a student and Hinton's KD. Each uploads its own folder: the first round, which only
warms up, for the first time. A round takes about a minute on two cores.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from head_here import ROOT, Head, ray_head
from ray_overhead import CASE, seconds_by_stage
from report import finish, parser, table

BARE = "job_start_bare.py"
LAUNCH = ("--launch.workers", "2", "--launch.cpus-per-worker", "1", "--launch.max-failures", "0")

STAGES = {
    "accepted": "submission",
    "process": "supervisor of the job",
    "parsed": "process, imports, command line",
    "checked": "checks before the start",
    "connected": "joining the cluster (ours: with Ray's import)",
    "worker": "controller, workers, process group",
    "data": "opening the data",
    "teacher": "teacher, and its check",
    "cache": "cache, where there is one",
    "built": "networks",
    "first_batch": "first batch",
    "first_step": "first step",
}


def submitted(head: Head, name: str, folder: Path, work: Path, *command: str) -> float:
    """Run a job in a copy of ``folder`` to its end, with its process's start in work/process; return the time of
    submission."""
    noted = f"date +%s.%N > {shlex.quote(str(work / 'process'))} && exec {shlex.join(command)}"
    began = time.time()
    done = subprocess.run(
        head.submit(name, "sh", "-c", noted, folder=folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=dict(head.environment),
    )
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return began


def start(head: Head, arm: str, number: int, bare: Path) -> dict[str, float]:
    """Submit a job of one arm; return the seconds to its first step, by stage."""
    name = f"{arm}-{number}"
    with tempfile.TemporaryDirectory(prefix="job-start-") as made:
        work = Path(made)
        if arm == "ours":
            where = ("--run.root", str(work), "--train.max-steps", "2")
            began = submitted(head, name, ROOT, work, "python", "jobs/imagenet.py", *CASE, *LAUNCH, *where)
            marks = json.loads((work / "run" / "result.json").read_text())["timeline"]
        else:
            began = submitted(head, name, bare, work, "python", BARE, str(work))
            marks = json.loads((work / "marks.json").read_text())
        early = {"accepted": head.job(name)["start_time"] / 1000, "process": float((work / "process").read_text())}
    return seconds_by_stage(began, early | marks)


def main() -> int:
    options = parser(__doc__)
    options.set_defaults(threads=1)
    options.add_argument("--rounds", type=int, default=5, help="rounds that count")
    args = options.parse_args()
    seen: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
    with (
        ray_head("--num-cpus", "2", OMP_NUM_THREADS=str(args.threads)) as head,
        tempfile.TemporaryDirectory(prefix="job-start-") as made,
    ):
        bare = Path(made)
        shutil.copy(Path(__file__).resolve().parent / BARE, bare)
        for number in range(1 + args.rounds):
            for arm in seen if number % 2 == 0 else list(seen)[::-1]:
                seen[arm].append(start(head, arm, number, bare))
            both = ", ".join(f"{arm} {values[-1]['all']:.1f} s" for arm, values in seen.items())
            print(f"round {number}: {both}", flush=True)
    counted = {arm: values[1:] for arm, values in seen.items()}
    middle = {
        arm: {stage: statistics.median(v[stage] for v in values) for stage in values[0]}
        for arm, values in counted.items()
    }
    rows: list[list[object]] = [
        [text, *(f"{middle[arm][stage]:.2f}" if stage in middle[arm] else "" for arm in seen)]
        for stage, text in {**STAGES, "all": "submission to first step"}.items()
    ]
    print(table(["seconds", *seen], rows), flush=True)
    ratios = [a["all"] / b["all"] for a, b in zip(counted["ours"], counted["bare"], strict=True)]
    figures = {
        **{f"{arm}_{stage}_seconds": value for arm, stages in middle.items() for stage, value in stages.items()},
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "start_over_bare": statistics.median(ratios),
    }
    return finish("job_start", figures, {"start_over_bare": ("<=", 1.25)}, args.json)


if __name__ == "__main__":
    sys.exit(main())
