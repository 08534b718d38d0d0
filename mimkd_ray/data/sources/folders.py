"""Class folders: `root/<class>/<image>`, classes in sorted order, as in torchvision's ImageFolder; images may also lie
in folders of a class's folder.

A sorted listing holds one class after the other, so a window of adjacent rows would hold a single class. Therefore the
listing is shuffled once, by keyed numbers with seed 0 that depend only on its length, and a row's id is its place after
that shuffle. Blocks are runs of `BLOCK_ROWS` rows of it. Adding or removing a file renumbers all rows; it also changes
the digest.

Local files are read one by one in place. On an object store, the files of a block are fetched together, with many
requests at a time, into the block store.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from mimkd_ray import console, storage
from mimkd_ray.data.augment.decode import DECODING, Decoding, Encoded
from mimkd_ray.data.order.blocks import Blocks
from mimkd_ray.data.order.random_numbers import permutation
from mimkd_ray.data.sources.source import Row, Source, digest_of
from mimkd_ray.data.store.block_reader import BlockReader, forget
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.data.store.stored_block import StoredBlock
from mimkd_ray.errors import DamagedDataError, UserError, count, nearest
from mimkd_ray.local_files import NOTHING

BLOCK_ROWS = 256
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".jp2", ".j2k", ".tga"),
)  # in any case
OTHERS = ("__MACOSX", "@eaDir")  # folders in which systems keep small copies of their own
DEEPEST = 16  # folders in folders of a class
THREADS = 16  # requests of a block to an object store, and listings
NAMED = 3  # files that were passed over


class ClassFolders(NamedTuple):
    """The images of class folders as listed."""

    classes: tuple[str, ...]
    folders: tuple[str, ...]
    """Those of the classes that are here, in the listing's order."""
    images: dict[str, dict[str, storage.Entry]]
    """By folder: {path below it: Entry}, sorted."""


def class_folders(root: str) -> dict[str, str]:
    """Return {class: folder} of the class folders below `root`, sorted."""
    folders = {url.rpartition("/")[2]: url for url in storage.list_dirs(root)}
    return {name: url for name, url in folders.items() if not name.startswith(".") and name not in OTHERS}


def list_classes(root: str, classes: tuple[str, ...] | None) -> ClassFolders:
    """List the class folders below `root`. `classes` are the training set's, if they are known.

    Says in a line what was passed over, and which classes have no image. Raises UserError for folders that are not
    among `classes`, and for no image at all.
    """
    folders = class_folders(root)
    with ThreadPoolExecutor(THREADS) as pool:
        listings = dict(zip(folders, pool.map(_files, folders.values()), strict=True))
    images = {
        name: {file: entry for file, entry in files.items() if _is_image(file, entry)}
        for name, files in listings.items()
    }
    known = tuple(sorted(folders)) if classes is None else classes
    of_training = set(known)
    unknown = [name for name, of_folder in images.items() if of_folder and name not in of_training]
    if unknown:
        raise UserError(
            f"{printable(root)}: {len(unknown)} class folder(s) are not among the {len(known)} training classes, the "
            f"first is '{printable(unknown[0])}'{nearest(unknown[0], known)}; rename or remove them"
        )
    at_root = {url.rpartition("/")[2]: entry.size for url, entry in storage.list_entries(root, broken=True).items()}
    shown = [name for name in at_root if not name.startswith(".")]
    links = [name for name in shown if at_root[name] == NOTHING]
    links += [f"{name}/{file}" for name, files in listings.items() for file in files if files[file].size == NOTHING]
    beside = [name for name in shown if name.lower().endswith(SUFFIXES) and at_root[name] != NOTHING]
    arrow = any(name.endswith(".arrow") for name in shown)  # of save_to_disk of Hugging Face's datasets
    if not any(images.values()):
        raise UserError(
            f"{printable(root)}: none of {len(folders)} class folders holds an image ({', '.join(SUFFIXES)})"
            + (f", the first is '{printable(next(iter(folders)))}'" if folders else "")
            + (f", {count(len(beside), 'image')} beside them" if beside else "")
            + (f", {count(len(links), 'link')} that lead to nothing" if links else "")
            + ("; expected <class>/<image>" if not arrow else "; .arrow files are not read: write Parquet (to_parquet)")
        )
    others = {f"{name}/{file}" for name, files in listings.items() for file in files if file not in images[name]}
    tell_passed_over(root, sorted(others.difference(links)), beside, links)
    without = [name for name in known if not images.get(name)]
    if without:
        console.say_once(
            f"{printable(root)}: {len(without)} of {len(known)} classes have no image here, the first is "
            f"'{printable(without[0])}'; they keep their numbers"
        )
    return ClassFolders(known, tuple(name for name in folders if name in of_training), images)


def tell_passed_over(place: str, others: Sequence[str], beside: Sequence[str] = (), links: Sequence[str] = ()) -> None:
    """Say in a line which files of a set are no part of it: those of `others` kinds than are read, images `beside`
    the class folders, and `links` that lead to nothing."""
    if not others and not beside and not links:
        return
    endings = Counter(file.rpartition("/")[2].rpartition(".")[2].lower() for file in others)
    named = ", ".join(f"{number} .{ending}" for ending, number in endings.most_common(NAMED))
    parts = [f"{count(len(others), 'other file')} ({named})"] if others else []
    parts += [f"{count(len(beside), 'image')} beside the class folders"] if beside else []
    parts += [f"{count(len(links), 'link')} to nothing"] if links else []
    examples = printable(", ".join([*others[:NAMED], *beside[:NAMED], *links[:NAMED]]))
    console.say_once(f"{printable(place)}: passed over: {' and '.join(parts)}, such as {examples}")


def _files(folder: str) -> dict[str, storage.Entry]:
    """Return what is not hidden in a folder and its folders, by path below it, sorted."""

    def wanted(name: str) -> bool:
        return not name.startswith(".") and name not in OTHERS

    return dict(sorted(storage.list_entries_below(folder, DEEPEST, wanted, broken=True).items()))


def _is_image(file: str, entry: storage.Entry) -> bool:
    return file.lower().endswith(SUFFIXES) and entry.size != NOTHING


def _without_classes(root: str) -> list[tuple[int, str, storage.Entry]]:
    """The images of a folder that holds images itself, and of its folders; none where it holds folders alone."""
    files = _files(root)
    images = {file: entry for file, entry in files.items() if _is_image(file, entry)}
    if not any("/" not in file for file in images):
        return []
    links = [file for file, entry in files.items() if entry.size == NOTHING]
    tell_passed_over(root, sorted(set(files).difference(images, links)), links=links)
    return [(-1, file, entry) for file, entry in images.items()]


def printable(name: str) -> str:
    """Return a name of a file, which may hold any bytes, as text that any console and file takes."""
    return name.encode("utf-8", "backslashreplace").decode()


class FolderSource(Source):
    """The images below `root`; id = position. Opening lists every class folder and reads no image.

    `classes` fixes the class numbers (for a validation set: those of the training set); by default they are
    the sorted folder names. `store` is used for object stores only. Raises UserError for no images, or folders that
    are not in `classes`.
    """

    def __init__(
        self,
        root: str,
        classes: tuple[str, ...] | None = None,
        store: BlockStore | None = None,
        how: Decoding = DECODING,
        labelled: bool = True,
    ) -> None:
        """Not `labelled`: images that lie in `root` itself are the set, with those in its folders, without classes."""
        self.root = root
        self.how = how
        self.store = store if storage.is_remote(root) else None
        found = [] if labelled else _without_classes(root)
        listed = list_classes(root, classes) if not found else ClassFolders((), (), {})
        self.classes = listed.classes
        self._loaded_again: set[int] = set()
        found += [
            (label, file, entry)
            for label, name in enumerate(self.classes)
            for file, entry in listed.images.get(name, {}).items()
        ]
        order = self._arrange(found)
        versions = [found[place][2] for place in order] if self.store else []
        self._keys = [self._key(block, versions) for block in range(self.blocks.num_blocks)] if self.store else []

    def _arrange(self, found: Sequence[tuple[int, str, storage.Entry]]) -> np.ndarray:
        """Number the (label, file, Entry) of a listing; return their order."""
        self.num_rows = len(found)
        order = permutation(self.num_rows, 0, "folder listing")
        # Arrays, not lists: a million Python strings cost each loader process a copy of them.
        self._files = np.array([os.fsencode(file) for _, file, _ in found])[order]
        self._labels = np.array([label for label, _, _ in found], dtype=np.int64)[order]
        self.blocks = Blocks.uniform(self.num_rows, BLOCK_ROWS)
        self.distant = self.store is not None
        self.block_bytes = sum(entry.size for _, _, entry in found) // self.blocks.num_blocks if self.store else 0
        self.digest = digest_of("folders", self.classes, self._files.tolist(), self._labels.tolist())
        return order

    def read(self, positions: Sequence[int]) -> list[Row]:
        """Return the rows at `positions`, in that order. Raises DamagedDataError for a file that is gone."""
        images: Sequence[Encoded]
        if self.store is None:
            images = self._read_files(positions)
        else:
            reader = BlockReader(self.store)
            images = [
                reader.row(self._keys[block], partial(self._load, block), inside, self.block_bytes)[0]
                for block, inside in zip(*map(np.ndarray.tolist, self.blocks.locate(positions)), strict=True)
            ]
        return [
            Row(int(position), int(self._labels[position]), image, printable(self._url(int(position))), self.how)
            for position, image in zip(positions, images, strict=True)
        ]

    def read_again(self, position: int) -> Row | None:
        """Return the row of its block loaded and verified anew, once in this process."""
        block = int(self.blocks.locate([position])[0][0])
        if self.store is None:
            return None
        if block not in self._loaded_again:
            self._loaded_again.add(block)
            forget(self.store, self._keys[block])
        return self.read([position])[0]

    def fetch(self, block: int) -> bool:
        """Fetch the block into the store; return whether it is there (False: no store, or no room)."""
        load = partial(self._load, block)
        return self.store is not None and self.store.fetch(self._keys[block], load, self.block_bytes)

    def _url(self, position: int) -> str:
        label, file = int(self._labels[position]), self._file(position)
        return storage.join(self.root, f"{self.classes[label]}/{file}" if label >= 0 else file)

    def _file(self, position: int) -> str:
        return os.fsdecode(self._files[position])

    def _read_files(self, positions: Sequence[int]) -> list[bytes]:
        urls = [self._url(int(position)) for position in positions]
        try:
            if storage.is_remote(self.root):
                with ThreadPoolExecutor(THREADS) as pool:  # threads wait for the network and take no CPU
                    return list(pool.map(partial(storage.read_bytes, small=True), urls))
            return [storage.read_bytes(url) for url in urls]
        except FileNotFoundError as error:
            raise DamagedDataError(
                f"{printable(str(error.filename))} is gone: it was there when the data set was opened; put it back"
            ) from error

    def _positions(self, block: int) -> range:
        return range(self.blocks.start(block), self.blocks.start(block + 1))

    def _key(self, block: int, versions: list[storage.Entry]) -> str:
        """Return the block's key, a digest of the files that it is read from and their versions."""
        digest = hashlib.sha256()
        for position in self._positions(block):
            digest.update(repr((self._url(position), *versions[position])).encode())
        return digest.hexdigest()

    def _load(self, block: int) -> StoredBlock:
        positions = self._positions(block)
        return StoredBlock.of(self._read_files(positions), self._labels[positions.start : positions.stop])
