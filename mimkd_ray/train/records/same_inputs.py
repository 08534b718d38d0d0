"""What a run goes on with is what it began with: labels (labels.json), the teacher's weights (teacher.json), and those
that the students of a comparison or a search start from (student.json).

A file that was replaced by one of the same size is found. Labels only of Parquet files that were not prepared: the
digests of all other sets cover theirs. A file is read again only if it has been written since.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import ModelConfig, TeacherConfig
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.data.sources.parquet import FOOTER_THREADS, ParquetSource
from mimkd_ray.data.sources.source import Source, SubsetSource
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import NUMBER, read_if_sound
from mimkd_ray.models.weights_file import file_digest, shown
from mimkd_ray.train.networks.teacher_check import check_accuracy
from mimkd_ray.train.records.run_dir import write_json

LABELS, STUDENT = "labels.json", "student.json"


def check_same_labels(data: Data, run_dir: str, names: str = "") -> str:
    """Raise UserError if labels are others than those that the run began with, and note them. Return their digest; ""
    where that of the data covers them. ``names``: a file with names of classes, which say what labels mean. For one
    process alone."""
    url = storage.join(run_dir, LABELS)
    known = read_if_sound(url, instead="labels are not compared with those of the first start") or {}
    now = digests((data.train, data.val), known)
    if names:
        now[names] = {"labels": hashlib.sha256(storage.read_bytes(names)).hexdigest()}
    changed = [file for file, found in now.items() if file in known and known[file]["labels"] != found["labels"]]
    if changed:
        raise UserError(
            f"{run_dir} was begun with other labels in {', '.join(changed[:3])} ({len(changed)} of {len(now)} files): "
            "put the old files back, or pass another --run.name, or --run.overwrite true to start anew"
        )
    if now != known:
        write_json(url, now)
    labels = json.dumps({file: found["labels"] for file, found in now.items()}, sort_keys=True)
    return hashlib.sha256(labels.encode()).hexdigest()[:16] if now else ""


def check_same_student(student: ModelConfig, run_dir: str) -> None:
    """Raise UserError if the file that all runs below a directory start from is another one than for those so far. For
    one process alone."""
    if student.weights in ("random", "published"):
        return
    url, now = (
        storage.join(run_dir, STUDENT),
        {"weights": shown(student.weights), "sha256": file_digest(student.weights)},
    )
    known = read_if_sound(url, {"sha256": str}, "it is written anew")
    if known is None:
        write_json(url, now)
    elif known["sha256"] != now["sha256"]:
        raise UserError(_other("student", known["sha256"], now["sha256"], student.weights, run_dir))


def check_same_teacher(teacher: TeacherConfig, weights: str, digest: str, classes: int, run_dir: str) -> None:
    """Raise UserError if the run has trained with a teacher of other weights: it has if those had been accepted.
    ``weights``: its file; ``classes``: among which its top-1 is. For one process alone."""
    url = storage.join(run_dir, "teacher.json")
    known = read_if_sound(url, {"sha256": str, "top1": (*NUMBER, type(None)), "rows": int}, "it is written anew")
    if known is None or known["sha256"] == digest:
        return
    if known["top1"] is not None:
        try:
            check_accuracy(teacher, known["top1"], known["rows"], classes)
        except UserError:
            return
    raise UserError(_other("teacher", known["sha256"], digest, weights, run_dir))


def _other(what: str, old: str, new: str, weights: str, run_dir: str) -> str:
    return (
        f"{run_dir} was begun with a {what} of other weights (sha256 {old[:12]}..., now {new[:12]}...) from "
        f"{shown(weights)}: put the old file back, or pass another --run.name, or --run.overwrite true to start anew"
    )


def digests(sources: Iterable[Source], known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {file: how it is seen to be the same file, and the sha256 of its labels}, from `known` where it is. Files
    go by their paths below the folder that holds them all: those of two splits may have one name."""
    files: dict[str, tuple[ParquetSource, int]] = {}
    for source in sources:
        while isinstance(source, SubsetSource):
            source = source.parent
        if isinstance(source, ParquetSource) and not source.prepared:
            files |= {url: (source, number) for number, (url, _) in enumerate(source.files)}
    # Not commonpath, which makes s3:/ of s3://.
    folder = os.path.commonprefix([url.rpartition("/")[0] + "/" for url in files]).rpartition("/")[0]  # noqa: RUF071

    def of(url: str) -> tuple[str, dict[str, Any]]:
        source, number = files[url]
        name, seen = url[len(folder) + 1 :], [source.files[number][1], *_status(url, source.versions[number])]
        there = known.get(name)
        if isinstance(there, dict) and there.get("seen") == seen and "labels" in there:
            return name, there
        return name, {"seen": seen, "labels": hashlib.sha256(source.file_labels(number).tobytes()).hexdigest()}

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return dict(pool.map(of, files))


def _status(url: str, version: str) -> list[Any]:
    """What changes when a file is written: a local one cannot hide the time of its last change."""
    if storage.is_remote(url):
        return [version]
    status = os.stat(storage.local_path(url))
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
