"""Headers of WebDataset tars: the places and labels of their images.

Of an object store a tar is read from its beginning to its end in large requests, once on each node: what was found is a
note of the block store, by the tar's URL, size and version.
"""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, NamedTuple, cast

from mimkd_ray import console, storage
from mimkd_ray.config.data import MOST_CLASSES
from mimkd_ray.data.sources.folders import SUFFIXES, THREADS, printable, tell_passed_over
from mimkd_ray.data.sources.source import digest_of
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.errors import UserError, count

CLOSE = 8 << 20
"""Bytes per request while the headers of an archive of images in an object store are listed: to read on is faster than
a request for each header."""
LABEL_FIELDS = ("cls", "label")


class Found(NamedTuple):
    """An image of a tar."""

    name: str
    offset: int
    bytes: int
    label: int


class Listed(NamedTuple):
    """What a tar holds."""

    images: list[Found]
    others: list[str]
    """The files of samples without an image of a kind that is read, and all images of a sample but its last one."""


def headers(
    tars: Mapping[str, storage.Entry], labelled: bool = True, store: BlockStore | None = None
) -> list[list[Found]]:
    """Return the images of each tar, and say in a line what was passed over. `store` keeps what is found in tars of an
    object store. Raises UserError for what is no tar, for no image, and for images without a label, unless they need
    none."""
    lock, done = threading.Lock(), 0
    total = sum(entry.size for entry in tars.values())
    what = f"reading the headers of {count(len(tars), 'tar')}"
    with ThreadPoolExecutor(THREADS) as pool, console.phase(what, -(-total // 10**6), "MB", said=False) as advance:

        def passed(more: int) -> None:
            nonlocal done
            with lock:
                done += more
                advance(done // 10**6)

        listed = list(pool.map(lambda tar: _listed(tar[0], tar[1], labelled, store, passed), tars.items()))
    first = next(iter(tars))
    tell_passed_over(first.rpartition("/")[0], [name for each in listed for name in each.others])
    if not any(each.images for each in listed):
        raise UserError(f"{first}: no tar of the split holds an image ({', '.join(SUFFIXES)})")
    return [each.images for each in listed]


def _listed(
    url: str, entry: storage.Entry, labelled: bool, store: BlockStore | None, passed: Callable[[int], None]
) -> Listed:
    """Return what is in a tar: from the store's note, or from its headers. `passed` is told each time how many bytes
    more are done, in all those of the tar."""
    at = 0

    def reached(place: int) -> None:
        nonlocal at
        passed(place - at)
        at = place

    if store is None or not storage.is_remote(url):
        listed = _images(url, entry.size, labelled, reached)
    else:
        text = store.note(
            digest_of("headers of a tar, 2", url, entry.size, entry.version, labelled, SUFFIXES),
            lambda: json.dumps(_images(url, entry.size, labelled, reached)).encode(),
            f"the headers of {url}",
            entry.size,
        )
        images, others = json.loads(text)
        listed = Listed([Found(*image) for image in images], others)
    reached(entry.size)
    return listed


@contextmanager
def opened(url: str, size: int, read_ahead: int) -> Iterator[BinaryIO]:
    """Open an archive for listing its headers; of an object store so many bytes are requested at a time."""
    with storage.open_file(url, size) as file:
        yield (
            cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, file), read_ahead)) if storage.is_remote(url) else file
        )


def _images(url: str, size: int, labelled: bool, reached: Callable[[int], None]) -> Listed:
    """Read the headers of a tar, in its order; `reached` is told each time where they are."""
    places: dict[str, tuple[str, int, int]] = {}
    others: list[tuple[str, str]] = []
    twice: list[str] = []
    labels: dict[str, int] = {}
    try:
        with opened(url, size, CLOSE) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                reached(member.offset_data)
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                key, ending = f"{folder}/{stem}", ending.lower()
                if not member.isfile():
                    continue
                if f".{ending}" in SUFFIXES:
                    if key in places:
                        twice.append(places[key][0])  # of a sample the last image counts
                    places[key] = (member.name, member.offset_data, member.size)
                    if member.offset_data + member.size > size:
                        raise UserError(
                            f"{url} is cut short: {member.name} ends beyond its {size:,} bytes; copy it again"
                        )
                elif ending in ("cls", "json"):
                    label = _label(tar.extractfile(member), ending, f"{url}: {member.name}", labelled)
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
    return Listed(images, twice + [name for key, name in others if key not in places])


def _label(file: IO[bytes] | None, ending: str, where: str, labelled: bool) -> int | None:
    """Return the class number in a file; None for none, and, unless all images need one, for what cannot be one."""
    text = file.read() if file is not None else b""
    try:
        found: Any = text if ending == "cls" else json.loads(text)
        if ending == "json":
            found = next((found[field] for field in LABEL_FIELDS if field in found), None)
        number = None if found is None else int(found)
    except (ValueError, TypeError, RecursionError, OverflowError):  # the last one of an infinite number
        if not labelled:
            return None
        raise UserError(f"{where} holds {text[:40]!r}, and no class number: mend it") from None
    if number is None or (not labelled and not 0 <= number < MOST_CLASSES):
        return None
    if number >= MOST_CLASSES:
        raise UserError(
            f"{where} holds {text[:40]!r}, and class numbers go up to {MOST_CLASSES - 1:,}: mend it, or train without "
            "such labels (--data.labels partial, or none)"
        )
    return number
