"""WebDataset tars as a source of data preparation: `shards-{000..099}.tar`, or `<split>-*.tar` in a folder.

A sample is the files of one name: `0001.jpg` is the image and `0001.cls` its class number, or `0001.json` has it as
`cls` or `label`. The headers of every tar are read once; images are then read by their places, as from any archive.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.prepare.archives import CLOSE, TarSlice, opened
from mimkd_ray.data.prepare.input_pieces import THREADS, Origin, rows_per_piece
from mimkd_ray.data.sources.folders import SUFFIXES, printable, tell_passed_over
from mimkd_ray.data.sources.source import digest_of, numbered_classes
from mimkd_ray.errors import UserError

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
            f"--source {source} names {len(wanted):,} tars, and {len(missing):,} of them are not there"
            f"{f', such as {missing[0]}' if missing else ''}: give the range that is there"
        )
    return {url: listed[url] for url in wanted}


def open_tars(tars: Mapping[str, int]) -> Origin:
    """Read the headers of the tars, given as {URL: bytes}. Raises UserError for what is no tar, and images without a
    label."""
    with ThreadPoolExecutor(THREADS) as pool:
        read = list(pool.map(lambda tar: _images(*tar), tars.items()))
    found = [images for images, _ in read]
    tell_passed_over(next(iter(tars)).rpartition("/")[0], [name for _, others in read for name in others])
    step = rows_per_piece(sum(map(len, found)))
    pieces = []
    for (url, size), images in zip(tars.items(), found, strict=True):
        for start in range(0, len(images), step):
            part = images[start : start + step]
            members = tuple((image.name, image.offset, image.bytes) for image in part)
            pieces.append(TarSlice(url, size, members, tuple(image.label for image in part)))
    if not pieces:
        raise UserError(f"{next(iter(tars))}: no tar of the split holds an image ({', '.join(SUFFIXES)})")
    labels = tuple(np.array(piece.labels, np.int64) for piece in pieces)
    classes = numbered_classes(max(int(each.max()) for each in labels), next(iter(tars)))
    digest = digest_of("web tars", [(url.rpartition("/")[2], size) for url, size in tars.items()], found)
    return Origin(classes, digest, tuple(pieces), labels)


def _images(url: str, size: int) -> tuple[list[Found], list[str]]:
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
                elif ending in ("cls", "json"):
                    label = _label(tar.extractfile(member), ending, f"{url}: {member.name}")
                    if label is not None:
                        labels[key] = label
                else:
                    others.append((key, member.name))
    except tarfile.TarError as error:
        raise UserError(f"{url} ({size:,} bytes) is not a whole tar archive: {error}; copy it again") from error
    nameless = [name for key, (name, _, _) in places.items() if labels.get(key, -1) < 0]
    if nameless:
        raise UserError(
            f"{url}: {printable(nameless[0])} and {len(nameless) - 1:,} other images have no label: a file of the same "
            f"name that ends in .cls, with the class number, or in .json, with it as {' or '.join(LABEL_FIELDS)}"
        )
    images = [Found(*place, labels[key]) for key, place in places.items()]
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
