from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from image_sets import SHARED, encode, pixels
from PIL import Image

from mimkd_ray.data.augment import decode as module
from mimkd_ray.data.augment.decode import DamagedImageError, decode, jpeg_size


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every promise holds with and without simplejpeg."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(module, "simplejpeg", None)
    return request.param


def by_pillow(data: bytes, shrink: int = 1) -> np.ndarray:
    """The oracle: Pillow as its manual has it."""
    with Image.open(io.BytesIO(data)) as image:
        if shrink > 1:
            image.draft("RGB", (image.width // shrink, image.height // shrink))
        return np.asarray(image.convert("RGB"))


def photographs(count: int) -> list[bytes]:
    import pyarrow.parquet as pq

    path = SHARED / "imagenet_samples" / "train-00000-of-00001.parquet"
    if not path.exists():
        return []
    return [row["bytes"] for row in pq.read_table(path, columns=["image"])["image"].slice(0, count).to_pylist()]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


JPEGS: list[tuple[str, dict[str, object]]] = [
    ("RGB", {"quality": 60, "subsampling": 2}),
    ("RGB", {"quality": 90, "subsampling": 1}),
    ("RGB", {"quality": 98, "subsampling": 0}),
    ("RGB", {"progressive": True}),
    ("RGB", {"keep_rgb": True}),
    ("RGB", {"restart_marker_blocks": 3}),
    ("L", {}),
    ("CMYK", {}),
]


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(("mode", "options"), JPEGS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 50), (33, 17), (64, 64)])
def test_jpegs_have_pillows_pixels(mode: str, options: dict[str, object], shape: tuple[int, int]) -> None:
    data = encode(noise(*shape), "JPEG", mode, **options)
    image = decode(data)
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), by_pillow(data))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_photographs_have_pillows_pixels_at_every_scale(shrink: int) -> None:
    for data in photographs(6) or [encode(noise(101, 90), "JPEG")]:
        image = decode(data, shrink)
        height, width = jpeg_size(data) or (0, 0)
        assert image.shape == (3, -(-height // shrink), -(-width // shrink))
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), by_pillow(data, shrink))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(("mode", "options"), JPEGS)
def test_shrinking_odd_sizes(mode: str, options: dict[str, object]) -> None:
    for height, width in ((16, 16), (17, 31), (63, 65)):
        data = encode(noise(height, width), "JPEG", mode, **options)
        for shrink in (2, 4, 8) if jpeg_size(data) else ():
            assert decode(data, shrink).shape == (3, -(-height // shrink), -(-width // shrink))


@pytest.mark.usefixtures("decoder")
def test_sizes_are_read_from_the_header() -> None:
    assert jpeg_size(encode(pixels(1), "JPEG")) == (12, 16)
    assert jpeg_size(encode(pixels(1), "JPEG", "L")) == (12, 16)
    for other in (encode(pixels(1), "JPEG", "CMYK"), encode(pixels(1)), b"", b"\xff\xd8\xff", b"text"):
        assert jpeg_size(other) is None


def test_headers_that_simplejpeg_cannot_tell_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of unusual subsampling: the size, and with it the view, must be the same on every machine."""
    simplejpeg = pytest.importorskip("simplejpeg")
    data = encode(noise(33, 17), "JPEG")
    expected = by_pillow(data, 2)

    def cannot_tell(data: bytes) -> None:
        raise ValueError("Could not determine subsampling level of JPEG image")

    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", cannot_tell)
    assert jpeg_size(data) == (33, 17)
    np.testing.assert_array_equal(decode(data, 2).permute(1, 2, 0).numpy(), expected)


@pytest.mark.usefixtures("decoder")
def test_faults_that_pillow_overlooks_are_overlooked() -> None:
    """Damage in the entropy-coded data: some of it Pillow reads, and so do we, to the same pixels."""
    clean = encode(noise(64, 64), "JPEG", quality=80)
    random = np.random.default_rng(0)
    read = 0
    for _ in range(60):
        damaged = bytearray(clean)
        for place in random.integers(700, len(clean) - 2, 2):
            damaged[place] ^= int(random.integers(1, 256))
        data = bytes(damaged)
        try:
            expected = by_pillow(data)
        except (OSError, SyntaxError):
            with pytest.raises(DamagedImageError):
                decode(data)
        else:
            read += 1
            np.testing.assert_array_equal(decode(data).permute(1, 2, 0).numpy(), expected)
    assert read > 10


@pytest.mark.usefixtures("decoder")
def test_huge_images_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1700)
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    assert jpeg_size(encode(noise(40, 40), "JPEG")) is None
    with pytest.raises(DamagedImageError, match="DecompressionBomb"):
        decode(encode(noise(64, 64), "JPEG"))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_formats(kind: str) -> None:
    image = decode(encode(pixels(1), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels(1))


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    array = np.repeat(pixels(1)[:, :, :1], 3, axis=2) if mode in ("L", "LA") else pixels(1)
    image = decode(encode(array, "PNG", mode)).permute(1, 2, 0).numpy().astype(int)
    assert image.shape == (12, 16, 3)
    if mode != "1":
        assert np.abs(image - array).mean() < 20


def test_sixteen_bit_grey_and_palette_with_transparency() -> None:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0x8012, dtype=np.uint16)).save(out, "PNG")
    assert decode(out.getvalue()).unique().tolist() == [0x80]
    palette = Image.fromarray(pixels(1)).convert("P")
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=bytes(range(256)))
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode(out.getvalue()).permute(1, 2, 0).numpy(), expected)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_truncated_images_are_damaged(kind: str) -> None:
    data = encode(pixels(1, 64, 64), kind)
    for cut in (0, 3, len(data) // 2):
        with pytest.raises(DamagedImageError):
            decode(data[:cut])


@pytest.mark.usefixtures("decoder")
def test_other_formats_are_damaged() -> None:
    with pytest.raises(DamagedImageError):
        decode(encode(pixels(1), "BMP"))
    with pytest.raises(DamagedImageError):
        decode(b"<html>not found</html>")


def test_arrays_are_copied() -> None:
    array = pixels(3)
    kept = array.copy()
    decode(array).zero_()
    np.testing.assert_array_equal(array, kept)


def test_the_same_damage_has_the_same_name() -> None:
    """An image that is damaged in every epoch is told of once."""
    texts = set()
    for _ in range(2):
        with pytest.raises(DamagedImageError) as caught:
            decode(b"junk that is no image")
        texts.add(str(caught.value))
    assert texts == {"no JPEG, PNG or WebP"}
