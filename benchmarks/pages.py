"""Seconds and size of report.html, and seconds of the documentation site.

The report is of a run on 1,000 classes at 224 px that was evaluated: 24 thumbnails of held-out images, a table of all
classes. The site is what `make docs` builds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from image_set import DISTINCT, SIZE, photograph
from report import Targets, finish, parser

from mimkd_ray.cli import evaluate, training
from mimkd_ray.config import Config, DataConfig, LaunchConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from mimkd_ray.pages.write_pages import write_report

CLASSES, ROUNDS = 1000, 5
TARGETS: Targets = {"report_seconds": ("<=", 10), "report_megabytes": ("<=", 4), "docs_seconds": ("<=", 60)}


def image_folders(root: Path) -> None:
    """Write class folders with an image each to train on and to hold out."""
    pictures = [photograph(seed) for seed in range(DISTINCT)]
    for number in range(CLASSES):
        for split in ("train", "val"):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            (folder / "0.jpg").write_bytes(pictures[number % DISTINCT])


def evaluated_run(root: Path) -> str:
    """Train a student for a step, evaluate it, return its folder. Not channels last: torch 2.15's backward pass of this
    network crashes so at 224 px."""
    image_folders(root / "set")
    config = Config(
        recipe="pages",
        data=DataConfig(root=str(root / "set"), image_size=SIZE, subset=64, store_gb=0, pipeline="imagenet"),
        student=ModelConfig(name="cifar/resnet8_w4"),
        loss=LossConfig(name=()),
        train=TrainConfig(max_steps=1, lane_batch=8, information_rows=0, channels_last="off"),
        launch=LaunchConfig(backend="local"),
        run=RunConfig(root=str(root), name="run", tensorboard=False),
    )
    training.run(config)
    if evaluate.main([str(root / "run"), "--eval.train-rows", "0"], "evaluate"):
        raise SystemExit("the run was not evaluated")
    return str(root / "run")


def main() -> int:
    args = parser(__doc__).parse_args()
    seconds, root = [], Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = evaluated_run(Path(folder))
        for _ in range(ROUNDS):
            began = time.perf_counter()
            page = Path(write_report(run_dir))
            seconds.append(time.perf_counter() - began)
        if page.read_text().count("<img ") != 24:
            raise SystemExit("the page does not have its 24 images")
        began = time.perf_counter()
        build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "-d", str(Path(folder) / "site")]
        subprocess.run(build, check=True, cwd=root, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
        figures = {
            "report_seconds": statistics.median(seconds),
            "report_megabytes": page.stat().st_size / 1e6,
            "docs_seconds": time.perf_counter() - began,
        }
    return finish("pages", figures, TARGETS, args.json)


if __name__ == "__main__":
    sys.exit(main())
