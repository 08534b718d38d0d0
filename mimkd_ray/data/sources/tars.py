"""WebDataset tars: `shards-{000..099}.tar`, or `<split>-*.tar` in a folder.

A sample is the files of one name: `0001.jpg` is the image and `0001.cls` its class number, or `0001.json` has it as
`cls` or `label`. The headers are read when a set is opened (tar_headers.py); images are then read by their places. On
an object store, the images of a block are fetched together, with many requests at a time, into the block store.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.augment.decode import DECODING, Decoding
from mimkd_ray.data.sources.folders import THREADS, FolderSource, printable
from mimkd_ray.data.sources.source import digest_of, numbered_classes
from mimkd_ray.data.sources.tar_headers import headers
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.errors import DamagedDataError, UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


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


def tars_of_pattern(pattern: str) -> dict[str, storage.Entry]:
    """Return {URL: Entry} of the tars of a pattern. Raises UserError if one is not there."""
    wanted = expanded(pattern)
    listed: dict[str, storage.Entry] = {}
    for folder in {url.rpartition("/")[0] for url in wanted}:
        listed |= storage.list_entries(folder, ".tar")
    missing = [url for url in wanted if url not in listed]
    if not wanted or missing:
        raise UserError(
            f"{pattern} names {len(wanted):,} tars, and {len(missing):,} of them are not there"
            f"{f', such as {missing[0]}' if missing else ''}: give the range that is there"
        )
    return {url: listed[url] for url in wanted}


class TarSource(FolderSource):
    """The images of tars, mixed and numbered as those of class folders are; the tars' order stands for that of a
    folder's listing."""

    def __init__(
        self,
        tars: Mapping[str, storage.Entry],
        classes: tuple[str, ...] | None = None,
        store: BlockStore | None = None,
        how: Decoding = DECODING,
        labelled: bool = True,
    ) -> None:
        """Reads the headers of all tars; of an object store once, with a `store`. Not `labelled`: images may lack a
        label."""
        self.root, self.how = next(iter(tars)).rpartition("/")[0], how
        self.store = store if storage.is_remote(self.root) else None
        self._loaded_again = set()
        self._tars, self._entries = list(tars), list(tars.values())
        listed = headers(tars, labelled, self.store)
        found = [(number, image) for number, of_tar in enumerate(listed) for image in of_tar]
        highest = max(image.label for _, image in found)
        self.classes = classes or (numbered_classes(highest, self._tars[0]) if highest >= 0 else ())
        names = [url.rpartition("/")[2] for url in self._tars]
        rows = [(image.label, f"{names[at]}/{image.name}", storage.Entry(image.bytes, "")) for at, image in found]
        order = self._arrange(rows)
        self._places = np.array([(at, image.offset, image.bytes) for at, image in found], dtype=np.int64)[order]
        whole = digest_of("tars", list(tars.items()))
        blocks = range(self.blocks.num_blocks) if self.store else ()
        self._keys = [digest_of(whole, self._places[self._positions(block)].tobytes()) for block in blocks]

    def _url(self, position: int) -> str:
        return storage.join(self._tars[self._places[position][0]], self._file(position).partition(".tar/")[2])

    def _read_files(self, positions: Sequence[int]) -> list[bytes]:
        if not storage.is_remote(self.root):
            return [self._read_image(position) for position in positions]
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                images = list(pool.map(self._read_image, positions))
        except storage.StorageError:
            self._compare(positions)  # a shorter tar
            raise
        self._compare(positions)  # afterwards: what was read is of the tars that were opened, if they are still there
        return images

    def _read_image(self, position: int) -> bytes:
        number, offset, length = self._places[position].tolist()
        entry = None if storage.is_remote(self.root) else self._entries[number]
        try:
            return storage.read_range(self._tars[number], offset, length, entry)
        except FileNotFoundError:
            raise DamagedDataError(
                f"{printable(self._url(position))} is gone: its tar was there when the data set was opened; put it back"
            ) from None
        except storage.ChangedError:
            raise self._changed(number) from None

    def _compare(self, positions: Sequence[int]) -> None:
        """Raise DamagedDataError if a tar of the images in an object store is not the one that was opened. One listing
        of a folder: fewer requests than one a tar."""
        numbers = np.unique(self._places[list(positions), 0]).tolist()
        there: dict[str, storage.Entry] = {}
        for folder in {self._tars[number].rpartition("/")[0] for number in numbers}:
            there |= storage.list_entries(folder, ".tar")
        for number in numbers:
            if there.get(self._tars[number]) != self._entries[number]:
                raise self._changed(number)

    def _changed(self, number: int) -> DamagedDataError:
        return DamagedDataError(
            f"{printable(self._tars[number])}: the tar was written again after the data set was opened, when it had "
            f"{self._entries[number].size:,} bytes, so its images are elsewhere: put the old one back, or give the "
            "same command again, which reads the new one; leave tars alone while they are trained on"
        )
