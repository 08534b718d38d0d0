from __future__ import annotations

import pickle

import numpy as np

from mimkd_ray.data.sources.digits import DigitsSource


def test_splits() -> None:
    train, val = DigitsSource("train"), DigitsSource("val")
    assert (train.num_rows, val.num_rows) == (1347, 450)
    assert train.blocks.num_rows == 1347
    assert np.bincount(val.labels()).tolist() == [45] * 10
    assert train.classes == tuple("0123456789")
    assert train.digest != val.digest
    assert pickle.loads(pickle.dumps(train)).digest == train.digest  # noqa: S301


def test_same_images_as_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images = load_digits().images
    ours = [row.image for split in ("train", "val") for s in [DigitsSource(split)] for row in s.read(range(s.num_rows))]
    expected = sorted(np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in images)
    assert sorted(np.ascontiguousarray(image[:, :, 0]).tobytes() for image in ours) == expected  # type: ignore[index]
    row = DigitsSource("val").read([7])[0]
    assert isinstance(row.image, np.ndarray)
    assert row.image.shape == (8, 8, 3)
    assert row.image.dtype == np.uint8
    assert row.name == "digits val row 7"
