"""Digests and fingerprints of pixels, and what a difference of a level or of an image does to them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from mimkd_ray.teacher_cache.pixel_digests import ALLOWED_LEVELS, DIGEST_BYTES, ROW_BYTES, compare, pixel_rows


def images(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (5, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", [8, 32, 56])
def test_a_row_is_digest_and_cell_means(size: int) -> None:
    rows = pixel_rows(images(size))
    assert rows.shape == (5, ROW_BYTES)
    assert rows.dtype == np.uint8
    cell = size // 8
    for image, row in zip(images(size).numpy(), rows, strict=True):
        assert row[:DIGEST_BYTES].tobytes() == hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        means = image.astype(np.float64).reshape(3, 8, cell, 8, cell).mean((0, 2, 4))
        assert np.abs(row[DIGEST_BYTES:].reshape(8, 8) - means).max() <= 0.51


def test_layout_in_memory_does_not_matter() -> None:
    last = images(32).contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(pixel_rows(last), pixel_rows(images(32)))


def test_one_level_is_small_and_another_image_is_not() -> None:
    plain = images(32)
    rows = pixel_rows(plain)
    assert compare(rows, rows) == (0, 0, 0)
    nudged = plain.clone()
    nudged[2] = torch.where(nudged[2] < 255, nudged[2] + 1, nudged[2])
    differing, levels, _ = compare(rows, pixel_rows(nudged))
    assert differing == 1
    assert 0 < levels <= ALLOWED_LEVELS
    other = plain.clone()
    other[3] = plain[3].flip(2)
    seen = compare(rows, pixel_rows(other))
    assert (seen.differing, seen.worst) == (1, 3)
    assert seen.levels > ALLOWED_LEVELS
