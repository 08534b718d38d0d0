"""Two starts of one command: the second says who holds the directory; a dead one's lock is taken over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mimkd_ray import run_lock, storage
from mimkd_ray.errors import UserError
from mimkd_ray.run_lock import check_free, held


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.05)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")
    return storage.join(root, "run")


def change(run_dir: str, **fields: object) -> None:
    url = storage.join(run_dir, "lock.json")
    storage.write_bytes(url, json.dumps(json.loads(storage.read_bytes(url)) | fields).encode())


def test_the_second_start_says_who_holds_it(place: str, quick: None) -> None:
    with held(place):
        for _ in range(2):
            with pytest.raises(UserError, match=rf"run is in use by process {os.getpid()} on .*, started 20"):
                check_free(place)
        with pytest.raises(UserError, match="in use by process"), held(place):
            pass
    assert not storage.exists(storage.join(place, "lock.json"))
    check_free(place)
    with held(place):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from mimkd_ray.run_lock import held\n"
        "with held(sys.argv[1]): print('held', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {owner.pid} "):
        check_free(str(tmp_path))
    owner.kill()
    owner.wait()
    assert (tmp_path / "lock.json").exists()
    with held(str(tmp_path)):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_a_later_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    with held(str(tmp_path)):
        change(str(tmp_path), process=f"{run_lock.namespace()} 1")
        check_free(str(tmp_path))


def test_another_machines_lock_is_watched(tmp_path: Path, quick: None) -> None:
    place = str(tmp_path)
    with held(place):
        change(place, host="elsewhere")  # still beating, from this process
        url = storage.join(place, "lock.json")
        there = json.loads(storage.read_bytes(url))
        beating = threading.Timer(0.1, lambda: change(place, host="elsewhere", beats=there["beats"] + 100))
        beating.start()
        with pytest.raises(UserError, match="on elsewhere"):
            check_free(place)
        beating.join()
    dead = {"owner": "x", "host": "elsewhere", "pid": 1, "process": "", "beats": 3, "started": "then"}
    storage.write_bytes(url, json.dumps(dead).encode())
    check_free(place)
    assert not storage.exists(url)


@pytest.mark.parametrize("pid", ["", "7x", None, 9**99])
def test_a_damaged_lock_is_nobodys(pid: object, tmp_path: Path, quick: None) -> None:
    left = {"owner": "x", "host": socket.gethostname(), "pid": pid, "process": run_lock.namespace()}
    (tmp_path / "lock.json").write_text(json.dumps(left) if pid != "" else "{")
    with held(str(tmp_path)):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_who_takes_over_a_lock_ends_with_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """Another one takes over a dead one's lock at the same moment, and dies."""
    file = tmp_path / "lock.json"
    dead = {"owner": "x", "host": socket.gethostname(), "pid": 2**22 + 1, "process": run_lock.namespace()}
    file.write_text(json.dumps(dead))
    settle = iter([lambda: file.write_text(json.dumps(dead | {"owner": "y"}))])
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: next(settle, lambda: None)())
    with held(str(tmp_path)):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()


def test_of_several_at_once_one_gets_it(place: str) -> None:
    got, refused = [], []
    begin, done = threading.Barrier(6), threading.Barrier(6)

    def start() -> None:
        begin.wait()
        try:
            with held(place):
                got.append(1)
                done.wait(30)
        except UserError:
            refused.append(1)
            done.wait(30)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)
