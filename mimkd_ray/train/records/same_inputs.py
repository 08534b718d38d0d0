"""What a run goes on with is what it began with: labels (labels.json) and the teacher's weights (teacher.json).

A file that was replaced by one of the same size is found. Labels only of Parquet files that were not prepared: the
digests of all other sets cover theirs. A file is read again only if it has been written since.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import TeacherConfig
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.data.sources.parquet import FOOTER_THREADS, ParquetSource
from mimkd_ray.data.sources.source import Source, SubsetSource
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_if_sound
from mimkd_ray.models.weights_file import shown
from mimkd_ray.train.networks.teacher import check_accuracy
from mimkd_ray.train.records.run_dir import write_json

LABELS = "labels.json"


def check_same_labels(data: Data, run_dir: str) -> None:
    """Raise UserError if labels are others than those that the run began with, and note them. For one process alone."""
    url = storage.join(run_dir, LABELS)
    known = read_if_sound(url, instead="labels are not compared with those of the first start") or {}
    now = digests(data.train, known) | digests(data.val, known)
    changed = [file for file, found in now.items() if file in known and known[file]["labels"] != found["labels"]]
    if changed:
        raise UserError(
            f"{run_dir} was begun with other labels in {', '.join(changed[:3])} ({len(changed)} of {len(now)} files): "
            "put the old files back, or pass another --run.name, or --run.overwrite true to start anew"
        )
    if now != known:
        write_json(url, now)


def check_same_teacher(teacher: TeacherConfig, digest: str, classes: int, run_dir: str) -> None:
    """Raise UserError if the run has trained with a teacher of other weights: it has if those had been accepted.
    ``classes``: among which its top-1 is. For one process alone."""
    known = read_if_sound(storage.join(run_dir, "teacher.json"), ("sha256", "top1", "rows"), "it is written anew")
    if known is None or known["sha256"] == digest:
        return
    if known["top1"] is not None:
        try:
            check_accuracy(teacher, known["top1"], known["rows"], classes)
        except UserError:
            return
    raise UserError(
        f"{run_dir} was begun with a teacher of other weights (sha256 {known['sha256'][:12]}..., now {digest[:12]}...) "
        f"from {shown(teacher.weights)}: put the old file back, or pass another --run.name, or --run.overwrite true to "
        "start anew"
    )


def digests(source: Source, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {file: how it is seen to be the same file, and the sha256 of its labels}, from `known` where it is."""
    while isinstance(source, SubsetSource):
        source = source.parent
    if not isinstance(source, ParquetSource) or source.prepared:
        return {}

    def of(number: int) -> tuple[str, dict[str, Any]]:
        url, size = source.files[number]
        name, seen = url.rpartition("/")[2], [size, *_status(url, source.versions[number])]
        there = known.get(name)
        if isinstance(there, dict) and there.get("seen") == seen and "labels" in there:
            return name, there
        return name, {"seen": seen, "labels": hashlib.sha256(source.file_labels(number).tobytes()).hexdigest()}

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return dict(pool.map(of, range(len(source.files))))


def _status(url: str, version: str) -> list[Any]:
    """What changes when a file is written: a local one cannot hide the time of its last change."""
    if storage.is_remote(url):
        return [version]
    status = os.stat(storage.local_path(url))
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
