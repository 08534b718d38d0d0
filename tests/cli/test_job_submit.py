"""Jobs as `ray job submit` runs them, on a head of their own that asks for a token: status, lines, stop, resumption."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jobs_here import CHANCE, JOB, ROOT, SMALL, TAKES_LONG, read_lines, result, run, weights

sys.path.insert(0, str(ROOT / "benchmarks"))

from head_here import Head, ray_head

from mimkd_ray.doctor.storage_checks import check_links

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

# 500 steps, which take some ten seconds, and no checkpoint but the one that a stop writes.
LONG = ("--train.epochs", "100", "--train.eval-every", "50", "--run.checkpoint-every", "0", "--launch.workers", "1")
LONG = ("imagenet.py", "demo", *SMALL, *LONG, "--launch.cpus-per-worker", "1", "--launch.gpu", "off")

CREDENTIALS = (
    *(
        ".env",
        ".env.local",
        "prod.env",
        "storage.env",
        "cluster/storage.env",
        ".netrc",
        ".aws/credentials",
        ".ssh/known",
    ),
    *("id_rsa", "id_rsa.pub", "keys/id_ed25519", "node.pem", "deep/er/.aws/config", "mimkd_ray/.env", "tls.key"),
    *(".config/gcloud/application_default_credentials.json", "my-service-account-1.json", ".kube/config", ".pypirc"),
)
WANTED = ("jobs/x.py", "mimkd_ray/environment.py", "mine/keys.py", "mine/env/net.py", "config.json")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    if " " in sys.executable:
        pytest.skip(f"Ray starts workers with environment variables through a shell, which breaks at {sys.executable}")
    with ray_head("--num-cpus", "2", OMP_NUM_THREADS="1", RAY_JOB_STOP_WAIT_TIME_S="60") as made:
        yield made


def ray_job(command: list[str], environment: Mapping[str, str], status: int = 0) -> str:
    """Run ``ray job ...`` to its end; what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environment))
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(head: Head, name: str, job: str, *arguments: str, status: int = 0) -> str:
    """Submit a job of jobs/ and wait for its end; what it printed."""
    return ray_job(head.submit(name, "python", f"jobs/{job}", *arguments), head.environment, status)


def wait_until(condition: Callable[[], Any], head: Head, name: str, seconds: float = 200) -> None:
    """Until the condition holds; the job must not have ended till then."""
    deadline = time.monotonic() + seconds
    while not condition():
        known = head.job(name)
        assert known["status"] in ("PENDING", "RUNNING"), known
        assert time.monotonic() < deadline, known
        time.sleep(0.2)


@TAKES_LONG
def test_a_stopped_job_submitted_again_ends_as_a_plain_process_does(head: Head, tmp_path: Path) -> None:
    run_dir = tmp_path / "submitted" / "small"
    arguments = [*LONG, "--run.root", str(tmp_path / "submitted")]
    first = head.submit("first", "python", f"jobs/{arguments[0]}", *arguments[1:], options=["--no-wait"])
    ray_job(first, head.environment)
    wait_until(lambda: len(read_lines(run_dir / "metrics.jsonl")) >= 5, head, "first")
    ray_job(head.command("stop", "first"), head.environment)
    assert head.job("first")["status"] == "STOPPED"  # of a stopped job Ray keeps no driver_exit_code
    said = head.ask("/api/jobs/first/logs")["logs"]
    # What is said with status 3.
    saying = r"asked to stop: saved at step (\d+) of 500 in \S+; the same command goes on from there"
    stopped_at = int(re.findall(saying, said)[0])
    assert 5 <= stopped_at < 500
    checkpoints = [path.parent.name for path in (run_dir / "checkpoints").glob("*/committed.json")]
    assert [name.split("-")[0] for name in checkpoints] == [f"step_{stopped_at:08d}"]

    printed = submit(head, "again", *arguments)
    assert (head.job("again")["status"], head.job("again")["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert f"resumed from step {stopped_at}" in printed
    lines = [line for line in printed.splitlines() if re.search("demo: .* of 500 steps", line)]
    assert lines
    plain_line = r"(\(\S+ pid=\d+\) )?demo: \d+ of 500 steps, [\d,]+ images/s, \d:\d\d:\d\d left, [^\x1b]* nats[^\x1b]*"
    for line in lines:  # no bar that is drawn anew, no colours, each line once
        assert re.fullmatch(plain_line, line)
    assert len({re.findall(r"\d+ of 500", line)[0] for line in lines}) == len(lines)
    assert re.search(r"^student cifar/resnet8_w4 +[\d.]+ ", printed, re.MULTILINE)

    plain = tmp_path / "plain"
    local = ["demo", *LONG[2:], "--launch.backend", "local", "--launch.workers", "0", "--run.root", str(plain)]
    run([sys.executable, JOB, *local])
    assert weights(run_dir) == weights(plain / "small")
    assert result(run_dir)["student"] == result(plain / "small")["student"]


@TAKES_LONG
def test_bad_input_is_status_2_and_says_what(head: Head) -> None:
    printed = submit(head, "bad", "imagenet.py", "--train.epoch", "3", status=1)  # the status of `ray job submit`
    assert "Unrecognized options: --train.epoch, 3" in printed
    assert "--train.epochs INT" in printed, "what tyro proposes"
    assert "Traceback" not in printed
    assert (head.job("bad")["status"], head.job("bad")["driver_exit_code"]) == ("FAILED", 2)


def test_nobody_submits_with_a_wrong_token_or_none(head: Head) -> None:
    before = head.jobs()
    stranger = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    wrong = {**stranger, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    entrypoint = head.submit("stranger", "python", "jobs/imagenet.py")
    assert "Invalid authentication token" in ray_job(entrypoint, wrong, status=1)
    assert "Missing authentication token" in ray_job(entrypoint, {**stranger, "RAY_AUTH_MODE": "disabled"}, status=1)
    assert head.jobs() == before


def test_what_was_submitted_runs_and_nothing_else_travels(head: Head) -> None:
    where = "import mimkd_ray; print('from', mimkd_ray.__file__)"
    printed = ray_job(head.submit("where", "python", "-c", where), head.environment)
    package = Path(re.findall(r"^from (.*)/mimkd_ray/__init__\.py$", printed, re.MULTILINE)[0])
    assert package.is_relative_to(head.folder)
    assert sorted(path.name for path in package.iterdir()) == [".rayignore", "jobs", "mimkd_ray"]
    suffixes = {path.suffix for path in package.rglob("*") if path.is_file() and path.parent != package}
    assert suffixes <= {".py", ".pyc", ".typed", ".css", ".js"}, "Python adds its .pyc files there"


def test_credentials_do_not_travel(head: Head, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What Ray packs of a folder in which people keep such files, and what arrives."""
    shutil.copy(ROOT / ".rayignore", tmp_path)
    for name in (*CREDENTIALS, *WANTED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    # Links travel as what they lead to, whatever its name: `mimkd-ray doctor` names them.
    outside = tmp_path_factory.mktemp("home") / ".aws"
    outside.mkdir()
    (outside / "credentials").write_text("x")
    (tmp_path / "notes").symlink_to(outside)
    (tmp_path / "notes.txt").symlink_to(outside / "credentials")
    assert "notes to " in check_links(str(tmp_path)).text
    wanted = (".rayignore", *WANTED, "notes.txt", "notes/credentials")
    look = "import os; print('found', sorted(os.path.join(p, n) for p, _, ns in os.walk('.') for n in ns))"
    printed = ray_job(head.submit("look", "python", "-c", look, folder=tmp_path), head.environment)
    (there,) = re.findall(r"^found (\[.*\])$", printed, re.MULTILINE)
    assert sorted(json.loads(there.replace("'", '"'))) == sorted(f"./{name}" for name in wanted)


@TAKES_LONG
def test_a_cache_and_a_search(head: Head, tmp_path: Path) -> None:
    network = ("--teacher.name", "cifar/resnet8", "--launch.cpus-per-worker", "1")
    views = (
        "--data.views",
        "1",
        "--data.subset",
        "64",
        "--cache.workers",
        "1",
        "--cache.root",
        str(tmp_path / "cache"),
    )
    cache = ("custom", *network, *views, "--loss.feature-pairs", "stage3:stage3")
    printed = submit(head, "cache", "cache_teacher.py", "build", *cache)
    assert head.job("cache")["driver_exit_code"] == 0
    assert re.search(r"^  64 images, 100 %", printed, re.MULTILINE)
    assert f"{tmp_path / 'cache'}: 64 images x 1 view" in printed
    assert list((tmp_path / "cache").glob("*/view-00000.manifest.json"))

    tiny = ("--data.subset", "80", "--train.lanes", "2", "--train.lane-batch", "10", "--train.eval-batch", "150")
    trials = ("--search.trials", "1", "--search.epochs", "1", "--search.holdout", "0.2", "--search.finalists", "0")
    place = ("--run.root", str(tmp_path), "--run.name", "s")
    search = ("demo", "--teacher.train", "false", *CHANCE, *network[:2], *tiny, *trials, *place)
    printed = submit(head, "search", "search.py", *search, "--train.information-rows", "50")
    assert head.job("search")["driver_exit_code"] == 0
    assert "trial 0: completed with" in printed
    assert json.loads((tmp_path / "s" / "best.json").read_text())["recipe"] == "demo"
