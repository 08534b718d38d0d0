from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from image_sets import SHARED, encode, pixels
from PIL import Image, features

from mimkd_ray.data.augment import decode as module
from mimkd_ray.data.augment.decode import DamagedImageError, Decoding, decode, jpeg_size
from mimkd_ray.data.augment.transforms import CentreCrop, ResizedCropFlip


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every promise holds for what simplejpeg reads, and for what it leaves to Pillow."""
    if request.param == "pillow":
        monkeypatch.setattr(module, "_read_header", lambda data: None)
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
    data = encode(noise(33, 17), "JPEG")
    expected = by_pillow(data, 2)

    def cannot_tell(data: bytes) -> None:
        raise ValueError("Could not determine subsampling level of JPEG image")

    monkeypatch.setattr(module.simplejpeg, "decode_jpeg_header", cannot_tell)
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


def claiming(kind: str, height: int, width: int) -> bytes:
    """A file of a few bytes whose header declares a size."""
    if kind == "JPEG":
        data = bytearray(encode(pixels(1), "JPEG"))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
        return bytes(data)
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0"), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    ("kind", "height", "width"),
    [("JPEG", 9400, 9400), ("PNG", 13_300, 13_300), ("PNG", 50_000, 50_000), ("JPEG", 60_000, 60_000)],
)
def test_a_declared_size_is_checked_before_decoding(kind: str, height: int, width: int) -> None:
    data = claiming(kind, height, width)
    assert len(data) < 1000
    tracemalloc.start()
    try:
        with pytest.raises(DamagedImageError, match=r"more (than|pixels than) data\.max_pixels 50,000,000"):
            decode(data)
        assert jpeg_size(data) is None
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "JPEG2000", "TGA"])
def test_the_limit_of_pixels_is_the_data_sets(kind: str) -> None:
    data = encode(noise(40, 50), kind)
    assert decode(data, how=Decoding(max_pixels=2000)).shape == (3, 40, 50)
    with pytest.raises(DamagedImageError, match=r"declares 50 x 40 pixels, more than data\.max_pixels 1,999"):
        decode(data, how=Decoding(max_pixels=1999))


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


@pytest.mark.parametrize(
    ("highest", "expected"), [(0xFFFF, 0xFF), (0x8012, 0x80), (4096, 16), (4095, 255), (2048, 128), (0, 0)]
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_twelve_bits_in_sixteen_are_not_black(highest: int, expected: int, kind: str) -> None:
    out = io.BytesIO()
    Image.fromarray(np.array([[0, highest]], dtype=np.uint16)).save(out, kind)
    assert decode(out.getvalue())[:, 0].tolist() == [[0, expected]] * 3


def test_pixels_of_unknown_range_are_damaged() -> None:
    for values in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 2**20, np.int32), np.full((2, 2), -1, np.int32)):
        out = io.BytesIO()
        Image.fromarray(values).save(out, "TIFF")
        with pytest.raises(DamagedImageError, match="convert it to 8 or 16 bits"):
            decode(out.getvalue())


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


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "AVIF", "PPM", "JPEG2000", "TGA"])
def test_what_pillow_reads(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = decode(encode(pixels(1), kind))
    lossy = 8 if kind in ("GIF", "AVIF") else 0
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - pixels(1)).mean() <= lossy


def test_the_first_of_several_frames() -> None:
    out = io.BytesIO()
    red, blue = (Image.new("RGB", (6, 5), colour) for colour in ("red", "blue"))
    red.save(out, "GIF", save_all=True, append_images=[blue])
    assert decode(out.getvalue())[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.usefixtures("decoder")
def test_other_formats_are_damaged() -> None:
    for kind in ("PCX", "EPS", "ICO"):
        with pytest.raises(DamagedImageError):
            decode(encode(pixels(1), kind))
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
    assert texts == {"no JPEG, PNG, WEBP, BMP, GIF, TIFF, AVIF, PPM, JPEG2000 or TGA"}


def test_a_strip_is_damaged_before_its_resize_takes_all_memory() -> None:
    for shape in ((3, 1, 60_000), (3, 60_000, 1)):
        strip = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(DamagedImageError, match="too long a strip"):
            CentreCrop(224)(strip)
        assert ResizedCropFlip(24)(strip).shape == (3, 24, 24)
    assert CentreCrop(224)(torch.zeros(3, 4, 400, dtype=torch.uint8)).shape == (3, 224, 224)
