"""The all-reduce between processes, and what is said of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from ranks import start_ranks

from mimkd_ray.doctor import link
from mimkd_ray.doctor.link import LinkSpeed, check_all_reduce, join_store, measure, open_store


def _rank(rank: int, port_file: Path, folder: Path) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    if rank == 0:
        store, port = open_store("127.0.0.1")
        port_file.with_suffix(".part").write_text(str(port))
        port_file.with_suffix(".part").rename(port_file)
    else:
        while not port_file.exists():
            time.sleep(0.01)
        store = join_store("127.0.0.1", int(port_file.read_text()))
    found = measure(store, rank, 2, "gloo")
    (folder / str(rank)).write_text(found.error or str(found.seconds))


def test_two_processes_measure_the_sum(tmp_path: Path) -> None:
    start_ranks(_rank, (tmp_path / "port", tmp_path), 2)
    assert all(0 < float((tmp_path / str(rank)).read_text()) < 60 for rank in range(2))


def test_bus_bandwidth() -> None:
    # Of 64 MB over 4 ranks, each sends 2 * 3/4 * 64 = 96 MB; the slowest rank counts.
    found = check_all_reduce([LinkSpeed(seconds=0.1)] * 3 + [LinkSpeed(seconds=0.2)], "nccl", "4 nodes")
    assert found.status == "pass"
    assert found.figures == {"gb_s": pytest.approx(0.48), "ms": 200.0, "ranks": 4.0}
    slow = check_all_reduce([LinkSpeed(seconds=1.0)] * 2, "gloo", "2 nodes")
    assert slow.status == "warn"
    assert "64 MB in 1000 ms, 0.06 GB/s" in slow.text
    assert slow.remedy


def test_a_rank_that_cannot_reach_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SECONDS", 1)
    store, _ = open_store("127.0.0.1")
    alone = measure(store, 0, 2, "gloo")
    assert alone.error
    found = check_all_reduce([alone, LinkSpeed(seconds=0.1)], "gloo", "2 nodes")
    assert found.status == "fail"
    assert "1 of 2 ranks failed; rank 0: " in found.text
    assert "GLOO_SOCKET_IFNAME" in found.remedy
