from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import SHARED, encode, pixels

from mimkd_ray.config.form.pipeline_name import PIPELINE_NAMES, check_pipeline_name
from mimkd_ray.data.augment.batch_views import view_key
from mimkd_ray.data.augment.decode import DamagedImageError, decode
from mimkd_ray.data.augment.pipelines import PIPELINES, make_pipeline
from mimkd_ray.data.augment.transforms import (
    SHRINKS,
    CentreCrop,
    Crop,
    FitSize,
    OnPillow,
    ResizedCropFlip,
    Then,
    resize,
)
from mimkd_ray.data.augment.views import View, hash32
from mimkd_ray.errors import UserError

MINE = "my_pipelines"  # a module that the tests write
SIZE = 24


def picture(height: int = 40, width: int = 50, seed: int = 3) -> torch.Tensor:
    return decode(pixels(seed, height, width))


def view_of(name: str, seed: int, id: int, view: int, height: int = 40, width: int = 50) -> torch.Tensor:
    """A view as training sees it: the transform of the image, then that of the batch."""
    pipeline = make_pipeline(name, SIZE)
    image = View(pipeline.train, seed).apply(picture(height, width), id, view)
    if pipeline.batch is not None:
        image = pipeline.batch(image[None], torch.tensor([id]), view_key(view, seed))[0]
    return image


def digest(image: torch.Tensor) -> str:
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's module on the path."""
    path = tmp_path / f"{MINE}.py"
    path.write_text(
        """
import random
import numpy as np
import torch
from torchvision.transforms import v2

def single(image_size):
    return v2.Compose([v2.Resize((image_size, image_size)), v2.ColorJitter(0.5, 0.5)])

def pair(image_size):
    fit = v2.Resize((image_size, image_size))
    return v2.Compose([fit, v2.RandomVerticalFlip()]), fit

class Noise:
    def __init__(self, size):
        self.fit = v2.Resize((size, size))
    def __call__(self, image):
        own = torch.randint(0, 3, (3, 1, 1)) + random.randint(0, 50) + np.random.randint(0, 50)
        return (self.fit(image).int() + own).clamp(0, 255).to(torch.uint8)

def others(image_size):
    return Noise(image_size)

def floats(image_size):
    return v2.Compose([v2.Resize((image_size, image_size)), v2.ToDtype(torch.float32, scale=True)])

def short(image_size):
    return v2.Resize((image_size, image_size - 1))

def nothing(image_size):
    return None

def pil(image_size):
    return v2.ToPILImage()

not_callable = 3
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MINE, raising=False)
    return path


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("shape", [(40, 50), (24, 24), (9, 70), (1, 1)])
def test_results_have_the_size(name: str, shape: tuple[int, int]) -> None:
    for result in (view_of(name, 0, 5, 1, *shape), make_pipeline(name, SIZE).eval(picture(*shape))):
        assert result.shape == (3, SIZE, SIZE)
        assert result.dtype == torch.uint8


class Elsewhere:
    """Another Python process that makes views on demand."""

    def __init__(self) -> None:
        code = "import test_views, sys\nfor line in sys.stdin: test_views.answer(line)"
        folder = Path(__file__).parent
        path = [str(folder), str(folder.parent), str(folder.parents[2])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def digest(self, name: str, *numbers: int) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join([name, *map(str, numbers)]) + "\n")
        return self.process.stdout.readline().strip()


def answer(line: str) -> None:
    name, *numbers = line.split()
    torch.rand(7)  # whatever else the process has drawn
    seed, id, view, height, width = map(int, numbers)
    print(digest(view_of(name, seed, id, view, height, width)), flush=True)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    other = Elsewhere()
    yield other
    assert other.process.stdin is not None
    other.process.stdin.close()
    assert other.process.wait(timeout=30) == 0


@pytest.mark.parametrize("name", PIPELINES)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    id=st.integers(0, 2**63 - 1),
    view=st.integers(0, 2**40),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
)
@settings(max_examples=15, deadline=None)
def test_same_view_in_another_process(
    elsewhere: Elsewhere, name: str, seed: int, id: int, view: int, height: int, width: int
) -> None:
    here = digest(view_of(name, seed, id, view, height, width))
    assert elsewhere.digest(name, seed, id, view, height, width) == here


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "none"])
def test_views_differ_by_seed_id_and_number(name: str) -> None:
    """Over eight samples: a single one may well be cropped twice at the same place."""

    def several(seed: int, first: int, view: int) -> tuple[str, ...]:
        return tuple(digest(view_of(name, seed, first + i, view, SIZE, SIZE)) for i in range(8))

    assert len({several(0, 0, 0), several(1, 0, 0), several(0, 8, 0), several(0, 0, 1)}) == 4


def test_the_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    view = View(make_pipeline("imagenet", SIZE).train, 7)
    first = torch.rand(2)
    view.apply(picture(), 1, 2)
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)

    def fail(image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken transform")

    torch.manual_seed(5)
    with pytest.raises(RuntimeError):
        View(fail, 7).apply(picture(), 1, 2)
    assert torch.equal(torch.rand(4), expected)


# From 16 pixels on: PyTorch's own kernel has an internal assertion that fails for some images of one or two pixels.
@given(
    height=st.integers(16, 120),
    width=st.integers(16, 120),
    size=st.integers(2, 60),
    id=st.integers(0, 10**6),
    layout=st.sampled_from(["HWC", "CHW"]),
)
@settings(max_examples=200, deadline=None)
def test_random_resized_crops_are_torchvisions(height: int, width: int, size: int, id: int, layout: str) -> None:
    from torchvision.transforms import v2

    theirs = View(v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]), 3)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
    if layout == "CHW":
        image = image.contiguous()
    ours = View(ResizedCropFlip(size), 3).apply(image, id, 0)
    assert torch.equal(ours, theirs.apply(image, id, 0))


def test_crops_are_those_of_earlier_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded when a NumPy generator gave the same numbers. Caches and checkpoints rely on them."""
    crops: list[Crop] = []

    def record(self: ResizedCropFlip, image: torch.Tensor, crop: Crop, out: torch.Tensor | None = None) -> torch.Tensor:
        crops.append(crop)
        return image

    monkeypatch.setattr(ResizedCropFlip, "_take", record)
    random = np.random.default_rng(0)
    for height, width in random.integers(1, 600, (3000, 2)).tolist():
        image = torch.empty((3, height, width), dtype=torch.uint8)
        seed, id, view = random.integers(0, [2**63, 2**40, 1000]).tolist()
        View(ResizedCropFlip(8), seed).apply(image, id, view)
    assert crops[0] == (60, 58, 388, 298, False)
    assert hashlib.sha256(repr([tuple(crop) for crop in crops]).encode()).hexdigest()[:16] == "ba1e239f056cc765"


@pytest.mark.parametrize("shape", [(3, 400), (400, 3), (1, 1), (1, 64), (2, 2), (500, 375), (256, 340)])
def test_extreme_random_resized_crops_are_torchvisions(shape: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    theirs = View(v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]), 1)
    image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8).permute(2, 0, 1)
    for id in range(12):
        assert torch.equal(View(ResizedCropFlip(224), 1).apply(image, id, 0), theirs.apply(image, id, 0))


@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_evaluation_is_torchvisions(height: int, width: int, size: int) -> None:
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
    theirs = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])
    assert torch.equal(CentreCrop(size)(image), theirs(image))
    assert torch.equal(resize(image, size, size + 1), functional.resize(image, [size, size + 1]))


@pytest.mark.parametrize("first", [ResizedCropFlip(64), FitSize(64)])
def test_augmentations_are_torchvisions(first: Any) -> None:
    """TrivialAugmentWide is one operation: exactly torchvision's of a Pillow image, nearly its own of the tensor."""
    from torchvision.transforms import v2

    augment = v2.TrivialAugmentWide()
    ours = View(Then(first, OnPillow(augment)), 2)
    of_pillow = View(lambda image: v2.functional.pil_to_tensor(augment(v2.functional.to_pil_image(first(image)))), 2)
    of_tensor = View(lambda image: augment(first(image)), 2)
    for id in range(80):
        image = picture(90, 80, seed=id)
        result = ours.apply(image, id, 0)
        assert torch.equal(result, of_pillow.apply(image, id, 0))
        levels = (result.int() - of_tensor.apply(image, id, 0).int()).abs()
        assert (levels > 1).float().mean() < 0.02


def test_views_of_bytes_are_views_of_their_pixels() -> None:
    """Also without a transform that decodes for itself; images too small to be decoded at a smaller scale."""
    for name in ("imagenet", "imagenet_ta", "none"):
        view = View(make_pipeline(name, SIZE).train, 3)
        for kind in ("JPEG", "PNG"):
            data = encode(pixels(1, 44, 47), kind)
            for id in range(5):
                assert torch.equal(view.apply(data, id, 0), view.apply(decode(data), id, 0))
        array = pixels(2)
        assert torch.equal(view.apply(array, 1, 0), view.apply(decode(array), 1, 0))
        with pytest.raises(DamagedImageError):
            view.apply(b"\xff\xd8 no image", 0, 0)


def whole(crop: Crop, shrink: int) -> Crop:
    """The part of the full image that a crop of the smaller one shows."""
    return Crop(*(shrink * number for number in crop[:4]), crop.flip)


def test_large_crops_are_decoded_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The crop is drawn on the whole image and taken from the smallest scale that still has its pixels."""
    from mimkd_ray.data.augment import transforms

    used = []

    def spy(data: bytes, shrink: int = 1, how: object = None) -> torch.Tensor:
        used.append(shrink)
        return decode(data, shrink)

    monkeypatch.setattr(transforms, "decode", spy)
    data = encode(pixels(5, 300, 401), "JPEG", quality=95)
    transform = ResizedCropFlip(SIZE)
    for id in range(40):
        torch.manual_seed(id)
        crop = transform.draw(300, 401)
        fits = [s for s in SHRINKS if crop.height >= s * SIZE and crop.width >= s * SIZE]
        torch.manual_seed(id)
        ours = transform.from_bytes(data)
        assert used[-1] == (max(fits) if fits else 1)
        moved = transform._take(decode(data), whole(crop.shrunk(used[-1]), used[-1]))
        assert (ours.int() - moved.int()).abs().float().mean() < 1.5
    assert set(used) >= {2, 4, 8}


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_view_made_in_place_is_the_same(channels_last: bool) -> None:
    """Mirrored or not, resized or not, and whatever lay there before."""
    view, written = View(ResizedCropFlip(SIZE), 3), 0
    batch = torch.full((30, SIZE, SIZE, 3), 77, dtype=torch.uint8).permute(0, 3, 1, 2)
    if not channels_last:
        batch = batch.contiguous()
    for kind in ("JPEG", "PNG"):
        data = encode(pixels(4, 40, 60), kind)
        for id, out in enumerate(batch):
            made = view.replay(data, id, 0, out)
            written += made is out
            assert torch.equal(made, view.apply(data, id, 0))
    assert 20 < written <= 30  # of the 30 JPEGs, those whose crop has not that size already


def test_stated_error_of_decoding_small() -> None:
    """The figures of ResizedCropFlip.from_bytes: against full decoding of the same, rounded crop."""
    import pyarrow.parquet as pq

    path = SHARED / "imagenet_samples" / "train-00000-of-00001.parquet"
    if not path.exists():
        pytest.skip("the photographs are not here")
    errors = []
    transform = ResizedCropFlip(112)
    for row in pq.read_table(path, columns=["image"])["image"].slice(0, 40).to_pylist():
        full, half = decode(row["bytes"]), decode(row["bytes"], 2)
        torch.manual_seed(1)
        crop = transform.draw(*full.shape[1:])
        if min(crop.height, crop.width) < 224:
            continue
        small = crop.shrunk(2)
        errors.append((transform._take(full, whole(small, 2)).int() - transform._take(half, small).int()).abs())
    assert len(errors) >= 5
    assert torch.stack(errors).float().mean() < 2
    assert torch.stack(errors).max() <= 60


def test_views_do_not_change_the_image() -> None:
    array = pixels(3, SIZE, SIZE)
    kept = array.copy()
    image = decode(array)
    for name in PIPELINES:
        result = View(make_pipeline(name, SIZE).train, 0).apply(image, 0, 0).clone()
        result.zero_()
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), kept)


def test_pipelines_pickle() -> None:
    for name in PIPELINES:
        view = View(make_pipeline(name, SIZE).train, 1)
        again = pickle.loads(pickle.dumps(view))  # noqa: S301
        assert torch.equal(again.apply(picture(), 1, 1), view.apply(picture(), 1, 1))


def test_hash() -> None:
    values = {hash32(seed, id, view) for seed in range(10) for id in range(100) for view in range(10)}
    assert len(values) > 9990
    assert all(0 <= value < 2**32 for value in values)
    assert hash32(-1, 0, 0) != hash32(1, 0, 0)


@pytest.mark.usefixtures("mine")
def test_pipelines_by_import_path() -> None:
    from torchvision.transforms import v2

    single = make_pipeline(f"{MINE}:single", SIZE)
    theirs = v2.Compose([v2.Resize((SIZE, SIZE)), v2.ColorJitter(0.5, 0.5)])
    assert torch.equal(View(single.train, 1).apply(picture(), 2, 3), View(theirs, 1).apply(picture(), 2, 3))
    assert torch.equal(single.eval(picture()), CentreCrop(SIZE)(picture()))
    assert single.batch is None
    pair = make_pipeline(f"{MINE}:pair", SIZE)
    assert torch.equal(pair.eval(picture()), resize(picture(), SIZE, SIZE))
    results = {digest(View(pair.train, 0).apply(picture(), id, 0)) for id in range(20)}
    assert len(results) == 2
    assert torch.equal(pickle.loads(pickle.dumps(pair.eval))(picture()), pair.eval(picture()))  # noqa: S301


@pytest.mark.usefixtures("mine")
def test_other_generators_are_replayed_and_put_back() -> None:
    import random

    view = View(make_pipeline(f"{MINE}:others", SIZE).train, 4)
    expected = [digest(view.apply(picture(), id, 0)) for id in range(6)]
    assert len(set(expected)) > 3
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    before: Any = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert [digest(view.apply(picture(), id, 0)) for id in range(6)] == expected
    assert (random.random(), np.random.rand()) == before  # noqa: NPY002


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagnet", r"'imagnet' is unknown; did you mean 'imagenet'"),
        ("no_such_module:f", r"cannot import 'no_such_module'.*PYTHONPATH"),
        (":f", r"cannot import ''"),
        (f"{MINE}:singl", r"no function 'singl'; did you mean 'single'"),
        (f"{MINE}:not_callable", r"no function 'not_callable'"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_unknown_pipelines(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_pipeline(name, SIZE)
    with pytest.raises(UserError, match=message):
        check_pipeline_name(name)


@pytest.mark.usefixtures("mine")
def test_names_are_checked_without_building() -> None:
    assert tuple(PIPELINES) == PIPELINE_NAMES
    for name in (*PIPELINES, f"{MINE}:nothing"):
        check_pipeline_name(name)
    with pytest.raises(UserError, match=r"^pipeline 'x' is unknown"):
        check_pipeline_name("x")
    with pytest.raises(UserError, match=r"returned \(NoneType, CentreCrop\); it must return a transform"):
        make_pipeline(f"{MINE}:nothing", SIZE)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("floats", r"gave torch.float32 \(3, 24, 24\).*must give torch.uint8 \(3, 24, 24\).*normalisation"),
        ("short", r"gave torch.uint8 \(3, 24, 23\) for an image of \(3, 40, 50\)"),
        ("pil", r"gave Image; it must give a uint8 tensor"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_results_that_make_no_batch(function: str, message: str) -> None:
    view = View(make_pipeline(f"{MINE}:{function}", SIZE).train, 0)
    with pytest.raises(UserError, match=message):
        view.apply(picture(), 0, 0)
