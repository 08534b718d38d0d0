from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import stat
import sys
import time
import uuid
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mimkd_ray import local_files, remote_filesystem, retries, storage
from mimkd_ray.errors import UserError


@pytest.fixture(params=["local", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "local": str(tmp_path),
        "file": f"file://{tmp_path}",
        "memory": f"memory://{uuid.uuid4().hex}",
    }[request.param]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits that are asked for and not taken: of this module only, for other threads of the process sleep too."""
    waits: list[float] = []
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))
    monkeypatch.setattr(retries, "ANSWERED", set())
    return waits


def test_is_remote() -> None:
    assert storage.is_remote("s3://bucket/x")
    assert not storage.is_remote("/data/x")
    assert not storage.is_remote("file:///data/x")


def test_join() -> None:
    assert storage.join("s3://b", "x/", "/y") == "s3://b/x/y"
    assert storage.join("/data/", "x") == "/data/x"
    assert storage.join("/", "x") == "/x"
    assert storage.join("runs", "", "x") == "runs/x"


def test_home_folder_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("~/a.bin", b"x")
    assert (tmp_path / "a.bin").read_bytes() == b"x"


def test_write_read_list_remove(root: str) -> None:
    folder = storage.join(root, "folder")
    assert not storage.exists(folder)
    assert storage.list_files(folder) == []
    assert storage.list_dirs(folder) == []
    for name in ("b.bin", "a.bin", "c.txt", "sub/d.bin"):
        storage.write_bytes(storage.join(folder, name), name.encode())
    assert storage.exists(folder)
    assert storage.exists(storage.join(folder, "a.bin"))
    assert storage.list_files(folder, ".bin") == [f"{folder}/a.bin", f"{folder}/b.bin"]
    assert storage.list_files(folder) == [f"{folder}/{n}" for n in ("a.bin", "b.bin", "c.txt")]
    assert storage.list_dirs(folder) == [f"{folder}/sub"]
    assert storage.list_sizes(folder, ".txt") == {f"{folder}/c.txt": 5}
    storage.write_bytes(f"{folder}/._a.bin", b"of a Mac")
    assert storage.list_files(folder, ".bin") == [f"{folder}/a.bin", f"{folder}/b.bin"]
    storage.remove_file(f"{folder}/._a.bin")
    assert storage.read_bytes(f"{folder}/sub/d.bin") == b"sub/d.bin"
    assert storage.size(f"{folder}/c.txt") == 5
    storage.write_bytes(f"{folder}/c.txt", b"replaced")  # seen at once: nothing is cached
    assert storage.read_bytes(f"{folder}/c.txt") == b"replaced"
    assert storage.size(f"{folder}/c.txt") == 8
    storage.remove_tree(folder)
    storage.remove_tree(folder)  # nothing there is fine
    assert not storage.exists(folder)


def test_a_file_is_no_folder(root: str) -> None:
    storage.write_bytes(storage.join(root, "x"), b"1")
    assert storage.list_files(storage.join(root, "x")) == []
    storage.remove_tree(storage.join(root, "x"))
    assert not storage.exists(storage.join(root, "x"))


def test_missing_file(root: str) -> None:
    for call in (storage.read_bytes, storage.size, storage.open_file):
        with pytest.raises(FileNotFoundError, match=r"nothing\.bin"):
            call(storage.join(root, "nothing.bin"))


def test_open_file_seeks(root: str) -> None:
    url = storage.join(root, "x.bin")
    data = bytes(range(200))
    storage.write_bytes(url, data)
    with storage.open_file(url) as file:
        assert file.seek(-10, os.SEEK_END) == 190
        assert file.read(4) == data[190:194]
        file.seek(2, os.SEEK_CUR)
        assert file.tell() == 196
        assert file.read() == data[196:]
        assert file.read(5) == b""
        file.seek(3)
        buffer = bytearray(5)
        assert file.readinto(buffer) == 5  # type: ignore[attr-defined]
        assert bytes(buffer) == data[3:8]


def test_upload(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"z" * 3_000_000)
    storage.upload(source, storage.join(root, "deep/er/copy.bin"))
    assert storage.size(storage.join(root, "deep/er/copy.bin")) == 3_000_000
    with pytest.raises(FileNotFoundError, match=r"to upload.*nowhere\.bin"):
        storage.upload(tmp_path / "nowhere.bin", storage.join(root, "x"))


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "x.bin")
    storage.write_bytes(url, b"old")

    def die(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_files.os, "replace", die)
    with pytest.raises(UserError, match=r"cannot write .*x\.bin: no space is left .*make room"):
        storage.write_bytes(url, b"new")
    assert storage.read_bytes(url) == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_create_once(root: str) -> None:
    url = storage.join(root, "deep/er/x.json")
    assert storage.create_once(url, b"first")
    assert not storage.create_once(url, b"second")
    assert storage.read_bytes(url) == b"first"
    assert storage.list_files(storage.join(root, "deep/er")) == [url], "no litter"


def _create(url: str, rank: int, start: Any, answers: Any) -> None:
    for number in range(25):
        start.wait()
        answers.put((number, rank, storage.create_once(f"{url}/{number}", bytes([rank]) * 1000)))


def test_of_eight_processes_that_create_one_file_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(8), context.SimpleQueue()
    racers = [context.Process(target=_create, args=(str(tmp_path), rank, start, answers)) for rank in range(8)]
    for racer in racers:
        racer.start()
    said = [answers.get() for _ in range(8 * 25)]
    for racer in racers:
        racer.join()
    winners = {number: rank for number, rank, won in said if won}
    assert sum(won for *_, won in said) == len(winners) == 25
    for number, rank in winners.items():
        assert (tmp_path / str(number)).read_bytes() == bytes([rank]) * 1000
    assert len(os.listdir(tmp_path)) == 25, "no litter"


def test_create_once_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(local_files.os, "link", refuse)
    test_create_once(str(tmp_path))


def test_create_once_whose_first_answer_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does it: the link was made, its answer was lost, and the client asks again."""
    link = os.link

    def twice(source: Any, target: Any) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(local_files.os, "link", twice)
    test_create_once(str(tmp_path))


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    storage.write_bytes(str(tmp_path / "ours"), b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("place", ["/", "~", "s3://bucket", "s3://bucket/"])
def test_remove_tree_refuses_roots(place: str) -> None:
    with pytest.raises(UserError, match="refusing to remove"):
        storage.remove_tree(place)


def test_remove_tree_refuses_what_holds_home_or_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "people" / "me", tmp_path / "work" / "here"
    (home / "runs").mkdir(parents=True)
    work.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for place in (home, home / "runs" / "..", home.parent, work, work.parent, "~/runs/..", "..", "."):
        with pytest.raises(UserError, match="refusing to remove"):
            storage.remove_tree(str(place))
    assert (home / "runs").is_dir()
    assert work.is_dir()
    storage.remove_tree("~/runs")
    assert not (home / "runs").exists()


def test_a_file_that_goes_while_its_folder_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", ".b.12-34.tmp"):
        storage.write_bytes(str(tmp_path / name), b"xyz")
    listed = list(os.scandir(tmp_path))
    (tmp_path / ".b.12-34.tmp").unlink()  # as a writer does that renames it
    monkeypatch.setattr(local_files.os, "scandir", lambda folder: contextlib.nullcontext(listed))
    assert storage.list_sizes(str(tmp_path)) == {str(tmp_path / "a"): 3, str(tmp_path / "b"): 3}


def test_two_processes_that_remove_one_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: list[float]
) -> None:
    for name in ("a", "b"):
        storage.write_bytes(str(tmp_path / "tree" / name), b"x")
    whole = shutil.rmtree
    calls = []

    def race(path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            (path / "a").unlink()
            raise FileNotFoundError(errno.ENOENT, "gone", str(path / "a"))
        whole(path)

    monkeypatch.setattr(local_files.shutil, "rmtree", race)
    storage.remove_tree(str(tmp_path / "tree"))
    assert not (tmp_path / "tree").exists()


def test_a_listed_tree_does_not_follow_links(tmp_path: Path) -> None:
    for name in ("a/b/c.bin", "a/d", "elsewhere/mine"):
        storage.write_bytes(str(tmp_path / name), b"x")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    assert storage.list_tree(str(tmp_path / "a")) == ["b/c.bin", "d", "link"]
    storage.remove_file(str(tmp_path / "a" / "link"))
    assert (tmp_path / "elsewhere" / "mine").exists()
    assert storage.list_tree(str(tmp_path / "nothing")) == []


def test_a_link_in_a_circle_is_no_entry(tmp_path: Path) -> None:
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    (tmp_path / "a.jpg").touch()
    assert storage.list_files(str(tmp_path)) == [str(tmp_path / "a.jpg")]


def test_unknown_protocol() -> None:
    with pytest.raises(UserError, match="nosuch://"):
        storage.exists("nosuch://x/y")


class _Flaky:
    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures

    def __call__(self) -> str:
        if self.failures:
            raise self.failures.pop(0)
        return "fine"


def _botocore_error() -> Exception:
    from botocore.exceptions import EndpointConnectionError

    return EndpointConnectionError(endpoint_url="http://nowhere")


def _aiohttp_error() -> Exception:
    from aiohttp import ClientPayloadError

    return ClientPayloadError("cut short")


@pytest.mark.parametrize(
    "make", [lambda: OSError(5, "EIO"), lambda: TimeoutError("slow"), _botocore_error, _aiohttp_error]
)
def test_transient_failures_are_retried(make: Any, quick: list[float]) -> None:
    assert retries.attempt("s3://b/x", "read", _Flaky([make() for _ in range(4)])) == "fine"
    assert len(quick) == 4
    assert all(later > earlier * 0.6 for earlier, later in pairwise(quick))
    with pytest.raises(storage.StorageError, match=r"could not read s3://c/x in 5 tries"):
        retries.attempt("s3://c/x", "read", _Flaky([make() for _ in range(5)]))


@pytest.mark.parametrize("error", [FileExistsError("x"), ValueError("x"), OSError(errno.ENOSYS, "no")])
def test_lasting_failures_are_not_retried(error: Exception, quick: list[float]) -> None:
    with pytest.raises(type(error)):
        retries.attempt("s3://b/x", "write", _Flaky([error]))
    assert quick == []


@pytest.mark.parametrize("number", [errno.ENOTDIR, errno.EROFS, errno.ENOENT])
def test_a_place_that_cannot_be_written_names_the_remedy(number: int, quick: list[float]) -> None:
    with pytest.raises(UserError, match=r"cannot write /a/b: .*; give a place in which folders and files can be made"):
        retries.attempt("/a/b", "write", _Flaky([OSError(number, "no")]))
    assert quick == []


def test_denied_access_names_the_remedy(quick: list[float]) -> None:
    with pytest.raises(UserError, match=r"cannot read s3://b/x: .*AWS_ACCESS_KEY_ID"):
        retries.attempt("s3://b/x", "read", _Flaky([PermissionError("Forbidden")]))
    assert quick == []


def test_a_short_read_is_retried(monkeypatch: pytest.MonkeyPatch, quick: list[float]) -> None:
    url = f"memory://{uuid.uuid4().hex}/x"
    storage.write_bytes(url, bytes(100))
    fs = remote_filesystem.filesystem(url)
    whole = fs.cat_file
    answers = [b"short"]
    monkeypatch.setattr(fs, "cat_file", lambda *a, **k: answers.pop() if answers else whole(*a, **k))
    assert storage.open_file(url).read() == bytes(100)
    assert len(quick) == 1


def test_an_object_that_is_too_short_is_not_waited_for(quick: list[float]) -> None:
    url = f"memory://{uuid.uuid4().hex}/x"
    storage.write_bytes(url, bytes(100))
    with pytest.raises(storage.StorageError, match="it has 100 bytes, and 120 are needed"):
        storage.read_range(url, 90, 30)
    assert quick == []
    assert (retries.place_of(url), True) in retries.ANSWERED  # the store is as patient a place as before


def test_a_short_read_of_a_server_that_says_no_size_is_retried(
    monkeypatch: pytest.MonkeyPatch, quick: list[float]
) -> None:
    url = f"memory://{uuid.uuid4().hex}/x"
    storage.write_bytes(url, bytes(100))
    fs = remote_filesystem.filesystem(url)
    whole, answers = fs.cat_file, [b"short"]
    monkeypatch.setattr(fs, "cat_file", lambda *a, **k: answers.pop() if answers else whole(*a, **k))
    monkeypatch.setattr(fs, "info", lambda path: {"name": path, "size": None, "type": "file"})
    assert storage.read_range(url, 0, 100) == bytes(100)
    assert len(quick) == 1


def test_a_store_whose_client_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^gs://bucket/x: cannot open 'gs://' places: Please install gcsfs"):
        storage.exists("gs://bucket/x")
