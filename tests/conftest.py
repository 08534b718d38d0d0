"""An S3 server in this process, for all tests, or the store at MIMKD_TEST_S3; how pytest-xdist deals them to its
processes. It puts this folder on the path, for the helpers in it."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores

hypothesis.settings.register_profile("shared cores", deadline=None)  # an example may wait for other processes
hypothesis.settings.load_profile("shared cores")


@functools.cache
def starts_ray(file: Path) -> bool:
    """Return whether a file of tests starts a Ray: it marks those tests so."""
    return "mark.ray" in file.read_text()


class Dealer(LoadScopeScheduling):
    """Deals whole files, as their fixtures are dear. Those that start a Ray go to one process: two Rays would starve
    each other."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if starts_ray(self.config.rootpath / file) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Dealer:
    """Called by pytest-xdist."""
    return Dealer(config, log)


OF_A_RAY = {"cluster", "joined", "head", "raylet", "on_ray", "under_ray"}
"""Names of the fixtures that start a Ray or join one."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test on a Ray that has no mark, before its fixtures: it would start a second Ray in another process."""
    uses = OF_A_RAY.intersection(getattr(item, "fixturenames", ()))
    if (uses or item.path.parent.name == "one_ray") and item.get_closest_marker("ray") is None:
        pytest.fail(f"{item.nodeid} runs on a Ray: mark it, or its file, with pytest.mark.ray", pytrace=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist the files that start a Ray begin first, because they take longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not starts_ray(item.path))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    if own := os.environ.get("MIMKD_TEST_S3"):
        yield own
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new, empty bucket; the environment points at the server. MIMKD_TEST_S3 takes the environment's keys."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    if "MIMKD_TEST_S3" not in os.environ:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"
