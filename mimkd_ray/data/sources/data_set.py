"""The training and validation set of a configuration."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from mimkd_ray import storage
from mimkd_ray.config import DataConfig
from mimkd_ray.data.augment.decode import Decoding
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.augment.transforms import can_be_resident
from mimkd_ray.data.sources.digits import DigitsSource
from mimkd_ray.data.sources.folders import FolderSource, printable
from mimkd_ray.data.sources.own_dataset import SCHEME, OwnData, named_sets
from mimkd_ray.data.sources.parquet import ParquetSource
from mimkd_ray.data.sources.shard_manifest import MANIFEST_SUFFIX, read_manifest
from mimkd_ray.data.sources.source import Source, SubsetSource, digest_of, stratified_split
from mimkd_ray.data.sources.splits import SPLIT_NAMES, VAL_ALIASES, Split, Splits
from mimkd_ray.data.sources.tars import TarSource
from mimkd_ray.data.store.block_reader import CACHE_BYTES
from mimkd_ray.data.store.block_store import open_store
from mimkd_ray.errors import UserError
from mimkd_ray.places import is_function

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """An opened data set."""

    train: Source
    val: Source
    classes: tuple[str, ...]
    num_classes: int
    digest: str
    whole: Source
    """The rows of a teacher cache: the training rows together with those that `holdout` takes from them."""
    kept: np.ndarray | None = None
    """Positions of the training rows within `whole`, sorted; None: all of it."""
    judged: bool = True
    """Whether held-out rows have labels."""
    own: OwnData | None = None
    """The data sets that were passed as objects, for opening them again."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all classes; those without one, such as in a set without labels, have their number."""
        return self.classes + tuple(map(str, range(len(self.classes), self.num_classes)))

    @property
    def are_arrays(self) -> bool:
        """Whether images come decoded, so that they have no tags."""
        return self.own is not None or self.whole.in_memory


def open_data(config: DataConfig, own: OwnData | None = None, for_training: bool = True, others: bool = False) -> Data:
    """Open both splits: reads listings and Parquet footers only (with `holdout` or `subset` also the labels).

    `own` data sets take the place of `config.root`, as do those of the function that it names. Class folders without
    splits are the training set of a `holdout`, unless the data is `others` than the run's. Not `for_training`: the
    training split may be missing, and is then empty; class folders without splits are then the validation set.
    Raises UserError for a missing place or split, or for labels beyond the classes.
    """
    if config.resident == "on" and not can_be_resident(make_pipeline(config.pipeline, config.image_size).train):
        raise UserError(
            f"data.resident is on, and pipeline '{config.pipeline}' draws random numbers for each image, which is "
            "decoded anew for each view: pass --data.resident off, or a pipeline such as cifar"
        )
    if own is None and is_function(config.root):
        own = named_sets(config.root)
    root = own or (_Digits() if config.root == "digits" else _Root(config))
    train, val_alone = root.open(config.train_split, None), None
    may_deal = config.holdout > 0 and config.train_split == "train" and not others
    if train is None and may_deal and isinstance(root, _Root):
        train = root.class_folders()
    if train is None and not for_training:
        val_alone = _open_val(config, root, None)
        train = SubsetSource(val_alone, ())
        config = replace(config, holdout=0.0, subset=0)
    if train is None:
        raise UserError(
            f"{config.root} has no training split '{config.train_split}': expected "
            f"{config.train_split}-*.parquet or class folders {config.train_split}/<class>/<image>; found "
            f"{root.found()}; name it with --data.train-split, or, where these are the folders of the classes, take "
            "--data.holdout 0.1 (a tenth of the images to validate on)"
        )
    classes, whole, kept = train.classes, train, None
    num_classes = config.num_classes or len(classes)
    if config.labels != "none" and train.num_rows:
        _check_labels(config, "training", train, num_classes)
    if config.holdout > 0:
        if own is not None and own.validation is not None:
            raise UserError(
                f"data.holdout is {config.holdout}, and a validation set was given: leave out one of the two"
            )
        rest, held = stratified_split(train.labels(), float(config.holdout), config.split_seed)
        if not len(held) or not len(rest):
            raise UserError(
                f"data.holdout = {config.holdout} of {train.num_rows:,} training rows leaves {len(rest):,} "
                f"to train on and {len(held):,} to validate on; change the share"
            )
        val: Source = SubsetSource(train, held)
        train, kept = SubsetSource(train, rest), rest
        if config.labels != "all":
            val = _labelled(config, val, num_classes)
    else:
        val = _labelled(config, val_alone or _open_val(config, root, train), num_classes)
        classes = classes or val.classes
        num_classes = num_classes or len(classes)
    if config.subset:
        if config.subset > train.num_rows:
            raise UserError(f"data.subset = {config.subset:,}, but there are {train.num_rows:,} training rows")
        train = SubsetSource(train, stratified_split(train.labels(), config.subset, config.subset_seed)[1])
        whole, kept = train, None
    judged = config.labels == "all" or bool(_known(config, val.labels(), num_classes).any())
    if judged:
        _check_labels(config, "validation", val, num_classes)
    if not num_classes:
        raise UserError(
            f"{config.root} has no labels, and so no number of classes: pass --data.num-classes, the width of the "
            "student's head (for KD that of the teacher, else any)"
        )
    _warn_of_slow_order(config, train)
    digest = digest_of("data", train.digest, val.digest, num_classes)  # of all held-out rows: `val_rows` may change
    if config.val_rows and config.val_rows < val.num_rows:
        val = SubsetSource(val, stratified_split(val.labels(), config.val_rows, config.split_seed)[1])
    names = tuple(map(printable, classes))  # folders may have any bytes, and Arrow takes UTF-8 alone
    return Data(train, val, names, num_classes, digest, whole, kept, judged, own)


def _known(config: DataConfig, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return which rows have a label. With `data.labels` none, whose labels nobody asked for, what is beyond the
    classes is none."""
    beyond = config.labels == "none" and num_classes > 0
    return (labels >= 0) & ((labels < num_classes) | (not beyond))


def _labelled(config: DataConfig, val: Source, num_classes: int) -> Source:
    """Return the rows of a validation set that have a label, with a line where some have none; all of it if none has,
    which is refused unless `data.labels` says so."""
    negative = val.label_range()[0] < 0
    if not negative and config.labels != "none":
        return val
    labels = val.labels()
    kept = np.flatnonzero(_known(config, labels, num_classes))
    if not len(kept) or (len(kept) == len(labels) and not negative):
        return val
    if len(kept) < len(labels):  # the range of a part is that of the whole
        logger.warning(
            "%s: %d of %d validation rows have no label (null, negative, or beyond the classes): they are left out of "
            "every evaluation",
            config.root,
            val.num_rows - len(kept),
            val.num_rows,
        )
    return SubsetSource(val, kept)


def _check_labels(config: DataConfig, role: str, source: Source, num_classes: int) -> None:
    low, high = source.label_range()
    if isinstance(source, SubsetSource):  # whose range is that of the rows that were left out, too
        labels = source.labels()
        low, high = int(labels.min()), int(labels.max())
    if low < 0 and role == "training" and config.labels == "partial":
        labels = source.labels()
        logger.warning("%s: %d of %d training rows have a label", config.root, (labels >= 0).sum(), len(labels))
        low = 0
    if low < 0:
        raise UserError(
            f"{config.root}: the {role} set has labels down to {low}, as sets with hidden labels have; "
            "choose another split with --data.val-split or --data.train-split, or train without labels "
            "(--data.labels partial, or none)"
        )
    if high >= num_classes:
        raise UserError(
            f"{config.root}: the {role} set has labels up to {high:,}, but there are {num_classes:,} "
            f"classes; set --data.num-classes {high + 1} or more, or leave it 0"
        )


def decoding_of(config: DataConfig) -> Decoding:
    """Return how the images of a data set are decoded."""
    return Decoding(config.max_pixels, config.exif == "apply")


def _warn_of_slow_order(config: DataConfig, train: Source) -> None:
    """Log a warning if the blocks that the order uses at a time do not fit into the store or memory."""
    if not train.block_bytes:
        return  # rows are read one by one in place
    room, place, remedy = (
        (int(config.store_gb * 1e9), "the block store holds", "make the store larger with --data.store-gb")
        if train.store
        else (CACHE_BYTES, "a process keeps", "use a block store with --data.store-gb")
    )
    blocks = min(config.window_blocks or train.blocks.num_blocks, train.blocks.num_blocks)
    if blocks * train.block_bytes > room:
        logger.warning(
            "%s: data.window = %s has %d blocks of %.1f MB in use at a time, %.0f MB in all (with a window: for each "
            "lane on a node), and %s %.0f MB: most reads will cost a whole block; %s, set --data.window below %d, or "
            "prepare the set (mimkd-ray prepare), whose blocks have 256 images",
            config.root,
            config.window,
            blocks,
            train.block_bytes / 1e6,
            blocks * train.block_bytes / 1e6,
            place,
            room / 1e6,
            remedy,
            max(2, room // train.block_bytes),
        )


def _open_val(config: DataConfig, root: _Root | _Digits | OwnData, train: Source | None) -> Source:
    """The validation split; without a training split (`train` is None) also the class folders of the root."""
    if train is not None and config.val_split == config.train_split:
        return train
    names = VAL_ALIASES if config.val_split == "auto" else (config.val_split,)
    for name in names:
        val = root.open(name, train.classes if train is not None else None)
        if val is not None:
            return val
    alone = root.class_folders() if train is None and config.val_split == "auto" and isinstance(root, _Root) else None
    if alone is not None:
        return alone
    raise UserError(
        f"{config.root} has no validation split ({', '.join(names)}); found {root.found()}; name it with "
        "--data.val-split, or use --data.holdout 0.1 (a tenth of the training rows), or --data.val-split "
        f"{config.train_split} (the training rows themselves: only to try things out)"
    )


class _Digits:
    def open(self, split: str, classes: tuple[str, ...] | None) -> Source | None:
        role = "val" if split in VAL_ALIASES else split
        return DigitsSource(role) if role in ("train", "val") else None

    def found(self) -> str:
        return "train, val"


class _Root:
    """A folder with splits (splits.py), or a pattern of tars, which are those of the training split.

    A split with a `<split>.manifest.json` is a prepared one.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config, url = config, config.root
        if url.startswith(SCHEME):
            raise UserError(
                f"data.root {url} stands for data sets that were given to mimkd_ray.run(config, train=..., "
                "validation=...): give them again, or to `export` and `evaluate` a set on disk, --data.root"
            )
        self.url, self.splits = url, Splits(url)
        self.store, self.how = open_store(config), decoding_of(config)
        self.labelled = config.labels == "all"
        if not self.splits.parquet and not self.splits.dirs and not self.splits.tars:
            if not storage.exists(url):
                raise UserError(f"data.root {url} does not exist; give 'digits', a folder or a URL such as s3://...")
            raise UserError(
                f"data.root {url} holds neither Parquet files nor folders nor tars; give the folder of the splits"
            )

    def open(self, split: str, classes: tuple[str, ...] | None) -> Source | None:
        """Return the split, or None if it is not here. `classes` are those of the training set, if known."""
        if self.splits.is_pattern and split != self.config.train_split:
            return None
        prepared = storage.join(self.url, split + MANIFEST_SUFFIX) in self.splits.listing
        found = self.splits.find(split) or (Split({}, {}) if prepared else None)  # the manifest says what is missing
        if found is None:
            return None
        if found.folder:
            return FolderSource(found.folder, classes or None, self.store, self.how, self.labelled)
        if found.tars and not prepared:
            return TarSource(found.tars, classes or None, self.store, self.how, self.labelled)
        source = ParquetSource(
            {url: entry.size for url, entry in found.parquet.items()},
            manifest=read_manifest(self.url, split) if prepared else None,
            versions={url: entry.version for url, entry in found.parquet.items()},
            store=self.store,
            how=self.how,
            image_column=self.config.image_column,
            label_column=self.config.label_column,
            classes=classes or None,
            labelled=self.labelled,
        )
        others = next((columns for columns in source.columns if not columns.usual), None)
        if others is not None and not (self.config.image_column and self.config.label_column):
            logger.warning(
                "%s: split '%s' has its images in column '%s' and its labels in '%s'%s (--data.image-column and "
                "--data.label-column name others)",
                self.url,
                split,
                others.image,
                others.label or "(none)",
                ", which are text" if others.text else "",
            )
        sides = [names for names in (classes, source.classes) if names]
        numbered = any(names == tuple(map(str, range(len(names)))) for names in sides)
        if classes and source.classes not in ((), classes) and not numbered:
            first = next((p for p in zip(classes, source.classes, strict=False) if p[0] != p[1]), None)
            raise UserError(
                f"{self.url}: split '{split}' names {len(source.classes)} classes and the training split "
                f"{len(classes)}"
                + (f", the first difference is '{first[1]}' for '{first[0]}'" if first else "")
                + "; the labels of both must mean the same"
            )
        return source

    def class_folders(self) -> Source | None:
        """Return the class folders of a root without splits, or None if it has splits or no folders."""
        splits = self.splits
        if not splits.dirs or splits.parquet or splits.tars or any(name.lower() in SPLIT_NAMES for name in splits.dirs):
            return None
        return FolderSource(self.url, None, self.store, self.how, self.labelled)

    def found(self) -> str:
        return self.splits.found()
