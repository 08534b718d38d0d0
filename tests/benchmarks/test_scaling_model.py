"""The scaling model against sums done by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from scaling_model import Cluster, predict

KNOWN = Cluster(step_ms=200, lane_batch=64, gradient_mb=50, link_gbit=10, storage_gbit=8, overlap=0.0, hop_us=0.0)


def test_one_node_has_no_reduction_and_all_of_its_compute() -> None:
    found = predict(KNOWN, 1)
    assert found.step_ms == 200
    assert found.images_per_second == pytest.approx(320)
    assert found.epoch_hours == pytest.approx(1_281_167 / 320 / 3600)
    assert found.epoch_cost == pytest.approx(found.epoch_hours * 1.2)


def test_a_ring_sends_almost_twice_the_gradients() -> None:
    # 8 nodes: 2 * 7/8 * 50 MB = 87.5 MB over 1.25 GB/s
    assert predict(KNOWN, 8).reduction_ms == pytest.approx(70.0)
    assert predict(KNOWN, 8).step_ms == pytest.approx(270.0)
    # 14 hops of 100 us
    assert predict(replace(KNOWN, hop_us=100.0), 8).reduction_ms == pytest.approx(71.4)


def test_what_hides_is_bounded_by_the_backward_pass() -> None:
    assert predict(replace(KNOWN, overlap=0.8), 8).reduction_ms == pytest.approx(14.0)
    slow = replace(KNOWN, overlap=1.0, link_gbit=1.0)  # 700 ms, of which 133 hide
    assert predict(slow, 8).reduction_ms == pytest.approx(700 - 400 / 3)


def test_gpus_of_a_node_share_its_links() -> None:
    # 64 GPUs in 8 nodes: the reduction of 8 nodes, and eight lanes through one node's storage link
    found = predict(replace(KNOWN, gpus_per_node=8), 64)
    assert found.reduction_ms == pytest.approx(70.0)
    assert found.input_first_ms == pytest.approx(1e3 * 8 * 64 * 110e3 / 1e9)


def test_storage_that_all_share_bends_the_first_epoch_alone() -> None:
    found = predict(replace(KNOWN, storage_total_gbit=8.0, gradient_mb=0.0), 512)
    # 1 GB/s for 512 nodes: 64 * 110 kB each takes 3.6 s
    assert found.step_first_ms == pytest.approx(1e3 * 64 * 110e3 / (1e9 / 512))
    assert found.step_ms == 200


def test_losses_cost_half_an_interval_and_the_restart() -> None:
    calm, lossy = predict(KNOWN, 8), predict(replace(KNOWN, losses=0.05), 8)
    # 0.4 losses an hour, 330 s each
    assert lossy.epoch_hours == pytest.approx(calm.epoch_hours / (1 - 0.4 * 330 / 3600))
    assert predict(replace(KNOWN, losses=1.0), 512).epoch_hours == float("inf")
