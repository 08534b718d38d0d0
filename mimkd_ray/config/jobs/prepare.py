"""The fields of a data preparation."""

from __future__ import annotations

from dataclasses import dataclass

from mimkd_ray import storage
from mimkd_ray.config.data import MOST_PIXELS
from mimkd_ray.config.form.values import FROM_0, FROM_1, check_values
from mimkd_ray.errors import UserError
from mimkd_ray.places import check_name
from mimkd_ray.secret_urls import hide


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The images of a prepared set, and the form in which they are written."""

    source: str
    """Folder or URL with the split: <split>-*.parquet or data/<split>-*.parquet (Hugging Face), class folders
    <split>/<class>/<image>, the official ImageNet archives (ILSVRC2012_img_train.tar, ...), or WebDataset tars
    <split>-*.tar; also a pattern such as s3://bucket/shards-{000..099}.tar, whose tars are those of the split."""
    target: str
    """Folder or URL of the prepared set; several splits can share one."""
    split: str = "train"
    """Name of the split, there and here."""
    image_column: str = ""
    """Parquet column of the images, where it cannot be told from names and types."""
    label_column: str = ""
    """Parquet column of the labels, likewise."""
    seed: int = 0
    """Seed of the shuffle."""
    block_rows: int = 256
    """Images in a block, the unit of reading."""
    shard_rows: int = 0
    """Images in a file, a multiple of block-rows; 0 = about 256 MB."""
    short_side: int = 0
    """Shrink images to this short side in pixels, upright by their orientation tags, and encode them as JPEG; 0 = keep
    every file as it is. Images that are not larger are kept as they are."""
    quality: int = 90
    """JPEG quality of images that are shrunk."""
    max_pixels: int = 50_000_000
    """Images that declare more pixels than this are left out as damaged, and are not decoded."""

    def __post_init__(self) -> None:
        check_values(self, short_side=FROM_0, block_rows=FROM_1, shard_rows=FROM_0)
        hide(self, "source", "target")
        if not self.source or not self.target:
            raise UserError("--source and --target are needed: a folder or a URL such as s3://bucket/imagenet")
        check_name("--split", self.split)
        if self.split.startswith("."):
            raise UserError(f"--split '{self.split}' is no name; give train, validation or the like")
        if self.shard_rows % self.block_rows:
            near = max(1, self.shard_rows // self.block_rows) * self.block_rows
            raise UserError(
                f"--shard-rows {self.shard_rows} is no multiple of --block-rows {self.block_rows}; {near} is"
            )
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise UserError(f"--max-pixels {self.max_pixels:,}: give 1 to {MOST_PIXELS:,}, which Pillow decodes")
        if not 1 <= self.quality <= 95:
            raise UserError(f"--quality {self.quality}: JPEG quality goes from 1 to 95")
        if f"{storage.absolute(self.target)}/".startswith(f"{storage.absolute(self.source)}/"):
            raise UserError(f"--target {self.target} lies in --source {self.source}; give a place outside it")
