"""The page of --help: the fields that people change. --help-all has all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = {
    "data.root": "digits, or a folder or URL of Parquet files or class folders",
    "teacher.name": "torchvision name, cifar/NAME, timm/NAME, hf-hub:ORG/NAME or package.module:function",
    "teacher.weights": "published, a file or URL; or train it first with --teacher.train true",
    "student.name": "as teacher.name",
    "loss.preset": "accuracy, best (with Hinton's KD), two_sided or paper",
    "train.epochs": "passes over the training images",
    "train.lane_batch": "images in a lane; the batch is train.lanes of them",
    "optim.lr": "peak learning rate, for the whole batch",
    "cache.root": "folder or URL of a cache of the teacher's features (jobs/cache_teacher.py)",
    "run.root": "folder or URL of the run directories",
    "launch.backend": "ray, or local: this process, or torchrun's",
    "launch.workers": "training workers under Ray; 0: one per GPU",
    "search.space": "what to search: names of docs/search.md, or package.module:function",
    "search.algorithm": "tpe, random, grid, hyperopt, ax, bohb or package.module:function",
    "search.scheduler": "asha, hyperband, median, pbt, pb2 or none",
    "search.metric": "top1, cross_entropy, or without labels knn; of held-out training images",
    "search.epochs": "epochs of a trial; 0: as many as the recipe has",
    "search.trials": "configurations to try",
    "search.hours": "hours after which no trial begins",
}
"""Field to what it is, in a few words."""


OF_EVALUATION = {
    "eval.network": "student, best (at its best held-out accuracy) or teacher",
    "data.root": "what to evaluate on, as for training; ImageNet-A, -R, -V2 and Sketch as class folders",
    "data.val_split": "which split of it; auto: its validation split",
    "student.name": "without RUN: the network, named as in training",
    "student.weights": "without RUN: published, a file or URL",
    "eval.rows": "images to evaluate on, evenly spaced; 0: all",
    "eval.train_rows": "training images that k-NN and the linear probe learn from; 0: neither",
    "eval.corruptions": "measure top-1 under corruptions too: 35 passes",
    "eval.classes": "file with the names of the network's classes, where it is not the run's",
    "eval.real": "file with the labels of ImageNet-ReaL",
    "eval.out": "folder or URL for what is written; unset: RUN",
    "launch.backend": "local: this process, or torchrun's; or ray",
    "launch.workers": "workers under Ray; 0: one per GPU",
}
"""The same of `evaluate`."""

PRINTING = "--print-config prints the whole config, --config FILE reads it back (JSON, YAML or TOML);"


def short_help(config: Any, head: str, fields: Mapping[str, str] = FIELDS, more: str = PRINTING) -> str:
    """Return the page with those of the fields that a config has, and their values. ``head``: how the command is
    called; ``more``: a line about other flags."""
    rows = []
    for name, words in fields.items():
        section, _, field = name.partition(".")
        if hasattr(config, section):
            flag = "--" + name.replace("_", "-")
            rows.append(f"  {flag:<18} {words} ({getattr(getattr(config, section), field)!r})")
    lines = (
        *(head, "", "Fields that people change, with their values:", *rows, "", *filter(None, [more])),
        "--verbose shows what Ray prints; --help-all lists all fields with types, defaults and meaning.",
    )
    return "\n".join(lines)
