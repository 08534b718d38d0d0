"""Section `data`: the images, their order and their augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mimkd_ray.config.form.pipeline_name import check_pipeline_name
from mimkd_ray.config.form.values import FROM_0, LARGEST, check_values
from mimkd_ray.errors import UserError
from mimkd_ray.secret_urls import hide

MOST_CLASSES = 1_000_000
"""Beyond them a head of 512 inputs takes 2 GB, and a label is more likely to be something else."""
LARGEST_SIDE = 8192
"""Of what the networks see: an image of it has 201 MB."""
MOST_PIXELS = 178_956_970
"""Twice Pillow's MAX_IMAGE_PIXELS: what declares more is refused by Pillow itself."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, their order and their augmentation."""

    root: str = "digits"
    """`digits` (built in), a local folder, or an fsspec URL, holding Parquet files, class folders or WebDataset tars;
    a pattern of tars, shards-{000..099}.tar; or package.module:function, which returns (training set,
    validation set), two map-style Datasets."""
    train_split: str = "train"
    """Name of the training split: `train-*.parquet`, or a folder `train/`."""
    val_split: str = "auto"
    """Name of the validation split; `auto` is the first of validation, val, valid, test that exists."""
    holdout: float = 0.0
    """Share of the training rows, of each class, that is used as validation set instead of `val_split`."""
    subset: int = 0
    """Train on this many rows, equally many of each class, drawn after the holdout; 0 = all. A teacher that is trained
    first has all."""
    val_rows: int = 0
    """Evaluate on this many of the held-out rows, equally many of each class, the same at every evaluation; 0 = all."""
    split_seed: int = 0
    """Seed of `holdout` and `val_rows`."""
    subset_seed: int = 0
    """Seed of `subset`; apart from `split_seed`, so that several subsets share one held-out set."""
    image_column: str = ""
    """Parquet column of the images; unset: `image` or another usual name, else the only one of that type."""
    label_column: str = ""
    """Parquet column of the labels, integers or text; unset: `label` or another usual name."""
    labels: Literal["all", "partial", "none"] = "all"
    """Which training images have a label: all; partial: those without one (null or negative) have no part in the
    cross-entropy; none: labels that are there are for evaluation alone, and there need not be any."""
    num_classes: int = 0
    """Number of classes, and the width of the student's head; 0 = taken from the data."""
    pipeline: str = "digits"
    """Augmentation: imagenet, imagenet_ta, imagenet_ra, cifar, cifar_ta, digits, none, or package.module:function."""
    image_size: int = 8
    """Height and width of the networks' input, in pixels."""
    mean: tuple[float, float, float] = (0.305, 0.305, 0.305)
    """Mean of each colour channel, of values in 0..1."""
    std: tuple[float, float, float] = (0.376, 0.376, 0.376)
    """Standard deviation of each colour channel, of values in 0..1."""
    views: int = 0
    """Distinct augmented views of each image; 0 = a new one every epoch."""
    view_seed: int = -1
    """Seed of the views; -1: train.seed. Runs with different seeds can share one cache if this is the same."""
    window: int | Literal["full"] = "full"
    """Shuffle rows inside this many blocks (row groups); `full` = one permutation of all rows."""
    store: str = ""
    """Folder on each node in which blocks that were read are kept for all processes; unset: a folder of this user's
    among the machine's temporary files."""
    store_gb: float = 8.0
    """Size of the block store in GB; 0 = no store, every process reads and keeps its own row groups."""
    read_ahead: int = -1
    """Blocks per lane that are fetched into the store ahead of use, beyond those in use; -1 = one more window of
    blocks, as far as the store has room; 0 = none."""
    loader_workers: int = -1
    """Decoding processes per training worker; -1 = one less than its share of this machine's cores, at least one (none
    for a set in memory, such as the digits); 0 = decode in the training process."""
    resident: Literal["auto", "on", "off"] = "auto"
    """Keep decoded training and held-out images in the device's memory, without loader processes; for pipelines in
    which only the batch part draws random numbers (cifar, digits, none). auto: on a GPU, if the training set takes at
    most an eighth of its memory."""
    max_damaged: float = 0.001
    """Share of images that may be damaged before the run stops; of a small set five, unless it is 0."""
    max_pixels: int = 50_000_000
    """Images that declare more pixels than this count as damaged, and are not decoded."""
    exif: Literal["apply", "ignore"] = "apply"
    """Turn photographs upright by their orientation tags, or leave them as the camera stored them (but for TIFF, which
    Pillow turns upright in any case)."""

    def __post_init__(self) -> None:
        counts = {"subset": FROM_0, "val_rows": FROM_0, "num_classes": (0, MOST_CLASSES), "views": FROM_0}
        automatic = {"loader_workers": (-1, 1024), "read_ahead": (-1, LARGEST)}
        others = {"image_size": (1, LARGEST_SIDE), "max_damaged": (0, 1), "store_gb": FROM_0}
        check_values(self, "data", **counts, **automatic, **others)
        hide(self, "root", "store")
        if not self.root:
            raise UserError("data.root is empty; give 'digits', a folder or a URL")
        if not 0 <= self.holdout < 1:
            raise UserError(f"data.holdout = {self.holdout}: give a share of at least 0 and below 1, such as 0.1")
        if self.window != "full" and not (isinstance(self.window, int) and self.window >= 1):
            raise UserError(
                f"data.window = {self.window}: give 'full' (one permutation of all rows) or 1 block or more"
            )
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise UserError(f"data.max_pixels = {self.max_pixels:,}: give 1 to {MOST_PIXELS:,}, which Pillow decodes")
        check_pipeline_name(self.pipeline)
        if not all(deviation > 0 for deviation in self.std):
            raise UserError(f"data.std = {self.std}: give positive deviations of values in 0..1")

    @property
    def window_blocks(self) -> int:
        """`window` in the form that `Order` takes: a number of blocks, or 0 for one permutation of all rows."""
        return 0 if self.window == "full" else self.window
