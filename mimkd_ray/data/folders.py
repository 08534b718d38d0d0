"""Class folders: `root/<class>/<image>`, classes in sorted order, as in torchvision's ImageFolder.

A sorted listing holds one class after the other, so a window of neighbouring rows would hold a single class.
Therefore the listing is shuffled once, by keyed numbers with seed 0 that depend on its length alone, and a
row's id is its place after that shuffle. Blocks are runs of `BLOCK_ROWS` of it. Adding or removing a file
renumbers everything; it also changes the digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.blocks import Blocks
from mimkd_ray.data.keyed import permutation
from mimkd_ray.data.source import Row, digest_of
from mimkd_ray.errors import UserError, nearest

BLOCK_ROWS = 256
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # in any case
THREADS = 16  # reads of a batch from an object store, and listings


class FolderSource:
    """The images below `root`; id = position. Opening lists every class folder and reads no image.

    `classes` fixes the class numbers (for a validation set: those of the training set); by default they are
    the sorted folder names. Raises UserError for no classes, a class without images, or folders that are not
    in `classes`.
    """

    def __init__(self, root: str, classes: tuple[str, ...] | None = None) -> None:
        self.root = root
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
        labels = [label for label, name in enumerate(self.classes) for _ in listings.get(name, ())]
        paths = [file for name in self.classes for file in listings.get(name, ())]
        self.num_rows: int = len(paths)
        order = permutation(self.num_rows, 0, "folder listing")
        # Arrays, not lists: a million Python strings cost each loader process a copy of them.
        self._files = np.array([path.encode() for path in paths])[order]
        self._labels = np.array(labels, dtype=np.int64)[order]
        self.blocks: Blocks = Blocks.uniform(self.num_rows, BLOCK_ROWS)
        self.digest: str = digest_of("folders", self.classes, self._files.tolist(), self._labels.tolist())

    def labels(self) -> np.ndarray:
        """Return all labels, int64. Free: they are folder numbers."""
        return self._labels

    def label_range(self) -> tuple[int, int]:
        """Return the smallest and largest label."""
        return int(self._labels.min()), int(self._labels.max())

    def read(self, positions: Sequence[int]) -> list[Row]:
        """Return the rows at `positions`, in that order; one file read each. Raises FileNotFoundError."""
        places = []
        for position in positions:
            label = int(self._labels[position])
            name = f"{self.classes[label]}/{self._files[position].decode()}"
            places.append((position, label, storage.join(self.root, name)))
        urls = [url for _, _, url in places]
        if storage.is_remote(self.root):
            with ThreadPoolExecutor(THREADS) as pool:  # waiting, not work: many requests at a time
                images = list(pool.map(storage.read_bytes, urls))
        else:
            images = [storage.read_bytes(url) for url in urls]
        return [
            Row(int(position), label, image, url) for (position, label, url), image in zip(places, images, strict=True)
        ]


def _images(folder: str) -> list[str]:
    names = (url.rpartition("/")[2] for url in storage.list_files(folder))
    return [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
