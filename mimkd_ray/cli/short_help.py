"""The page of --help: the fields that people change. --help-all has all of them."""

from __future__ import annotations

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


def short_help(config: Any, head: str) -> str:
    """Return the page for a recipe's config, with its values."""
    rows = []
    for name, words in FIELDS.items():
        section, _, field = name.partition(".")
        if hasattr(config, section):
            flag = "--" + name.replace("_", "-")
            rows.append(f"  {flag:<18} {words} ({getattr(getattr(config, section), field)!r})")
    lines = (
        *(head, "", "Fields that people change, with the recipe's values:", *rows, ""),
        "--print-config prints them all, --config FILE reads them back (JSON, YAML or TOML);",
        "--verbose shows what Ray prints; --help-all lists all fields with types, defaults and meaning.",
    )
    return "\n".join(lines)
