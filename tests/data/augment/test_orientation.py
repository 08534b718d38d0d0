"""Orientation tags, against Pillow's own way with them."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import pixels, write_parquet
from PIL import Image, ImageOps

from mimkd_ray.config import DataConfig
from mimkd_ray.data.augment import decode as module
from mimkd_ray.data.augment.decode import Decoding, decode, jpeg_size
from mimkd_ray.data.augment.orientation import orientation_of_jpeg
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.augment.transforms import ResizedCropFlip
from mimkd_ray.data.augment.views import View
from mimkd_ray.data.loading.loader import eval_batches, train_batches
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.data_set import open_data

AS_STORED = Decoding(exif=False)


def tagged(kind: str, orientation: int, height: int = 24, width: int = 40, **options: object) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(pixels(orientation, height, width)).save(out, kind, exif=tags.tobytes(), **options)
    return out.getvalue()


def upright(data: bytes, turn: bool = True) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        return np.asarray((ImageOps.exif_transpose(opened) if turn else opened).convert("RGB"))


@pytest.mark.parametrize("by_simplejpeg", [True, False])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_turned_as_pillow_turns_them(
    kind: str, orientation: int, by_simplejpeg: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_simplejpeg:
        monkeypatch.setattr(module, "_read_header", lambda data: None)
    data = tagged(kind, orientation)
    np.testing.assert_array_equal(decode(data).permute(1, 2, 0).numpy(), upright(data))
    if kind == "JPEG":
        assert orientation_of_jpeg(memoryview(data)) == orientation
        assert jpeg_size(data) == ((40, 24) if orientation >= 5 else (24, 40))
        assert jpeg_size(data, AS_STORED) == (24, 40)
        half = decode(data, 2)
        assert half.shape == ((3, 20, 12) if orientation >= 5 else (3, 12, 20))
    if kind != "TIFF":  # which Pillow turns by itself
        np.testing.assert_array_equal(decode(data, how=AS_STORED).permute(1, 2, 0).numpy(), upright(data, turn=False))


def test_the_crop_of_a_view_is_of_the_upright_image() -> None:
    view = View(ResizedCropFlip(28), 3)  # larger than half a crop: nothing is decoded at a smaller scale
    data = tagged("JPEG", 6, 30, 50)
    assert torch.equal(view.apply(data, 5, 1), view.apply(decode(data), 5, 1))
    stored = view.apply(data, 5, 1, how=AS_STORED)
    assert torch.equal(stored, view.apply(decode(data, how=AS_STORED), 5, 1))
    assert not torch.equal(stored, view.apply(data, 5, 1))


def _jpeg_with(segment: bytes) -> bytes:
    plain = tagged("JPEG", 1)
    start = 4 + (plain[4 - 2] << 8 | plain[4 - 1]) - 2  # behind the first segment
    return plain[:2] + segment + plain[start:]


def _exif(tiff: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff


ENTRY = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)


@pytest.mark.parametrize(
    ("segment", "orientation"),
    [
        (_exif(b"MM\0*" + struct.pack(">IH", 8, 1) + ENTRY), 6),
        (b"\xff\xfe" + struct.pack(">H", 7) + b"hello" + _exif(b"MM\0*" + struct.pack(">IH", 8, 1) + ENTRY), 6),
        (b"\xff" + _exif(b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 4, 1, 3)), 3),
        (_exif(b"MM\0*" + struct.pack(">IH", 8, 1) + ENTRY.replace(b"\x00\x06", b"\x00\x09")), 1),
        (_exif(b"MM\0*" + struct.pack(">IH", 8, 60000) + ENTRY[:7]), 1),
        (_exif(b"MM\0*" + struct.pack(">I", 2**31)), 1),
        (_exif(b"XX"), 1),
        (b"\xff\xe1\0\0", 1),
        (b"\xff\xe1\xff", 1),
        (b"", 1),
    ],
)
def test_tags_that_are_odd_or_broken(segment: bytes, orientation: int) -> None:
    assert orientation_of_jpeg(_jpeg_with(segment)) == orientation


def test_bytes_at_random_are_upright() -> None:
    random = np.random.default_rng(0)
    data = bytearray(tagged("JPEG", 6)[:80])
    for _ in range(2000):
        changed = bytearray(data)
        for place in random.integers(2, len(data), 3):
            changed[place] = int(random.integers(256))
        assert 1 <= orientation_of_jpeg(bytes(changed)) <= 8


@pytest.mark.parametrize("layout", ["folders", "parquet"])
@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_views_and_evaluation_of_a_data_set(tmp_path: Path, layout: str, exif: str) -> None:
    data = tagged("JPEG", 6)
    for split in ("train", "val"):
        if layout == "folders":
            for name in ("a", "b"):
                (tmp_path / split / name).mkdir(parents=True)
                (tmp_path / split / name / "x.jpg").write_bytes(data)
        else:
            write_parquet(tmp_path / f"{split}-0.parquet", [data, data], [0, 1])
    config = DataConfig(root=str(tmp_path), exif=exif, pipeline="none", image_size=20, loader_workers=0)  # type: ignore[arg-type]
    opened, pipeline = open_data(config), make_pipeline("none", 20)
    expected = pipeline.eval(decode(data, how=Decoding(exif=exif == "apply")))
    order = Order(opened.train.blocks, 1, 2, seed=0)
    span = {"lanes": [0], "start_step": 0, "stop_step": 1}
    seen = [
        *train_batches(opened.train, config, order, 0, **span),
        *eval_batches(opened.val, config, 2),
    ]
    assert sum(len(batch) for batch in seen) == 4
    for batch in seen:
        assert all(torch.equal(image, expected) for image in batch.images_BCHW)
