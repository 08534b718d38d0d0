"""Object storage, the block store's disk, decoding: on good places and on broken ones."""

from __future__ import annotations

import multiprocessing.sharedctypes  # noqa: F401 - the user of `read_only` may not read where Python lies
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimkd_ray import retries, storage
from mimkd_ray.data.augment.decode import jpeg_size
from mimkd_ray.doctor.storage_checks import (
    OBJECT_BYTES,
    check_decode,
    check_disk,
    check_links,
    check_storage,
    leave_mark,
    photograph,
)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this user cannot write to; as root, to whom all is allowed, it is another user's for a while."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(before)
        folder.rmdir()


def test_links_that_lead_out_of_the_working_directory(tmp_path: Path) -> None:
    here, home = tmp_path / "here", tmp_path / "home" / ".aws"
    for folder in (here / "mine" / "deep", here / ".venv" / "bin", home):
        folder.mkdir(parents=True)
    (here / ".rayignore").write_text("# not these\n.venv/\n/known\n")
    (here / "known").symlink_to(home)
    (here / ".venv" / "bin" / "python").symlink_to(home)
    (here / "inside").symlink_to(here / "mine")
    (here / "broken").symlink_to(here.parent / "nothing")
    assert check_links(str(here)).status == "pass"
    (here / "mine" / "deep" / "settings").symlink_to(home)
    (home / "credentials").write_text("x")
    (here / "notes.txt").symlink_to(home / "credentials")
    found = check_links(str(here))
    assert found.status == "warn"
    assert (
        f"2 links in {here} to elsewhere: notes.txt to {home}/credentials, mine/deep/settings to {home}" in found.text
    )


def test_a_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimkd_ray.doctor.storage_checks.SLOW_STORAGE_MB_S", 0.0)  # it may be busy
    folder = f"{bucket}/here/doctor-1"
    assert leave_mark(folder) == ""
    found = check_storage("n", f"{bucket}/here", folder)
    assert found.status == "pass", found.line()
    assert found.figures["write_mb_s"] > 0
    assert found.figures["latency_ms"] > 0
    assert f"read {found.figures['read_mb_s']:.0f} MB/s" in found.text
    assert [Path(file).name for file in storage.list_files(folder)] == ["mark"]


def test_slow_storage_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = storage.read_bytes
    moment = iter([0.0, 1.0, 0.0, 4.0, *[0.0] * 10])
    monkeypatch.setattr("time.perf_counter", lambda: next(moment))
    assert leave_mark(str(tmp_path)) == ""
    found = check_storage("n", str(tmp_path), str(tmp_path))
    assert found.status == "warn"
    assert found.figures["read_mb_s"] == pytest.approx(OBJECT_BYTES / 4e6)
    assert found.remedy
    assert storage.read_bytes is read


def test_a_place_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "TRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:pass@127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-mine")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    error = leave_mark("s3://bucket/doctor-1")
    assert "could not write s3://bucket/doctor-1/mark" in error
    assert "pass@" not in error
    found = check_storage("n", "s3://bucket", "s3://bucket/doctor-1")
    assert found.status == "fail"
    assert "secret-of-mine" not in found.line()


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    assert leave_mark(f"{bucket}-other/x")


def test_a_folder_that_nodes_do_not_share(tmp_path: Path) -> None:
    found = check_storage("n", str(tmp_path), str(tmp_path / "doctor-1"))
    assert found.status == "fail"
    assert "does not show here what another node wrote" in found.text


def test_a_store_that_returns_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert leave_mark(str(tmp_path)) == ""
    monkeypatch.setattr(storage, "read_bytes", lambda url: b"x" * OBJECT_BYTES)
    found = check_storage("n", str(tmp_path), str(tmp_path))
    assert (found.status, "other bytes came back" in found.text) == ("fail", True)
    assert [file.name for file in tmp_path.iterdir()] == ["mark"], "what was written is removed all the same"


def test_a_read_only_folder(read_only: Path) -> None:
    error = leave_mark(str(read_only))
    assert error.startswith(f"cannot write {read_only}/mark")
    found = check_disk("n", str(read_only / "store"), 8)
    assert found.status == "fail"
    assert "cannot be made" in found.text
    assert "--data.store" in found.remedy


def test_disk(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good = check_disk("n", str(store), 1e-3)
    assert good.status == "pass", good.line()
    assert f"{os.statvfs(store).f_bavail * os.statvfs(store).f_frsize / 1e9:.0f}" == f"{good.figures['free_gb']:.0f}"
    full = check_disk("n", str(store), 10**6)
    assert full.status == "fail"
    assert "the store may take 1e+06 GB" in full.text
    assert "--store-gb" in full.remedy
    assert check_disk("n", "", 0).text == "no block store is wanted"
    (tmp_path / "file").touch()
    assert check_disk("n", str(tmp_path / "file"), 1).status == "fail"


def test_what_the_store_holds_already_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_disk("n", str(tmp_path), 1e-3).status == "pass"
    (tmp_path / "x.block").write_bytes(bytes(3_000_000))
    disk = os.statvfs(tmp_path)
    full = os.statvfs_result([*disk[:4], 0, *disk[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert check_disk("n", str(tmp_path), 0.002).status == "pass"
    assert check_disk("n", str(tmp_path), 0.004).status == "fail"


def test_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jpeg_size(photograph()) == (375, 500)
    assert 50_000 < len(photograph()) < 80_000
    found = check_decode("n", 4)
    assert found.figures["images_s"] > 0
    assert f"at most {found.figures['images_s'] * 4:.0f}" in found.text
    monkeypatch.setattr("mimkd_ray.doctor.storage_checks.SLOW_DECODE", 10**9)
    slow = check_decode("n", 4)
    assert (slow.status, bool(slow.remedy)) == ("warn", True)
