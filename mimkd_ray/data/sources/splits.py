"""Where a split of a data set is, in a folder or URL; found in the same way by training and by preparation."""

from __future__ import annotations

import re
from typing import NamedTuple

from mimkd_ray import storage
from mimkd_ray.data.sources.hub_readme import README, declared_files
from mimkd_ray.data.sources.tars import tars_of_pattern
from mimkd_ray.errors import UserError, count, listed
from mimkd_ray.local_files import NOTHING

VAL_ALIASES = ("validation", "val", "valid", "test")
SPLIT_NAMES = {"train", "training", "testing", *VAL_ALIASES}  # folders of splits, and not of classes


class Split(NamedTuple):
    """One of the three: Parquet files, tars, or class folders in `folder`."""

    parquet: dict[str, storage.Entry]
    tars: dict[str, storage.Entry]
    folder: str = ""


class Splits:
    """The splits of a folder: `[data/]<split>-*.parquet`, `<split>/*.parquet` or `<split>/<class>/<image>`; Parquet
    files that its README.md names, as that of a Hugging Face data set; or tars, `<split>-*.tar` or `<split>/*.tar`. Of
    a pattern of tars all are any split."""

    def __init__(self, url: str) -> None:
        """List the folder, and `data` in it. Raises UserError for Parquet files and tars that are not all there."""
        self.url, self.is_pattern = url, url.endswith(".tar")
        self.listing = {} if self.is_pattern else _present(storage.list_entries(url, broken=True))
        self.tars = tars_of_pattern(url) if self.is_pattern else self._ending(".tar")
        self.parquet = self._ending(".parquet")
        dirs = [] if self.is_pattern else storage.list_dirs(url)
        self.dirs = {place.rpartition("/")[2]: place for place in dirs}
        declared = declared_files(url) if storage.join(url, README) in self.listing else {}
        self.declared = {split: _present(files) for split, files in declared.items()}
        if "data" in self.dirs:  # the folder used by the Hugging Face hub
            self.parquet |= _list(self.dirs["data"], ".parquet")

    def _ending(self, suffix: str) -> dict[str, storage.Entry]:
        names = {file: file.rpartition("/")[2] for file in self.listing}
        return {file: self.listing[file] for file, name in names.items() if name.endswith(suffix) and name[0] != "."}

    def find(self, split: str) -> Split | None:
        """Return the split, or None if it is not here. A folder of it counts before tars beside it."""
        if self.is_pattern:
            return Split({}, self.tars)
        parquet = _of_split(self.parquet, split) or self.declared.get(split, {})
        if not parquet and split in self.dirs:
            folder = self.dirs[split]
            parquet = _list(folder, ".parquet")
            tars = _list(folder, ".tar") if not parquet else {}
            if tars and not storage.list_dirs(folder):
                return Split({}, tars)
            if not parquet:
                return Split({}, {}, folder)
        if parquet:
            return Split(parquet, {})
        tars = _of_split(self.tars, split)
        return Split({}, tars) if tars else None

    def found(self) -> str:
        """Return the names of what is here, for errors."""
        names = [f"{split} (in {README})" for split in self.declared]
        files = self.listing | self.parquet | self.tars
        names += [url.rpartition("/")[2] for url in files] + [f"{name}/" for name in self.dirs]
        return listed(names, 8)


def _list(folder: str, suffix: str) -> dict[str, storage.Entry]:
    return _present(storage.list_entries(folder, suffix, broken=True))


def _present(files: dict[str, storage.Entry]) -> dict[str, storage.Entry]:
    """Return the files without links to nothing. Raises UserError if one of those is a part of a set, as those of the
    cache of the Hugging Face hub are from which files were removed: its rows would be missing without a word."""
    links = [url for url, entry in files.items() if entry.size == NOTHING]
    parts = [url for url in links if url.endswith((".parquet", ".tar")) and "/." not in url[url.rfind("/") :]]
    if parts:
        raise UserError(
            f"{parts[0]} is a link that leads to nothing ({count(len(parts), 'such file')}): bring what it led to, or "
            "remove the link to do without its images"
        )
    return {url: entry for url, entry in files.items() if entry.size != NOTHING}


def is_of_split(url: str, split: str) -> bool:
    """Return whether a file's name begins with that of the split."""
    return url.rpartition("/")[2].startswith((f"{split}-", f"{split}."))


def _of_split(files: dict[str, storage.Entry], split: str) -> dict[str, storage.Entry]:
    """Return the files of a split: those whose names begin with it, or else those that have it as a word and begin with
    no other split, such as `imagenet1k-train-0000.tar`."""
    begins = {url: entry for url, entry in files.items() if is_of_split(url, split)}
    words = {url: re.split(r"[-_.]", url.rpartition("/")[2]) for url in files}
    others = SPLIT_NAMES - {split}
    return begins or {url: files[url] for url, found in words.items() if split in found and found[0] not in others}
