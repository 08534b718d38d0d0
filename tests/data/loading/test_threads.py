"""Threads of a training process."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading import threads
from mimkd_ray.data.loading.threads import told, told_by_ray, use_threads


@pytest.mark.parametrize(
    ("cores", "workers", "data", "expected", "loaders"),
    [
        (2, 1, DataConfig(root="digits"), 1, 0),
        (2, 1, DataConfig(root="images", image_size=32), 2, 1),
        (8, 1, DataConfig(root="images", image_size=32), 8, 7),
        (8, 1, DataConfig(root="images", image_size=32, loader_workers=2), 8, 2),
        (8, 4, DataConfig(root="digits", image_size=32), 2, 0),
        (8, 4, DataConfig(root="images", image_size=32, loader_workers=0), 2, 0),
        (1, 2, DataConfig(root="images", image_size=32), 1, 1),
    ],
)
def test_threads_are_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, data: DataConfig, expected: int, loaders: int
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(workers))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    use_threads(data, given=True)
    assert set_to == []
    use_threads(data, given=False)
    assert set_to == [expected]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # Ray gave this worker one CPU
    use_threads(data, given=False)
    assert set_to == [expected, 1]
    words = f"{expected} thread{'s' * (expected > 1)} and {loaders} loader process{'es' * (loaders != 1)}"
    each = " each" if workers > 1 else ""
    assert told(data) == f"{words}{each}, {cores} core{'s' * (cores > 1)} usable"
    assert told_by_ray(data, max(1, cores // workers)).startswith(f"{expected} thread{'s' * (expected > 1)} ")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert told(data).startswith("OMP_NUM_THREADS 3 and ")
    assert told_by_ray(data, 4).startswith("OMP_NUM_THREADS 3 ")
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_what_a_worker_of_ray_uses_before_its_cluster_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    images = DataConfig(root="x", image_size=224)
    assert told_by_ray(images, 0) == "a thread per CPU each, loader processes by the cores of its node"
    assert told_by_ray(replace(images, loader_workers=3), 4) == "4 threads and 3 loader processes each"
    assert told_by_ray(replace(images, loader_workers=3), 4, 1) == "4 threads and 3 loader processes"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray has it in a submitted job, and not in its workers
    for cpus, words in ((0, "a thread per CPU"), (2, "2 threads")):
        assert told_by_ray(images, cpus, 1, joined=True) == f"{words}, loader processes by the cores of its node"
