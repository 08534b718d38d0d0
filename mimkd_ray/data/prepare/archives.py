"""The official ImageNet archives (ILSVRC 2012) as a source of data preparation, read in place without unpacking.

    ILSVRC2012_img_train.tar            one tar a class, `<wnid>.tar`
    ILSVRC2012_img_val.tar              50,000 images, `ILSVRC2012_val_00000001.JPEG`, ...
    ILSVRC2012_devkit_t12.tar.gz        the labels of the validation images

Classes are the WordNet ids in sorted order, so labels equal torchvision's. A class tar is one piece: reading it takes
its 100 to 150 MB into memory.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.prepare.input_pieces import Origin, Sample, rows_per_piece
from mimkd_ray.data.sources.folders import SUFFIXES
from mimkd_ray.data.sources.source import digest_of
from mimkd_ray.data.sources.tar_headers import CLOSE, opened
from mimkd_ray.errors import UserError

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
ARCHIVES = {"train": TRAIN, "val": VAL, "validation": VAL}  # by split
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"

# Bytes per request while the headers of an archive in an object store are listed. Class tars lie far apart: a little
# around each header is enough. Images lie close together: reading on is faster than a request for each header.
FAR_APART = 1 << 16


def open_archives(root: str, split: str) -> Origin | None:
    """Return a split of the archives in folder `root`; None if its archive is not there.

    Reads the headers of the archive: a thousand for training, all 50,000 for validation. Raises UserError for a
    truncated archive, a missing development kit, or a ground truth that does not fit.
    """
    name = ARCHIVES.get(split, "")
    sizes = {url.rpartition("/")[2]: size for url, size in storage.list_sizes(root).items()}
    if name not in sizes:
        return None
    url = storage.join(root, name)
    if name == TRAIN:
        return _open_train(url, sizes[name])
    if DEVKIT not in sizes:
        raise UserError(f"{url} has no labels: put {DEVKIT}, which holds them, beside it")
    return _open_val(url, sizes[name], storage.join(root, DEVKIT))


@dataclass(frozen=True)
class ClassTar:
    """A tar of all training images of one class: `bytes` at `offset` of the archive."""

    url: str
    offset: int
    bytes: int
    label: int
    wnid: str

    def samples(self) -> list[Sample]:
        """Read the tar with one request; images in the order of their names."""
        data = _read(self.url, self.offset, self.bytes)
        place = f"{self.url}, {self.wnid}.tar"
        found = _members(io.BytesIO(data), len(data), place)
        if not found:
            raise UserError(f"{place} holds no image; download the archive again")
        return [
            Sample(self.label, f"{self.wnid}/{name}", data[offset : offset + size])
            for name, (offset, size) in sorted(found.items())
        ]


@dataclass(frozen=True)
class TarSlice:
    """Some images of a tar: `members` are (name, offset, bytes) in the archive."""

    url: str
    members: tuple[tuple[str, int, int], ...]
    labels: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Total size of the images in bytes."""
        return sum(size for _, _, size in self.members)

    def samples(self) -> list[Sample]:
        """Read from the first image to the last with one request: consecutive images are neighbours in the tar."""
        start = min(offset for _, offset, _ in self.members)
        stop = max(offset + size for _, offset, size in self.members)
        data = _read(self.url, start, stop - start)
        return [
            Sample(label, name, data[offset - start : offset - start + size])
            for label, (name, offset, size) in zip(self.labels, self.members, strict=True)
        ]


def _open_train(url: str, size: int) -> Origin:
    with opened(url, size, FAR_APART) as archive:
        tars = {name.removesuffix(".tar"): place for name, place in _members(archive, size, url, (".tar",)).items()}
    if not tars:
        raise UserError(f"{url} holds no class tar (<wnid>.tar); it should be the official training archive")
    classes = tuple(sorted(tars))
    pieces = tuple(ClassTar(url, *tars[wnid], label, wnid) for label, wnid in enumerate(classes))
    return Origin(classes, digest_of("train archive", size, sorted(tars.items())), pieces, labels=None)


def _open_val(url: str, size: int, devkit: str) -> Origin:
    wnids, truth = _read_devkit(devkit)
    with opened(url, size, CLOSE) as archive:
        members = [(name, *place) for name, place in sorted(_members(archive, size, url).items())]
    if len(members) != len(truth):
        raise UserError(
            f"{url} holds {len(members):,} images, and {devkit} has labels for {len(truth):,}; download them again"
        )
    classes = tuple(sorted(wnids.values()))
    number = {wnid: label for label, wnid in enumerate(classes)}
    labels = np.array([number[wnids[id]] for id in truth], dtype=np.int64)
    # A piece is read as one range of the tar, so pieces follow the tar's order.
    order = sorted(range(len(members)), key=lambda row: members[row][1])
    step = rows_per_piece(len(members))
    rows = [order[start : start + step] for start in range(0, len(order), step)]
    pieces = tuple(
        TarSlice(url, tuple(members[row] for row in of_piece), tuple(int(labels[row]) for row in of_piece))
        for of_piece in rows
    )
    digest = digest_of("validation archive", size, members, labels.tolist())
    return Origin(classes, digest, pieces, tuple(np.array(piece.labels, np.int64) for piece in pieces))


def _read_devkit(url: str) -> tuple[dict[int, str], list[int]]:
    """Return ({ILSVRC id: wnid} of the classes, [ILSVRC id of each validation image, by its number])."""
    from scipy.io import loadmat

    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(url))) as kit:
            files = {
                member.name.rpartition("/")[2]: cast(BinaryIO, kit.extractfile(member)).read()
                for member in kit
                if member.isfile() and member.name.endswith(("/data/meta.mat", f"/data/{GROUND_TRUTH}"))
            }
        synsets: Any = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        # Synsets with children are groups of classes, not classes.
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        truth = [int(line) for line in files[GROUND_TRUTH].split()]
        if not set(truth) <= set(wnids):
            raise ValueError(f"the ground truth names class {min(set(truth) - set(wnids))}, which meta.mat has not")
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, storage.StorageError):
            raise
        raise UserError(
            f"{url} is not the official development kit ({type(error).__name__}: {error}); download it again"
        ) from error
    return wnids, truth


def _read(url: str, offset: int, length: int) -> bytes:
    data = storage.read_range(url, offset, length)
    if len(data) != length:
        raise UserError(f"{url}: got {len(data):,} of {length:,} bytes at {offset:,}; the archive has changed")
    return data


def _members(file: BinaryIO, size: int, place: str, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, tuple[int, int]]:
    """Return {base name: (offset, bytes)} of the tar's files with these suffixes."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            found = {
                member.name.rpartition("/")[2]: (member.offset_data, member.size)
                for member in tar
                if member.isfile() and member.name.lower().endswith(suffixes)
            }
    except tarfile.TarError as error:
        raise UserError(f"{place} ({size:,} bytes) is not a whole tar archive: {error}; download it again") from error
    if found and (end := max(offset + length for offset, length in found.values())) > size:
        raise UserError(
            f"{place} is cut short: it has {size:,} bytes and should have {end:,} or more; download it again"
        )
    return found
