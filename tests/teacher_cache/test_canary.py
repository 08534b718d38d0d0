"""The batches that are compared again, and the limits of drift."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from mimkd_ray.errors import DamagedDataError
from mimkd_ray.teacher_cache.canary import PixelWatch, check_features, chosen, drift
from mimkd_ray.teacher_cache.feature_manifest import Error
from mimkd_ray.teacher_cache.pixel_digests import pixel_rows

KNOWN = {"a:map": Error(1.0, 10_000.0, 0.02)}  # loses 0.01, its worst row 0.02
IDS = torch.arange(50, 58)


def test_a_keyed_share_of_each_epoch() -> None:
    picks = [chosen(3, epoch, 1000, 0.01) for epoch in range(20)]
    assert all(len(pick) == 10 and pick <= set(range(1000)) for pick in picks)
    assert len(set.union(*picks)) > 150, "others in every epoch"
    assert chosen(3, 5, 1000, 0.01) == picks[5]
    assert chosen(4, 5, 1000, 0.01) != picks[5]
    assert len(chosen(0, 0, 7, 0.001)) == 1, "at least one"
    assert chosen(0, 0, 7, 0.0) == set()
    assert len(chosen(0, 0, 7, 1.0)) == 7


def test_drift_is_a_relative_error() -> None:
    live = torch.randn(8, 5, 2, 2)
    cached = live.clone()
    cached[3] += 0.5
    seen = drift(cached, live)
    assert seen.row == 3
    assert seen.relative == pytest.approx(float((cached - live).norm() / live.norm()), rel=1e-6)
    assert seen.worst == pytest.approx(float((cached - live)[3].norm() / (live.norm() / 8**0.5)), rel=1e-6)
    assert drift(torch.zeros(2, 3), torch.zeros(2, 3)).relative == 0


def test_the_codecs_own_error_and_the_tolerance_are_allowed() -> None:
    live = {"a:map": torch.randn(8, 100, generator=torch.Generator().manual_seed(0))}
    noise = torch.randn(8, 100, generator=torch.Generator().manual_seed(1))
    found = check_features({"a:map": live["a:map"] + 0.03 * noise}, live, KNOWN, IDS, 0.02, "step 1")
    assert found["a:map"] == pytest.approx(0.03, rel=0.1)
    with pytest.raises(DamagedDataError, match=r"step 1: cached features of a:map differ .* by 0\.05\d* \(its codec"):
        check_features({"a:map": live["a:map"] + 0.055 * noise}, live, KNOWN, IDS, 0.02, "step 1")


def test_one_wrong_row_is_enough() -> None:
    """In a large batch a single row hardly moves the mean."""
    live = torch.randn(1000, 100)
    cached = live.clone()
    cached[777] = live[3]
    assert drift(cached, live).relative < 0.06
    with pytest.raises(DamagedDataError, match=r"those of image 777 by 1\.\d+ \(0\.24 is allowed\)"):
        check_features({"a:map": cached}, {"a:map": live}, KNOWN, torch.arange(1000), 0.02, "step 1")


def test_what_is_not_a_number_is_drift() -> None:
    live = torch.randn(8, 4)
    with pytest.raises(DamagedDataError):
        check_features({"a:map": live * float("nan")}, {"a:map": live}, KNOWN, IDS, 0.02, "step 1")


def test_pixels_warn_once_and_stop_when_they_are_others(caplog: pytest.LogCaptureFixture) -> None:
    images = torch.randint(10, 200, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows, ids, watch = pixel_rows(images), np.arange(4) + 50, PixelWatch()
    with caplog.at_level(logging.WARNING):
        assert watch.check(rows, rows, ids, "step 1") == 0
        assert not caplog.records
        for step in (2, 3):
            assert watch.check(rows, pixel_rows(images + 1), ids, f"step {step}") == 4
    (record,) = caplog.records
    assert "step 2: the pixels of 4 of 4 images differ from those that were cached, by 1 grey levels" in record.message
    darker = images.clone()
    darker[2, :, :8, :8] -= 5
    with pytest.raises(DamagedDataError, match=r"step 4: image 52 has other pixels .* differ by 5 grey levels, 2 are"):
        watch.check(rows, pixel_rows(darker), ids, "step 4")
