"""WebDataset tars: `shards-{000..099}.tar`, or `<split>-*.tar` in a folder.

A sample is the files of one name: `0001.jpg` is the image and `0001.cls` its class number, or `0001.json` has it as
`cls` or `label`. The headers of every tar are read when a set is opened; images are then read by their places.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, NamedTuple, cast

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.augment.decode import DECODING, Decoding
from mimkd_ray.data.sources.folders import SUFFIXES, THREADS, FolderSource, printable, tell_passed_over
from mimkd_ray.data.sources.source import numbered_classes
from mimkd_ray.errors import DamagedDataError, UserError

CLOSE = 8 << 20
"""Bytes per request while the headers of an archive of images in an object store are listed: to read on is faster than
a request for each header."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
LABEL_FIELDS = ("cls", "label")


class Found(NamedTuple):
    """An image of a tar."""

    name: str
    offset: int
    bytes: int
    label: int


def expanded(pattern: str) -> list[str]:
    """Return the places that `shards-{000..099}.tar` stands for, in order; any number of ranges."""
    parts = _RANGE.split(pattern)
    ranges = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        width = len(first) if first.startswith("0") else 0
        ranges.append([f"{number:0{width}d}" for number in range(int(first), int(last) + 1)])
    texts = parts[0::3]
    return [
        texts[0] + "".join(number + text for number, text in zip(numbers, texts[1:], strict=True))
        for numbers in itertools.product(*ranges)
    ]


def tars_of(source: str, split: str, files: Mapping[str, int]) -> dict[str, int]:
    """Return {URL: bytes} of the tars of a split: those of a pattern, or among the `files` of the folder `source`."""
    if not source.endswith(".tar"):
        return {
            url: size
            for url, size in files.items()
            if url.endswith(".tar") and url.rpartition("/")[2].startswith((f"{split}-", f"{split}."))
        }
    wanted = expanded(source)
    listed: dict[str, int] = {}
    for folder in {url.rpartition("/")[0] for url in wanted}:
        listed |= storage.list_sizes(folder, ".tar")
    missing = [url for url in wanted if url not in listed]
    if not wanted or missing:
        raise UserError(
            f"{source} names {len(wanted):,} tars, and {len(missing):,} of them are not there"
            f"{f', such as {missing[0]}' if missing else ''}: give the range that is there"
        )
    return {url: listed[url] for url in wanted}


class TarSource(FolderSource):
    """The images of tars on a disk, given as {URL: bytes}, mixed and numbered as those of class folders are; the tars'
    order stands for that of a folder's listing."""

    def __init__(
        self,
        tars: Mapping[str, int],
        classes: tuple[str, ...] | None = None,
        how: Decoding = DECODING,
        labelled: bool = True,
    ) -> None:
        """Reads the headers of all tars. Not `labelled`: images may lack a label."""
        self.root, self.how = next(iter(tars)).rpartition("/")[0], how
        self.in_memory, self.store = False, None
        self._tars = list(tars)
        found = [(number, image) for number, of_tar in enumerate(headers(tars, labelled)) for image in of_tar]
        highest = max(image.label for _, image in found)
        self.classes = classes or (numbered_classes(highest, self._tars[0]) if highest >= 0 else ())
        names = [url.rpartition("/")[2] for url in self._tars]
        rows = [(image.label, f"{names[at]}/{image.name}", storage.Entry(image.bytes, "")) for at, image in found]
        order = self._arrange(rows)
        self._places = np.array([(at, image.offset, image.bytes) for at, image in found], dtype=np.int64)[order]

    def _url(self, position: int) -> str:
        return storage.join(self._tars[self._places[position][0]], self._file(position).partition(".tar/")[2])

    def _read_files(self, positions: Sequence[int]) -> list[bytes]:
        found = []
        for position in positions:
            number, offset, length = self._places[position].tolist()
            try:
                data = storage.read_range(self._tars[number], offset, length)
            except FileNotFoundError:
                data = b""
            if len(data) < length:
                raise DamagedDataError(
                    f"{printable(self._url(position))} is gone: its tar is not what it was when the data set was "
                    "opened; put it back"
                )
            found.append(data)
        return found


def headers(tars: Mapping[str, int], labelled: bool = True) -> list[list[Found]]:
    """Return the images of each tar, given as {URL: bytes}, and say in a line what was passed over. Raises UserError
    for what is no tar, for no image, and for images without a label, unless they need none."""
    with ThreadPoolExecutor(THREADS) as pool:
        read = list(pool.map(lambda tar: _images(tar[0], tar[1], labelled), tars.items()))
    first = next(iter(tars))
    tell_passed_over(first.rpartition("/")[0], [name for _, others in read for name in others])
    if not any(images for images, _ in read):
        raise UserError(f"{first}: no tar of the split holds an image ({', '.join(SUFFIXES)})")
    return [images for images, _ in read]


@contextmanager
def opened(url: str, size: int, read_ahead: int) -> Iterator[BinaryIO]:
    """Open an archive for listing its headers; of an object store so many bytes are requested at a time."""
    with storage.open_file(url, size) as file:
        yield (
            cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, file), read_ahead)) if storage.is_remote(url) else file
        )


def _images(url: str, size: int, labelled: bool) -> tuple[list[Found], list[str]]:
    """Return the images of a tar in its order, and the files of samples without an image of a kind that is read."""
    places: dict[str, tuple[str, int, int]] = {}
    others: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    try:
        with opened(url, size, CLOSE) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                key, ending = f"{folder}/{stem}", ending.lower()
                if not member.isfile():
                    continue
                if f".{ending}" in SUFFIXES:
                    places[key] = (member.name, member.offset_data, member.size)
                    if member.offset_data + member.size > size:
                        raise UserError(
                            f"{url} is cut short: {member.name} ends beyond its {size:,} bytes; copy it again"
                        )
                elif ending in ("cls", "json") and not labelled:
                    continue
                elif ending in ("cls", "json"):
                    label = _label(tar.extractfile(member), ending, f"{url}: {member.name}")
                    if label is not None:
                        labels[key] = label
                else:
                    others.append((key, member.name))
    except tarfile.TarError as error:
        raise UserError(f"{url} ({size:,} bytes) is not a whole tar archive: {error}; copy it again") from error
    nameless = [name for key, (name, _, _) in places.items() if labels.get(key, -1) < 0]
    if nameless and labelled:
        raise UserError(
            f"{url}: {printable(nameless[0])} and {len(nameless) - 1:,} other images have no label: a file of the same "
            f"name that ends in .cls, with the class number, or in .json, with it as {' or '.join(LABEL_FIELDS)}"
        )
    images = [Found(*place, labels.get(key, -1)) for key, place in places.items()]
    return images, [name for key, name in others if key not in places]


def _label(file: IO[bytes] | None, ending: str, where: str) -> int | None:
    text = file.read() if file is not None else b""
    try:
        if ending == "cls":
            return int(text)
        value: Any = json.loads(text)
        number = next((value[field] for field in LABEL_FIELDS if field in value), None)
        return None if number is None else int(number)
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{where} holds {text[:40]!r}, and no class number: mend it") from None
