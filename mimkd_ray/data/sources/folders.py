"""Class folders: `root/<class>/<image>`, classes in sorted order, as in torchvision's ImageFolder.

A sorted listing holds one class after the other, so a window of neighbouring rows would hold a single class.
Therefore the listing is shuffled once, by keyed numbers with seed 0 that depend on its length alone, and a
row's id is its place after that shuffle. Blocks are runs of `BLOCK_ROWS` of it. Adding or removing a file
renumbers everything; it also changes the digest.

Local files are read one by one where they are. On an object store, the files of a block are fetched together, by
many requests at a time, into the block store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.augment.decode import DECODING, Decoding, Encoded
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.order.random_numbers import permutation
from mimkd_ray.data.sources.source import Row, digest_of
from mimkd_ray.data.store.block_reader import BlockReader
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.data.store.stored_block import StoredBlock
from mimkd_ray.errors import DamagedDataError, UserError, nearest

BLOCK_ROWS = 256
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # in any case
THREADS = 16  # requests of a block to an object store, and listings


class FolderSource:
    """The images below `root`; id = position. Opening lists every class folder and reads no image.

    `classes` fixes the class numbers (for a validation set: those of the training set); by default they are
    the sorted folder names. `store` is used for object stores only. Raises UserError for no classes, a class
    without images, or folders that are not in `classes`.
    """

    def __init__(
        self,
        root: str,
        classes: tuple[str, ...] | None = None,
        store: BlockStore | None = None,
        how: Decoding = DECODING,
    ) -> None:
        self.root = root
        self.how = how
        self.in_memory: bool = False
        self.store: BlockStore | None = store if storage.is_remote(root) else None
        folders = {url.rpartition("/")[2]: url for url in storage.list_dirs(root)}
        folders = {name: url for name, url in folders.items() if not name.startswith(".")}
        self.classes: tuple[str, ...] = tuple(sorted(folders)) if classes is None else classes
        unknown = [name for name in folders if name not in set(self.classes)]
        if unknown:
            raise UserError(
                f"{root}: {len(unknown)} class folder(s) are not among the {len(self.classes)} training "
                f"classes, the first is '{unknown[0]}'{nearest(unknown[0], self.classes)}; rename or remove "
                "them"
            )
        with ThreadPoolExecutor(THREADS) as pool:
            listings = dict(zip(folders, pool.map(_images, folders.values()), strict=True))
        empty = [name for name, files in listings.items() if not files]
        if empty or not listings:
            raise UserError(
                f"{root}: {len(empty)} of {len(folders)} class folders hold no image ({', '.join(SUFFIXES)})"
                + (f", the first is '{empty[0]}'; add images or remove them" if empty else "; expected <class>/<image>")
            )
        found = [
            (label, file, entry)
            for label, name in enumerate(self.classes)
            for file, entry in listings.get(name, {}).items()
        ]
        self.num_rows: int = len(found)
        order = permutation(self.num_rows, 0, "folder listing")
        # Arrays, not lists: a million Python strings cost each loader process a copy of them.
        self._files = np.array([file.encode() for _, file, _ in found])[order]
        self._labels = np.array([label for label, _, _ in found], dtype=np.int64)[order]
        self.blocks: Blocks = Blocks.uniform(self.num_rows, BLOCK_ROWS)
        self.num_bytes: int = sum(entry.size for _, _, entry in found)
        self.digest: str = digest_of("folders", self.classes, self._files.tolist(), self._labels.tolist())
        versions = [found[place][2] for place in order] if self.store else []
        self._keys = [self._key(block, versions) for block in range(self.blocks.num_blocks)] if self.store else []

    @property
    def distant(self) -> bool:
        """Whether images are copied to the store, from object storage."""
        return self.store is not None

    @property
    def block_bytes(self) -> int:
        """Mean size of a block on the object store; 0 for local files."""
        return self.num_bytes // self.blocks.num_blocks if self.store else 0

    def labels(self) -> np.ndarray:
        """Return all labels, int64. Free: they are folder numbers."""
        return self._labels

    def label_range(self) -> tuple[int, int]:
        """Return the smallest and largest label."""
        return int(self._labels.min()), int(self._labels.max())

    def read(self, positions: Sequence[int]) -> list[Row]:
        """Return the rows at `positions`, in that order. Raises DamagedDataError for a file that is gone."""
        images: Sequence[Encoded]
        if self.store is None:
            images = self._read_files(positions)
        else:
            reader = BlockReader(self.store)
            images = [
                reader.row(self._keys[block], partial(self._load, block), inside)[0]
                for block, inside in zip(*map(np.ndarray.tolist, self.blocks.locate(positions)), strict=True)
            ]
        return [
            Row(int(position), int(self._labels[position]), image, self._url(int(position)), self.how)
            for position, image in zip(positions, images, strict=True)
        ]

    def fetch(self, block: int) -> bool:
        """See to it that the block is in the store; say whether it is (False: no store, or no room)."""
        return self.store is not None and self.store.fetch(self._keys[block], partial(self._load, block))

    def _url(self, position: int) -> str:
        name = f"{self.classes[self._labels[position]]}/{self._files[position].decode()}"
        return storage.join(self.root, name)

    def _read_files(self, positions: Sequence[int]) -> list[bytes]:
        urls = [self._url(int(position)) for position in positions]
        try:
            if storage.is_remote(self.root):
                with ThreadPoolExecutor(THREADS) as pool:  # waiting, not work: many requests at a time
                    return list(pool.map(partial(storage.read_bytes, small=True), urls))
            return [storage.read_bytes(url) for url in urls]
        except FileNotFoundError as error:
            raise DamagedDataError(
                f"{error.filename} is gone: it was there when the data set was opened; put it back"
            ) from error

    def _positions(self, block: int) -> range:
        return range(self.blocks.start(block), self.blocks.start(block + 1))

    def _key(self, block: int, versions: list[storage.Entry]) -> str:
        """Name the block by what it is read from: a file that is written again makes another block."""
        digest = hashlib.sha256()
        for position in self._positions(block):
            digest.update(repr((self._url(position), *versions[position])).encode())
        return digest.hexdigest()

    def _load(self, block: int) -> StoredBlock:
        positions = self._positions(block)
        return StoredBlock.of(self._read_files(positions), self._labels[positions.start : positions.stop])


def _images(folder: str) -> dict[str, storage.Entry]:
    files = {url.rpartition("/")[2]: entry for url, entry in storage.list_entries(folder).items()}
    return {
        name: entry for name, entry in files.items() if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    }
