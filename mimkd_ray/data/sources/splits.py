"""Where a split of a data set is, in a folder or URL; found in the same way by training and by preparation."""

from __future__ import annotations

from typing import NamedTuple

from mimkd_ray import storage
from mimkd_ray.data.sources.hub_readme import README, declared_files
from mimkd_ray.data.sources.tars import tars_of_pattern
from mimkd_ray.errors import listed

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
        """List the folder, and `data` in it. Raises UserError for a pattern of tars that are not all there."""
        self.url, self.is_pattern = url, url.endswith(".tar")
        self.listing = {} if self.is_pattern else storage.list_entries(url)
        self.tars = tars_of_pattern(url) if self.is_pattern else self._ending(".tar")
        self.parquet = self._ending(".parquet")
        dirs = [] if self.is_pattern else storage.list_dirs(url)
        self.dirs = {place.rpartition("/")[2]: place for place in dirs}
        self.declared = declared_files(url) if storage.join(url, README) in self.listing else {}
        if "data" in self.dirs:  # the folder used by the Hugging Face hub
            self.parquet |= storage.list_entries(self.dirs["data"], ".parquet")

    def _ending(self, suffix: str) -> dict[str, storage.Entry]:
        return {file: entry for file, entry in self.listing.items() if file.endswith(suffix)}

    def find(self, split: str) -> Split | None:
        """Return the split, or None if it is not here. A folder of it counts before tars beside it."""
        if self.is_pattern:
            return Split({}, self.tars)
        parquet = {url: entry for url, entry in self.parquet.items() if is_of_split(url, split)}
        parquet = parquet or self.declared.get(split, {})
        if not parquet and split in self.dirs:
            folder = self.dirs[split]
            parquet = storage.list_entries(folder, ".parquet")
            tars = storage.list_entries(folder, ".tar") if not parquet else {}
            if tars and not storage.list_dirs(folder):
                return Split({}, tars)
            if not parquet:
                return Split({}, {}, folder)
        if parquet:
            return Split(parquet, {})
        tars = {url: entry for url, entry in self.tars.items() if is_of_split(url, split)}
        return Split({}, tars) if tars else None

    def found(self) -> str:
        """Return the names of what is here, for errors."""
        names = [f"{split} (in {README})" for split in self.declared]
        files = self.listing | self.parquet | self.tars
        names += [url.rpartition("/")[2] for url in files] + [f"{name}/" for name in self.dirs]
        return listed(names, 8)


def is_of_split(url: str, split: str) -> bool:
    """Return whether a file's name begins with that of the split."""
    return url.rpartition("/")[2].startswith((f"{split}-", f"{split}."))
