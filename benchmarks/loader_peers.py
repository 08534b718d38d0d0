"""The loaders with which ours is compared, each set up as its own documentation describes.

A peer writes the rows in its own format and gives an iterable of batches of them. All get torchvision v2's
RandomResizedCrop and RandomHorizontalFlip to uint8 tensors; a Pillow image becomes a tensor first, on which that is
faster (1.2 ms against 1.8 ms a photograph, with decoding). `same` gives a peer our decoder and transform instead: it
then loads encoded bytes.
"""

from __future__ import annotations

import importlib.util
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from image_set import SIZE, Encoded, write_parquet
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from mimkd_ray.data.augment.transforms import ResizedCropFlip, from_bytes

SHARDS = 16  # tar files: more than loader processes
CHUNK = 2**24  # bytes of a file of MDS and LitData: several for each loader process


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The parameters of an arm: its files, images of a batch, loader processes, and the decoder."""

    folder: Path
    batch: int
    workers: int
    same: bool


@dataclass(frozen=True)
class Peer:
    """The functions that write and read a peer's files."""

    package: str
    write: Callable[[Sequence[Encoded], Path], None]
    batches: Callable[[Setting], Iterable[Any]]

    @property
    def installed(self) -> bool:
        """Return whether the peer's package is installed."""
        return importlib.util.find_spec(self.package) is not None


OURS = ResizedCropFlip(SIZE)
CROP_FLIP = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
TO_TENSOR = v2.PILToTensor()


def of_pillow(image: Image.Image) -> Tensor:
    """Return a training view of a Pillow image."""
    return CROP_FLIP(TO_TENSOR(image.convert("RGB")))


def of_bytes(image: bytes) -> Tensor:
    """Return a training view by our decoder and transform."""
    return from_bytes(OURS, image)


def one_thread(worker: int) -> None:
    """Limit torch to one thread, as its own data loader does; for loaders that start processes in another way."""
    torch.set_num_threads(1)


def as_it_is(value: Any) -> Any:
    """Return a label unchanged."""
    return value


# torchvision: class folders


def write_folders(rows: Sequence[Encoded], folder: Path) -> None:
    for number, row in enumerate(rows):
        file = folder / f"{row.label:05d}" / f"{number:07d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row.image)


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def image_folder(setting: Setting) -> Iterable[Any]:
    if setting.same:
        data = ImageFolder(str(setting.folder), transform=of_bytes, loader=read_file)
    else:
        data = ImageFolder(str(setting.folder), transform=of_pillow)
    return DataLoader(data, batch_size=setting.batch, shuffle=True, num_workers=setting.workers, drop_last=True)


# mosaicml-streaming: MDS files


def write_mds(rows: Sequence[Encoded], folder: Path) -> None:
    from streaming import MDSWriter

    # A column of kind "jpeg" takes Pillow images, and keeps the file of one that was opened from a file.
    file = folder / "one.jpg"
    for kind in ("jpeg", "bytes"):
        place = str(folder / kind)
        with MDSWriter(out=place, columns={"image": kind, "label": "int"}, size_limit=CHUNK) as out:
            for row in rows:
                if kind == "jpeg" and row.image.startswith(b"\xff\xd8"):
                    file.write_bytes(row.image)
                    out.write({"image": Image.open(file), "label": row.label})
                elif kind == "jpeg":
                    out.write({"image": Image.open(io.BytesIO(row.image)).convert("RGB"), "label": row.label})
                else:
                    out.write({"image": row.image, "label": row.label})


def mds(setting: Setting) -> Iterable[Any]:
    from streaming import StreamingDataset

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            item = super().__getitem__(at)
            return (of_bytes if setting.same else of_pillow)(item["image"]), item["label"]

    place = setting.folder / ("bytes" if setting.same else "jpeg")
    data = Images(local=str(place), shuffle=True, batch_size=setting.batch)
    return DataLoader(data, batch_size=setting.batch, num_workers=setting.workers, drop_last=True)


# webdataset: tar files


def write_tars(rows: Sequence[Encoded], folder: Path) -> None:
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for number in range(shard, len(rows), SHARDS):
                for suffix, data in (("jpg", rows[number].image), ("cls", str(rows[number].label).encode())):
                    entry = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def tars(setting: Setting) -> Iterable[Any]:
    import webdataset as wds

    files = str(setting.folder / f"train-{{0000..{SHARDS - 1:04d}}}.tar")
    data = wds.WebDataset(files, shardshuffle=100).shuffle(1000)
    if setting.same:
        data = data.to_tuple("jpg", "cls").map_tuple(of_bytes, int)
    else:
        data = data.decode("pil").to_tuple("jpg", "cls").map_tuple(of_pillow, as_it_is)
    return wds.WebLoader(data.batched(setting.batch, partial=False), batch_size=None, num_workers=setting.workers)


# Hugging Face datasets: Parquet, kept as Arrow files in its cache


def write_arrow(rows: Sequence[Encoded], folder: Path) -> None:
    write_parquet(rows, folder / "train.parquet")
    open_arrow(folder)


def open_arrow(folder: Path) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # no requests to a hub
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    return load_dataset(
        "parquet", data_files=str(folder / "train.parquet"), split="train", cache_dir=str(folder / "cache")
    )


def hugging_face_view(examples: dict[str, list[Any]], same: bool) -> dict[str, list[Any]]:
    if same:
        images = [of_bytes(image["bytes"]) for image in examples["image"]]
    else:
        images = [of_pillow(image) for image in examples["image"]]
    return {"image": images, "label": examples["label"]}


def hugging_face(setting: Setting) -> Iterable[Any]:
    from datasets import Image as ImageColumn

    data = open_arrow(setting.folder)
    if setting.same:
        data = data.cast_column("image", ImageColumn(decode=False))
    data.set_transform(partial(hugging_face_view, same=setting.same))
    return DataLoader(data, batch_size=setting.batch, shuffle=True, num_workers=setting.workers, drop_last=True)


# LitData: chunks


def litdata_row(row: Encoded) -> dict[str, Any]:
    from litdata import Jpeg

    return {"image": Jpeg(bytes=row.image), "label": row.label}


def litdata_bytes(row: Encoded) -> dict[str, Any]:
    return {"image": row.image, "label": row.label}


def write_litdata(rows: Sequence[Encoded], folder: Path) -> None:
    from litdata import optimize

    for kind, make in (("jpeg", litdata_row), ("bytes", litdata_bytes)):
        optimize(
            fn=make,
            inputs=list(rows),
            output_dir=str(folder / kind),
            chunk_bytes=CHUNK,
            num_workers=1,
            start_method="fork",
            verbose=False,
        )


def litdata_view(item: dict[str, Any], same: bool) -> tuple[Tensor, int]:
    return (of_bytes if same else CROP_FLIP)(item["image"]), item["label"]


def litdata(setting: Setting) -> Iterable[Any]:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(
        str(setting.folder / ("bytes" if setting.same else "jpeg")),
        shuffle=True,
        drop_last=True,
        transform=partial(litdata_view, same=setting.same),
    )
    return StreamingDataLoader(data, batch_size=setting.batch, num_workers=setting.workers)


PEERS = {
    "ImageFolder": Peer("torchvision", write_folders, image_folder),
    "mosaicml-streaming": Peer("streaming", write_mds, mds),
    "webdataset": Peer("webdataset", write_tars, tars),
    "Hugging Face datasets": Peer("datasets", write_arrow, hugging_face),
    "litdata": Peer("litdata", write_litdata, litdata),
}


def count(batch: Any) -> int:
    """Return the number of images in a batch of any peer, after checking its images."""
    images = batch["image"] if isinstance(batch, dict) else batch[0]
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIZE, SIZE):
        raise TypeError(f"a batch of {images.dtype} {tuple(images.shape)}")
    return len(images)
