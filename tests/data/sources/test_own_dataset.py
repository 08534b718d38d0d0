"""Data sets that are objects: the same batches and runs as of the same images at rest."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import encode, folder_set, pixels
from PIL import Image
from safetensors.torch import load_file
from tiny_run import tiny_config
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.cli.training import run
from mimkd_ray.config import Config, DataConfig
from mimkd_ray.data.augment.decode import decode
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.loading.loader import eval_batches, train_batches
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.sources.digits import DigitsSource
from mimkd_ray.data.sources.folders import FolderSource
from mimkd_ray.data.sources.own_dataset import OwnData, OwnSource, pixels_of
from mimkd_ray.data.sources.source import Source
from mimkd_ray.errors import Interrupted, UserError
from mimkd_ray.train.job import run_job


class Images(Dataset):
    """The rows of a source as (Pillow image, label)."""

    def __init__(self, source: Source) -> None:
        self.source, self.asked = source, 0

    def __len__(self) -> int:
        return self.source.num_rows

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        self.asked += 1
        (found,) = self.source.read([row])
        if isinstance(found.image, np.ndarray):
            return Image.fromarray(found.image), found.label
        return Image.open(io.BytesIO(found.image)), found.label


class Listed(Dataset):
    """Given rows."""

    def __init__(self, *rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]


def digits() -> dict[str, Dataset]:
    return {"train": Images(DigitsSource("train")), "validation": Images(DigitsSource("val"))}


def same(ours: Iterator[LaneBatch], theirs: Iterator[LaneBatch]) -> int:
    count = 0
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.step, mine.lane, mine.view) == (other.step, other.lane, other.view)
        for name in ("images_BCHW", "labels_B", "ids_B"):
            assert torch.equal(getattr(mine, name), getattr(other, name)), name
        count += 1
    return count


@pytest.mark.parametrize("loader_workers", [0, 1])
@pytest.mark.parametrize("kind", ["folders", "digits"])
def test_the_same_images_give_the_same_batches(kind: str, loader_workers: int, tmp_path: Path) -> None:
    if kind == "folders":
        folder_set(tmp_path, per_class=8)
        theirs: Source = FolderSource(str(tmp_path / "train"))
    else:
        theirs = DigitsSource("train")
    ours = OwnSource(Images(theirs), "training")
    assert ours.labels().tolist() == theirs.labels().tolist()
    data = DataConfig(pipeline="imagenet_ta", image_size=8, views=0, loader_workers=loader_workers)
    batches = []
    for source in (ours, theirs):
        order = Order(source.blocks, lanes=2, lane_batch=4, seed=5)
        steps = {"lanes": [0, 1], "start_step": 2, "stop_step": 7}
        batches.append(
            (
                train_batches(source, data, order, 3, **steps),
                eval_batches(source, data, 9),
            )
        )
    assert same(batches[0][0], batches[1][0]) == 10
    assert same(batches[0][1], batches[1][1]) > 1


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student.safetensors")


def _config(**sections: dict[str, Any]) -> Config:
    return tiny_config(data={"subset": 60, "pipeline": "digits", "loader_workers": 0}, **sections)


class _Stops(LocalContext):
    """A process that is asked to stop when it has looked for that some times; the first time is after a step."""

    def __init__(self, looks: int) -> None:
        super().__init__(torch.device("cpu"))
        self.left = looks

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_run_is_that_of_the_same_images_at_rest_also_after_a_stop(tmp_path: Path) -> None:
    given = digits()
    train, validation = given["train"], given["validation"]
    config = _config(run={"checkpoint_every": 1})
    at_rest = run_job(config, _Stops(1000), str(tmp_path / "rest"))
    whole = run_job(config, _Stops(1000), str(tmp_path / "own"), OwnData(train, validation))
    with pytest.raises(Interrupted, match="saved at step 1 of 6"):
        run_job(config, _Stops(0), str(tmp_path / "stopped"), OwnData(train, validation))
    resumed = run_job(config, _Stops(1000), str(tmp_path / "stopped"), OwnData(train, validation))
    assert resumed["resumed_from"] == 1
    expected = _weights(tmp_path / "rest")
    for folder, result in (("own", whole), ("stopped", resumed)):
        assert result["student"]["top1"] == at_rest["student"]["top1"]
        found = _weights(tmp_path / folder)
        assert all(torch.equal(found[name], value) for name, value in expected.items()), folder


def test_run_takes_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(run={"root": str(tmp_path), "tensorboard": False}, train={"max_steps": 2})
    given = digits()
    result = run(config, **given)
    assert "run directory" in capsys.readouterr().out
    assert result["student"]["top1"] > 0
    assert run(config, **given) == result, "a finished run is found again"
    others = Subset(given["train"], list(range(1346)))
    folder = {path.name for path in tmp_path.iterdir()}
    run(config, train=others, validation=given["validation"])
    assert len({path.name for path in tmp_path.iterdir()} - folder) == 1, "other data are another run"


def test_a_comparison_draws_its_subsets_from_the_data_set(tmp_path: Path) -> None:
    config = _config(compare={"seeds": 1, "arms": ("alone",)}, train={"epochs": 1})
    result = run_job(config, _Stops(1000), str(tmp_path), OwnData(**digits()))
    assert result["train_rows"] == 60


def test_a_run_of_other_labels_is_refused(tmp_path: Path) -> None:
    config = _config(run={"checkpoint_every": 1})
    with pytest.raises(Interrupted):
        run_job(config, _Stops(0), str(tmp_path), OwnData(**digits()))
    fewer = Subset(digits()["train"], range(1, 1347))
    with pytest.raises(UserError, match="data set's digest"):
        run_job(config, _Stops(1000), str(tmp_path), OwnData(fewer, digits()["validation"]))


def test_held_out_rows_come_from_the_training_set() -> None:
    data = open_data(DataConfig(holdout=0.25), OwnData(digits()["train"], None))
    assert data.val.num_rows == pytest.approx(1347 / 4, abs=1)
    assert not {row.id for row in data.val.read(range(9))} & {row.id for row in data.train.read(range(1000))}


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_pillow_images_are_those_of_files(mode: str) -> None:
    if mode == "I;16":
        grey = (pixels(3).astype(np.uint16) * 257)[:, :, 0]
        image, kind = Image.fromarray(grey), "PNG"
    else:
        image, kind = Image.fromarray(pixels(3)).convert(mode), "JPEG" if mode == "CMYK" else "PNG"
    file = io.BytesIO()
    image.save(file, kind)
    opened = Image.open(io.BytesIO(file.getvalue()))
    assert opened.mode == mode
    assert torch.equal(torch.from_numpy(pixels_of(opened, "row 1")).permute(2, 0, 1), decode(file.getvalue()))


def test_tensors_and_arrays() -> None:
    array = pixels(1)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = {"uint8": tensor, "float": tensor / 255, "double": tensor.double() / 255, "array": array}
    for name, image in kinds.items():
        assert np.array_equal(pixels_of(image, "row 1"), array), name
    grey = tensor[:1]
    for image in (grey, grey[0], grey[0].numpy(), grey / 255):
        assert np.array_equal(pixels_of(image, "row 1"), np.repeat(array[:, :, :1], 3, axis=2))


def test_labels_are_read_where_a_data_set_does_not_say_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    folder_set(tmp_path)
    known = ImageFolder(str(tmp_path / "train"))
    source = OwnSource(known, "training")
    assert source.labels().tolist() == known.targets
    assert source.classes == ("ant", "bee", "cat")
    part = OwnSource(Subset(known, [5, 0, 11]), "validation", source.classes)
    assert part.labels().tolist() == [1, 0, 2]
    assert [row.label for row in part.read([2, 0])] == [2, 1]
    turned = ImageFolder(str(tmp_path / "train"), target_transform=lambda label: 2 - label)
    assert OwnSource(turned, "training").labels().tolist() == [2 - label for label in known.targets]
    images = Images(DigitsSource("val"))
    OwnSource(images, "training")
    assert images.asked == 450, "once"
    tensors = TensorDataset(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 1, 2]))
    assert OwnSource(tensors, "training").labels().tolist() == [0, 1, 1, 2]


def test_the_digest_is_of_rows_classes_and_labels() -> None:
    image = pixels(0)
    source = OwnSource(Listed((image, 0), (image, 1)), "training")
    assert source.digest == OwnSource(Listed((pixels(9), 0), (pixels(8), 1)), "training").digest
    others = [
        Listed((image, 1), (image, 0)),
        Listed((image, 0), (image, 1), (image, 1)),
        Listed((image, 0), (image, 2)),
    ]
    digests = {OwnSource(other, "training").digest for other in others}
    assert len(digests | {source.digest}) == 4
    assert pickle.loads(pickle.dumps(source)).read([1])[0].label == 1  # noqa: S301


class _Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield pixels(0), 0


IMAGE = pixels(0)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (_Stream(), "_Stream.*map-style"),
        (Listed(), "no rows"),
        (Listed({"image": IMAGE, "label": 0}), r"row 0 of the training set is a dict: give \(image, label\)"),
        (Listed((IMAGE, "cat")), "label 'cat': give a class number"),
        (Listed((IMAGE, 1.0)), "label 1.0"),
    ],
)
def test_what_is_no_data_set_of_images_and_labels(train: Dataset, message: str) -> None:
    with pytest.raises(UserError, match=message):
        OwnData(train, None)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 4, 4), 2.0), "floating values from 2 to 2"),
        (torch.full((3, 4, 4), torch.nan), "floating values from nan"),
        (np.zeros((4, 4, 3)), "an image of float64"),
        (encode(IMAGE), "an image of bytes"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"shape \(4, 3, 4\)"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        OwnSource(Listed((image, 0)), "training").read([0])


def test_an_error_of_the_data_set_says_its_row() -> None:
    class Broken(Listed):
        targets = (0, 1)

        def __getitem__(self, row: int) -> Any:
            raise KeyError("gone")

    source = OwnSource(Broken(None, None), "training")
    with pytest.raises(KeyError) as caught:
        source.read([1])
    assert caught.value.__notes__ == ["row 1 of the training set"]


def test_labels_that_contradict_each_other() -> None:
    listed = Listed((IMAGE, 0), (IMAGE, 1))
    listed.targets = [0, 0]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="row 1 of the training set has the label 1, and had 0"):
        OwnSource(listed, "training").read([0, 1])


def test_classes_of_both_sets_agree() -> None:
    train, validation = Listed((IMAGE, 0), (IMAGE, 1)), Listed((IMAGE, 0))
    train.classes, validation.classes = ["a", "b"], ["b", "a"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="names the classes b, a and the training set a, b"):
        OwnData(train, validation)


def sets() -> tuple[Dataset, Dataset]:
    given = digits()
    return given["train"], given["validation"]


def only_training() -> Dataset:
    return digits()["train"]


def failing() -> Dataset:
    raise OSError("no such share")


def test_a_function_that_returns_data_sets(tmp_path: Path) -> None:
    given = digits()
    config = _config(run={"root": str(tmp_path)}, train={"max_steps": 2})
    named = replace(config, data=replace(config.data, root=f"{__name__}:sets"), launch=replace(config.launch))
    assert run(named)["student"] == run(config, **given)["student"]
    assert open_data(DataConfig(root=f"{__name__}:only_training", holdout=0.1)).val.num_rows > 0
    with pytest.raises(UserError, match=r"data\.root .*failing.*: called with , it raised OSError: no such share"):
        open_data(DataConfig(root=f"{__name__}:failing"))
    with pytest.raises(UserError, match=r"has no function 'set'; did you mean .*sets"):
        open_data(DataConfig(root=f"{__name__}:set"))
    with pytest.raises(UserError, match=r"is a function, and cache\.root is set"):
        replace(named, data=replace(named.data, views=1), cache=replace(config.cache, root=str(tmp_path / "c")))


def test_what_run_refuses(tmp_path: Path) -> None:
    given = digits()
    config = _config(run={"root": str(tmp_path)})
    with pytest.raises(UserError, match="no training set"):
        run(config, validation=given["validation"])
    with pytest.raises(UserError, match="backend is ray"):
        run(replace(config, launch=replace(config.launch, backend="ray")), **given)
    cached = replace(config, data=replace(config.data, views=1), cache=replace(config.cache, root=str(tmp_path / "c")))
    with pytest.raises(UserError, match=r"cache\.root is set"):
        run(cached, **given)
    with pytest.raises(UserError, match=r"no validation split.*found train;"):
        run(config, train=given["train"])
    with pytest.raises(UserError, match="leave out one"):
        run(replace(config, data=replace(config.data, holdout=0.1)), **given)
    with pytest.raises(UserError, match="give them again"):
        open_data(DataConfig(root="own://0123"))


def test_a_part_of_a_part_has_the_classes_of_the_whole() -> None:
    whole = Listed(*((Image.new("L", (2, 2)), label) for label in (0, 1, 2, 0, 1, 2)))
    whole.classes = ["cat", "dog", "emu"]  # type: ignore[attr-defined]
    part = Subset(Subset(whole, [0, 1, 3, 4]), [1, 2])
    assert OwnData(part, whole).train.classes == ("cat", "dog", "emu")


@pytest.mark.parametrize("pixel", [np.float32(0.5), np.int32(70_000)])
def test_pictures_of_values_without_a_range_are_refused(pixel: Any) -> None:
    source = OwnSource(Listed((Image.fromarray(np.full((2, 2), pixel)), 0)), "training")
    with pytest.raises(UserError, match=r"row 0 of the training set has .*values.* convert it to 8 or 16 bits"):
        source.read([0])
