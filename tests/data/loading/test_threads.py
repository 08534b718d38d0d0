"""Threads of a training process."""

from __future__ import annotations

import os

import pytest
import torch

from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading import threads
from mimkd_ray.data.loading.threads import told, use_threads


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
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert told(data).startswith("OMP_NUM_THREADS 3 and ")
    assert os.environ["OMP_NUM_THREADS"] == "3"
