"""A whole run on a Dataset of your own: its lanes, views, checkpoints and report, without files of images.

python examples/own_dataset.py [FOLDER OF RUNS]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, Subset

import mimkd_ray


class Digits(Dataset):
    """(Pillow image, label). Augmentation and normalisation are the config's."""

    def __init__(self) -> None:
        digits = load_digits()
        self.images, self.targets = (digits.images * 255 / 16).astype("uint8"), digits.target

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[row]), int(self.targets[row])


def main(root: str, epochs: int = 12) -> dict[str, Any]:
    """Train a teacher and a student in ``root``, or go on where they were. Returns what result.json says."""
    recipe = mimkd_ray.demo()
    config = replace(
        recipe,
        recipe="own_dataset",
        data=replace(recipe.data, subset=0),
        teacher=replace(recipe.teacher, epochs=epochs),
        train=replace(recipe.train, epochs=epochs),
        compare=mimkd_ray.CompareConfig(),
        run=replace(recipe.run, root=root),
        launch=mimkd_ray.LaunchConfig(backend="local"),
    )
    digits = Digits()
    return mimkd_ray.run(config, train=Subset(digits, range(1400)), validation=Subset(digits, range(1400, len(digits))))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs")
