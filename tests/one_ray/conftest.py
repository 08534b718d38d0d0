"""One Ray for all tests of this folder: to start one takes more time than most of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from jobs_here import ROOT

from mimkd_ray.errors import UserError


@pytest.fixture(scope="package")
def cluster() -> Iterator[str]:
    """Address of a Ray of this process with two CPUs: jobs join it and leave it running."""
    if " " in sys.executable:
        pytest.skip(f"Ray starts workers with environment variables through a shell, which breaks at {sys.executable}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, value)
        # Workers know the spaces of tiny_search and the examples too.
        patch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / folder) for folder in ("tests", "examples", "")))
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray

        from mimkd_ray.on_ray.nodes.cluster import connect

        for last in (False, True):  # Ray gives its processes 30 s, and machines that test are busy
            try:
                connect("", "--launch.address", num_cpus=2, _node_ip_address="127.0.0.1")
                break
            except UserError:
                if last:
                    raise
        yield ray.get_runtime_context().gcs_address
        assert ray.is_initialized(), "a job must not end a Ray that it did not start"
        ray.shutdown()


@pytest.fixture
def joined(cluster: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of this Ray, to which jobs of this process are connected already."""
    for module in ("nodes.doctor_on_nodes", "driver_console"):  # that have the name already
        monkeypatch.setattr(f"mimkd_ray.on_ray.{module}.connect", lambda *_, **__: False)
    return cluster
