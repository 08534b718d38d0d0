from __future__ import annotations

import io
import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import encode, pixels
from PIL import Image

from mimkd_ray.data.views import (
    PIPELINES,
    CentreCrop,
    DamagedImageError,
    View,
    decode,
    hash32,
    make_pipeline,
)
from mimkd_ray.errors import UserError


def _picture(height: int = 40, width: int = 50) -> torch.Tensor:
    return decode(pixels(3, height, width))


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("shape", [(40, 50), (24, 24), (9, 70)])
def test_results_have_the_size(name: str, shape: tuple[int, int]) -> None:
    pair = make_pipeline(name, 24)
    image = _picture(*shape)
    for result in (View(pair.train, 0).apply(image, 5, 1), pair.eval(image)):
        assert result.shape == (3, 24, 24)
        assert result.dtype == torch.uint8


def _replay(names: list[str], queue: Any) -> None:
    torch.manual_seed(999)
    results = []
    for name in names:
        view = View(make_pipeline(name, 24).train, 7)
        results += [view.apply(_picture(), id, v).contiguous().numpy().tobytes() for id in (3, 4) for v in (0, 1)]
    queue.put(results)


def test_same_view_in_another_process() -> None:
    context = multiprocessing.get_context("spawn")
    theirs: Any = context.Queue()
    child = context.Process(target=_replay, args=(list(PIPELINES), theirs))
    child.start()
    expected = theirs.get(timeout=120)
    child.join()

    class Box:
        def put(self, results: list[bytes]) -> None:
            self.results = results

    box = Box()
    _replay(list(PIPELINES), box)
    assert box.results == expected


@pytest.mark.parametrize("name", ["imagenet", "imagenet_ta", "cifar"])
def test_views_differ_by_seed_id_and_number(name: str) -> None:
    transform = make_pipeline(name, 24).train
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    views = [View(transform, seed).apply(_picture(), id, view).numpy().tobytes() for seed, id, view in keys]
    assert len(set(views)) == 4


def test_the_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    view = View(make_pipeline("cifar", 24).train, 7)
    first = torch.rand(2)
    view.apply(_picture(), 1, 2)
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)

    def fail(image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken transform")

    torch.manual_seed(5)
    with pytest.raises(RuntimeError):
        View(fail, 7).apply(_picture(), 1, 2)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("name", "padding", "flip"), [("cifar", 4, True), ("digits", 1, False)])
def test_crop_and_flip_are_torchvisions(name: str, padding: int, flip: bool) -> None:
    from torchvision.transforms import v2

    steps = [v2.RandomCrop(24, padding=padding)] + ([v2.RandomHorizontalFlip()] if flip else [])
    theirs, ours = View(v2.Compose(steps), 3), View(make_pipeline(name, 24).train, 3)
    image = _picture(24, 24)
    for id in range(60):
        assert torch.equal(theirs.apply(image, id, 0), ours.apply(image, id, 0))


def test_evaluation_of_imagenet_is_torchvisions() -> None:
    from torchvision.transforms import v2

    theirs = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    image = _picture(300, 400)
    assert torch.equal(CentreCrop(224)(image), theirs(image))


def test_views_do_not_change_the_image() -> None:
    array = pixels(3, 24, 24)
    kept = array.copy()
    image = decode(array)
    for name in PIPELINES:
        result = View(make_pipeline(name, 24).train, 0).apply(image, 0, 0).clone()
        result.zero_()
    np.testing.assert_array_equal(array, kept)


def test_pipelines_pickle() -> None:
    for name in PIPELINES:
        view = View(make_pipeline(name, 24).train, 1)
        again = pickle.loads(pickle.dumps(view))  # noqa: S301
        assert torch.equal(again.apply(_picture(), 1, 1), view.apply(_picture(), 1, 1))


def test_hash() -> None:
    values = {hash32(seed, id, view) for seed in range(10) for id in range(100) for view in range(10)}
    assert len(values) > 9990
    assert all(0 <= value < 2**32 for value in values)
    assert hash32(-1, 0, 0) != hash32(1, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_decoding(kind: str) -> None:
    array = pixels(1)
    options: dict[str, object] = {
        "PNG": {},
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 98, "subsampling": 0},
    }[kind]
    image = decode(encode(array, kind, **options))
    assert image.shape == (3, 12, 16)
    assert image.dtype == torch.uint8
    worst = np.abs(image.permute(1, 2, 0).numpy().astype(int) - array).max()
    assert worst <= (12 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "P"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "RGBA"), ("PNG", "1"), ("JPEG", "CMYK")],
)
def test_other_colour_modes_become_rgb(kind: str, mode: str) -> None:
    array = np.repeat(pixels(1)[:, :, :1], 3, axis=2) if mode in ("L", "LA") else pixels(1)
    image = decode(encode(array, kind, mode)).permute(1, 2, 0).numpy().astype(int)
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


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_truncated_images_are_damaged(kind: str) -> None:
    data = encode(pixels(1, 64, 64), kind)
    for cut in (0, 3, len(data) // 2):
        with pytest.raises(DamagedImageError):
            decode(data[:cut])


def test_other_formats_are_damaged() -> None:
    with pytest.raises(DamagedImageError):
        decode(encode(pixels(1), "BMP"))
    with pytest.raises(DamagedImageError):
        decode(b"<html>not found</html>")


def test_unknown_pipeline() -> None:
    with pytest.raises(UserError, match=r"'imagnet' is unknown; did you mean 'imagenet'"):
        make_pipeline("imagnet", 24)
