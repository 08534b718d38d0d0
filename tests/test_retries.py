"""Stores that are silent, busy, elsewhere, or refuse expired credentials: what is waited for, and what is said."""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from failing_store import FailingStore

from mimkd_ray import remote_filesystem, retries, storage
from mimkd_ray.errors import UserError


@pytest.fixture
def store(bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingStore]:
    """A store that fails on request, between this process and the bucket; little patience."""
    made = FailingStore(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retries, "WAIT_CAP_S", 0.05)
    monkeypatch.setattr(retries, "TELL_AFTER_S", 0.1)
    monkeypatch.setenv(retries.PATIENCE, "0")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield made
    made.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The store is a socket that accepts, and neither reads nor answers."""
    monkeypatch.setattr(remote_filesystem, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(remote_filesystem, "UPLOAD_SECONDS", 0.4)
    monkeypatch.setattr(remote_filesystem, "SLOWEST_UPLOAD", 1e8)
    monkeypatch.setattr(retries, "FIRST_SECONDS", 0.25)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield


@pytest.mark.timeout(60)
def test_a_server_that_accepts_and_never_answers_is_no_place_to_wait_for_ever(silent: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    url = "s3://bucket/x"
    calls: list[Callable[[], object]] = [
        partial(storage.exists, url),
        partial(storage.list_files, url),
        partial(storage.read_bytes, url),
        partial(storage.read_range, url, 0, 10),
        partial(storage.write_bytes, url, b"x"),
        partial(storage.write_bytes, url, bytes(20_000_000)),  # more than a socket takes unread
        partial(storage.create_once, url, b"x"),
        partial(storage.upload, tmp_path / "file", url),
        partial(storage.remove_file, url),
    ]
    for call in calls:
        began = time.monotonic()
        with pytest.raises(storage.StorageError, match=r"could not .* s3://bucket/x in \d+ tr.*AWS_ENDPOINT_URL"):
            call()
        assert time.monotonic() - began < 15


def test_what_has_answered_is_waited_for(
    store: FailingStore, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.write_bytes(f"{bucket}/x", b"1")
    store.how = "busy"
    with pytest.raises(storage.StorageError, match="in 5 tries"):
        storage.read_bytes(f"{bucket}/x")
    store.how = ""
    monkeypatch.setenv(retries.PATIENCE, "0.5")
    assert storage.read_bytes(f"{bucket}/x") == b"1"
    store.how = "busy"
    threading.Timer(1.5, lambda: setattr(store, "how", "")).start()
    assert storage.read_bytes(f"{bucket}/x") == b"1"
    assert store.failed > 15
    told = capsys.readouterr().out
    assert told.count(f"cannot read {bucket}/x: trying for ") == 1
    assert "more (storage.patience_minutes)" in told
    assert "Service Unavailable" in told
    store.how = "busy"
    with storage.hurried(), pytest.raises(storage.StorageError, match="in 5 tries"):
        storage.read_bytes(f"{bucket}/x")


def test_after_one_call_waited_in_vain_others_do_not(
    store: FailingStore, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{bucket}/x", b"1")
    monkeypatch.setenv(retries.PATIENCE, "0.02")
    store.how = "busy"
    began = time.monotonic()
    with pytest.raises(storage.StorageError, match=r"in \d\d tries, 1 s"):
        storage.read_bytes(f"{bucket}/x")
    assert time.monotonic() - began >= 1.2
    monkeypatch.setenv(retries.PATIENCE, "10")
    with pytest.raises(storage.StorageError, match="in 5 tries"):
        storage.write_bytes(f"{bucket}/x", b"2")


def test_expired_credentials_are_named_at_once_and_waited_for_in_the_middle(
    store: FailingStore, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(retries.PATIENCE, "0.5")
    store.how = "expired"
    with pytest.raises(UserError, match=rf"cannot write {bucket}/x: the credentials have expired .*renew them"):
        storage.write_bytes(f"{bucket}/x", b"1")
    assert store.failed == 1
    store.how = ""
    storage.write_bytes(f"{bucket}/x", b"1")
    before = remote_filesystem.filesystem(bucket)
    store.how = "expired"
    threading.Timer(0.5, lambda: setattr(store, "how", "")).start()
    storage.write_bytes(f"{bucket}/x", b"2")
    assert storage.read_bytes(f"{bucket}/x") == b"2"
    assert store.failed > 1
    assert remote_filesystem.filesystem(bucket) is not before, "the credentials' file is read anew"


def test_another_region_is_named(store: FailingStore, bucket: str) -> None:
    store.how = "region"
    with pytest.raises(UserError, match=r"another region than us-east-1: set AWS_DEFAULT_REGION .*'eu-central-1'"):
        storage.write_bytes(f"{bucket}/x", b"1")
    assert store.failed == 1


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("region", storage.StorageError, "expired, and to a wrong AWS_DEFAULT_REGION"),
        ("moved", UserError, "another region than us-east-1: set AWS_DEFAULT_REGION"),
    ],
)
def test_bare_answers_to_a_head_request_name_the_region(
    store: FailingStore, bucket: str, monkeypatch: pytest.MonkeyPatch, how: str, kind: type[Exception], said: str
) -> None:
    """They have a status, 400 or 301, and no body that would name an error."""
    monkeypatch.setattr(retries, "TRIES", 1)
    store.how = how
    with pytest.raises(kind, match=said):
        storage.size(f"{bucket}/x")


def test_a_place_that_may_be_read_and_not_written_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ANSWERED", set())

    def refuse() -> None:
        raise PermissionError("Access Denied")

    retries.attempt("s3://b/x", "read", lambda: None)
    with pytest.raises(storage.AccessError, match="cannot write s3://b/x: Access Denied"):
        retries.attempt("s3://b/x", "write", refuse)


@pytest.mark.parametrize(
    "use",
    [storage.list_files, storage.exists, storage.read_bytes, partial(storage.write_bytes, data=b"x")],
    ids=["list", "look up", "read", "write"],
)
def test_credentials_in_an_address_of_s3_are_refused_without_telling_them(use: Callable[[str], object]) -> None:
    url = storage.absolute("s3://AKIAME:hushhush@bucket/x")
    with pytest.raises(UserError, match=r"not an address of S3.*AWS_SECRET_ACCESS_KEY") as caught:
        use(url)
    told = "".join(traceback.format_exception(caught.value))
    assert "redacted-" in told
    assert "hushhush" not in told
    assert "AKIAME" not in told


def test_a_web_server_that_takes_no_files_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retries.PATIENCE, "0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/runs"
    try:
        assert not storage.exists(url), "it answers, so that its failures would be waited for"
        began = time.monotonic()
        with pytest.raises(UserError, match=r"the server takes no files \(501.*give a folder or a bucket"):
            storage.write_bytes(f"{url}/lock.json", b"x")
        assert time.monotonic() - began < 5
    finally:
        server.shutdown()
        server.server_close()
