"""What happens around Ray's start: addresses that are none, folders that are too long, a start that fails."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from mimkd_ray import console, run_lock
from mimkd_ray.cli import cache_teacher, evaluate, search, training
from mimkd_ray.cli.command_line import from_flags
from mimkd_ray.cli.prepare_data import PrepareJob, prepare_with_ray
from mimkd_ray.cli.training import run_directory
from mimkd_ray.config import CacheConfig, Config, DataConfig, LaunchConfig, PrepareConfig, RunConfig
from mimkd_ray.config.jobs.evaluate import evaluate_job
from mimkd_ray.config.jobs.search import search_job
from mimkd_ray.data.prepare.make_shards import prepare
from mimkd_ray.errors import UserError
from mimkd_ray.on_ray import driver_console
from mimkd_ray.on_ray.nodes import cluster, environment
from mimkd_ray.search.configs import TrialConfigs
from mimkd_ray.signals import handled
from mimkd_ray.user_functions import LOOK_IN, named_function


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test sets is unset afterwards."""
    for name in (
        "RAY_ADDRESS",
        "RAY_TMPDIR",
        LOOK_IN,
        environment.OWNER,
        "RAY_gcs_server_port_wait_time_s",
        *environment.EMBEDDED,
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_an_evaluation_sets_the_environment_before_ray_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it Ray listens to other machines, asks them for no token, and its workers find no functions here."""
    seen: dict[str, str] = {}

    def evaluate_on_ray(*_: object) -> dict[str, Any]:
        seen.update(os.environ)
        return {}

    workers = SimpleNamespace(evaluate_on_ray=evaluate_on_ray)
    monkeypatch.setitem(sys.modules, "mimkd_ray.on_ray.evaluate_workers", workers)
    monkeypatch.setattr(evaluate, "_tell", lambda *_: None)
    evaluate.evaluate(evaluate_job(Config(launch=LaunchConfig(backend="ray"))))
    assert environment.EMBEDDED.items() <= seen.items()
    assert seen[LOOK_IN] == os.getcwd()


def test_the_address_of_the_job_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/imagenet.py", "r34_r18", "--data.root", "a b"])
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    command = (
        r"ray job submit --address http://127\.0\.0\.1:8265 .* -- python jobs/imagenet\.py r34_r18 --data\.root 'a b'"
    )
    with pytest.raises(UserError, match=command):
        environment.prepare("")


def test_a_temporary_folder_that_is_too_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "/tmp/" + "x" * 60
    monkeypatch.setenv("TMPDIR", long)
    environment.prepare("")
    assert os.environ["RAY_TMPDIR"] == "/tmp"
    assert f"TMPDIR {long} is too long for Ray's sockets" in capsys.readouterr().out
    monkeypatch.setenv("RAY_TMPDIR", long)
    with pytest.raises(UserError, match=r"has 65 bytes.*set RAY_TMPDIR to a folder of at most 38"):
        environment.prepare("")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 33)
    environment.prepare("")
    assert len(os.environ["RAY_TMPDIR"] + "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store") <= 107


def test_nobody_listens_at_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_S", 0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(OSError, match=r".") as known:
        socket.getaddrinfo("nowhere.invalid", 6379)
    for address, why in (
        (f"127.0.0.1:{port}", "refused; waited 0.2 s"),
        ("nowhere.invalid:6379", f"({known.value}; waited"),
        ("a..b:6379", "label"),
        ("127.0.0.1:99999", "(99999 is no port: ports are 1 to 65535, and that of a head is 6379"),
    ):
        told = rf"no Ray cluster answers at {address} .*{re.escape(why)}.*--launch\.address"
        with pytest.raises(UserError, match=told):
            cluster.connect(address, "--launch.address")
    silent = r"\(it accepts connections and does not speak gRPC, .* port 6379; waited"
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(UserError, match=f"no Ray cluster answers at {address} {silent}"):
                cluster.connect(address, "--launch.address")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with pytest.raises(UserError, match=silent):
            cluster.connect(f"127.0.0.1:{web.server_port}", "--launch.address")
        web.shutdown()


def test_a_start_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first try fails, the second comes up, or does not either."""
    tries: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        tries.append(options)
        if len(tries) <= failures:
            raise RuntimeError("The current node timed out\n during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    failures = 1
    assert cluster.connect("", "--launch.address", num_cpus=1)
    assert [options["num_cpus"] for options in tries] == [1, 1]
    assert "Ray did not start (The current node timed out during startup.): trying once more" in capsys.readouterr().out
    assert os.environ["RAY_gcs_server_port_wait_time_s"] == "120"  # noqa: SIM112
    tries.clear()
    failures = 2
    with pytest.raises(UserError, match=r"did not start in two tries .*--launch\.backend local"):
        cluster.connect("", "--launch.address")


def test_sigterm_is_the_jobs_own_after_ray_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray sets a handler in Python and one in C, where Python does not see it: here one that ignores the signal."""
    came: list[int] = []

    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("Ray's"))
        ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(1))

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "end_left_behind", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with handled({signal.SIGTERM: lambda number, _: came.append(number)}):
        assert cluster.connect("", "--launch.address")
        signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGTERM]


def test_what_a_killed_run_and_a_failed_start_leave_behind_is_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Agents of Ray live on for up to a minute. Those of living runs and what is not Ray's stay."""
    environment.prepare("")
    mine = os.environ[environment.OWNER]
    driver, other = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    dead, living = (f"{each.pid} {run_lock.process(each.pid)}" for each in (driver, other))
    driver.kill()
    driver.wait()
    again = f"{os.getpid()} {mine.split(' ', 1)[1]}0"  # another process of this number
    elsewhere = f"{driver.pid} pid:[1] 7"
    agent, server = "ray::DashboardAgent", f"{Path(ray.__file__).parent}/core/src/ray/gcs/gcs_server"
    cases = [(agent, dead, "first"), (server, dead, "first"), (agent, again, "first"), (server, mine, "second")]
    cases += [(agent, living, ""), ("tensorboard", dead, ""), (agent, "", ""), (agent, elsewhere, "")]
    here = [
        subprocess.Popen([name, "60"], executable="/bin/sleep", env={environment.OWNER: owner} if owner else {})
        for name, owner, _ in cases
    ]
    tries: list[None] = []

    def init(**_: Any) -> None:
        tries.append(None)
        for process, (*_, ends) in zip(here, cases, strict=True):
            if ends == "first" or (ends and len(tries) == 2):
                assert process.wait(10) == -signal.SIGKILL
            assert (process.poll() is None) == (not ends or (ends == "second" and len(tries) == 1))
        if len(tries) == 1:
            raise RuntimeError("timed out")

    try:
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        assert cluster.connect("", "--launch.address")
    finally:
        for process in (*here, other):
            process.kill()
            process.wait()
    assert len(tries) == 2
    assert "ended 3 processes of Ray that a killed run had left behind" in capsys.readouterr().out


def test_rays_lines_go_to_a_file_where_the_job_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, bool]] = []
    source = tmp_path / "source"
    (source / "train" / "a").mkdir(parents=True)
    (source / "train" / "a" / "1.jpg").write_bytes(b"x")

    def joined(address: str, flag: str, folder: str, verbose: bool) -> None:
        asked.append((folder, verbose))
        raise UserError("so far")

    monkeypatch.setattr(driver_console, "joined", joined)
    for verbose in (False, True):
        launch = LaunchConfig(verbose=verbose)
        config = Config(cache=CacheConfig(root="/caches"), data=DataConfig(views=1), launch=launch)
        job = PrepareJob(source=str(source), target=str(tmp_path / "set"), verbose=verbose)
        for work in (
            lambda config=config: cache_teacher.make(config, only_plan=True),
            lambda config=config: cache_teacher.make(config),
            lambda config=config: search.run(search_job(config), "/runs/s", TrialConfigs(config, []), None),
            lambda job=job: prepare_with_ray(job),
        ):
            with pytest.raises(UserError, match="so far"):
                work()
    folders = ["", "/caches", "/runs/s", str(tmp_path / "set")]
    assert asked == [(folder, verbose) for verbose in (False, True) for folder in folders]


def test_verbose_is_a_flag_of_every_job() -> None:
    prepare_flags = ["--source", "x", "--target", "y"]
    for flags, verbose in ((["--verbose"], True), (["--verbose", "true"], True), (["--verbose", "false"], False)):
        job = from_flags(PrepareJob, [*flags, *prepare_flags])
        assert job is not None
        assert job.verbose is verbose
        config = from_flags(Config, [*flags, "--launch.backend", "local"])
        assert config is not None
        assert (config.launch.verbose, config.launch.backend) == (verbose, "local")


def test_rays_lines_are_in_the_file_and_ours_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    began: list[str] = []
    with console.phase("before", said=False):
        with driver_console.ray_in_file(str(tmp_path), verbose=False):
            os.write(2, b"core_worker\n")
            print("a report")
            console.line("ours")
            logging.getLogger("mimkd_ray.x").warning("a warning")
        began = (tmp_path / "ray.log").read_text().splitlines()
        with driver_console.ray_in_file(str(tmp_path), verbose=True):
            print("shown")
        with driver_console.ray_in_file("", verbose=False):
            print("nowhere")
    assert sorted(began) == ["a report", "core_worker"]
    assert capfd.readouterr() == ("ours\na warning\nshown\n", "")


def test_results_do_not_go_into_ray_s_package_folder() -> None:
    place = "/tmp/ray/session_x/runtime_resources/working_dir_files/_ray_pkg_ab/runs"
    with pytest.raises(UserError, match=r"is removed with the job.*s3://bucket/runs"):
        run_directory(Config(run=RunConfig(root=place)))
    assert run_directory(Config(run=RunConfig(root="/shared/runs", name="one"))) == "/shared/runs/one"


def test_caches_and_prepared_sets_do_not_go_there_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_ab"
    (package / "images").mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(
        UserError, match=r"cache\.root \S+/caches is a temporary folder .*--cache\.root.*s3://bucket/cache"
    ):
        training.absolute(Config(cache=CacheConfig(root="caches"), data=DataConfig(views=1)))
    assert training.absolute(Config()).cache.root == ""
    with pytest.raises(UserError, match=r"target \S+/set is a temporary folder .*pass --target"):
        prepare(PrepareConfig(source="images", target="set"), lambda units, title: iter(()))


def test_functions_in_the_folder_that_a_job_was_started_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_the_driver.py").write_text("def network(): return 7\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match="cannot import 'of_the_driver'"):
        named_function("network", "of_the_driver:network")
    monkeypatch.setenv(LOOK_IN, str(tmp_path))
    assert named_function("network", "of_the_driver:network")() == 7
