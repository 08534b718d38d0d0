"""The files that a run or a search writes below its directory, and their removal before it is begun anew.

Whoever writes another file there adds it to this list: what is not on it is somebody else's, and stays.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

from mimkd_ray import storage
from mimkd_ray.errors import UserError, listed
from mimkd_ray.losses.methods.registry import Method

MARKER = "config.json"
"""Written first. A directory with another one, or with files and without one, is none of ours."""

OF_A_RUN = (
    *(MARKER, "metrics.jsonl", "samples.jsonl", "teacher.json", "result.json", "student.safetensors"),
    *("best.json", "best.safetensors", "stopped.json", "failed.json", "stop.json", "error.json", "ray.log"),
    *("evaluation.lock.json", "evaluation.json", "predictions.parquet", "report.html"),
    *("lock.json", "labels.json", "student.json", "loggers.json"),
)
OF_AN_EXPORT = (
    *("model.safetensors", "config.json", "README.md", "export.json", "training_config.json"),
    *("student.onnx", "student.pt2", "student.pte", "student_int8.onnx", "student_int8.pt2"),
    "student.mlpackage/Manifest.json",
    "student.mlpackage/Data/com.apple.CoreML/model.mlmodel",
    "student.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
)
"""In the folder `export` of a run."""
OF_A_SEARCH = (
    "clock.json",
    "trials.parquet",
    "finals.json",
    "members.json",
    "files.json",
    "place.json",
    "schedule.json",
)

Kind = Literal["run", "search"]
_SECTIONS = ("data", "teacher", "student", "loss", "optim", "train", "run")
_FILE = "|".join(map(re.escape, (*OF_A_RUN, *OF_A_SEARCH)))
_EXPORTED = "|".join(map(re.escape, OF_AN_EXPORT))
_ARMS = "|".join(("alone", *get_args(Method)))
_TUNE = r"(?:tune|finals-[0-9a-f]{8})"  # an experiment of Ray Tune, with its trials
_TRIAL = rf"{_TUNE}/trial-[0-9a-z_]+"
# A directory of a run within one: the teacher's (of release 0.1), that of a trial of several workers, an arm's of a
# comparison, and what Ray Tune keeps of a trial or of the members of a pack.
_RUN = rf"(?:teacher|trials/[0-9a-z_]{{4,}}|{_TRIAL}/checkpoint_\d{{6}}(?:/\d+)?|(?:{_ARMS})-seed\d{{2,}})"
_CHECKPOINT = r"checkpoints/(?:damaged_)?step_\d{8,}-[0-9a-f]{6}"
_OWN_FILE = "|".join(
    (
        _FILE,
        rf"{_CHECKPOINT}/(?:state\.pt|committed\.json)",
        r"tensorboard/events\.out\.tfevents\.[^/]+",
        rf"export/(?:{_EXPORTED}|lock\.json)",
        r"calibrations/[0-9a-f]{24}\.safetensors",
        r"trials/\d{4,}\.json",
        r"trials/evaluations/[0-9a-f]{24}\.json",  # of the teacher, beside the trials of several workers
        rf"{_TUNE}/(?:tuner\.pkl|\.validate_storage_marker|[a-z_-]+-[0-9_-]+\.(?:json|pkl)|pbt_[0-9a-z_]+\.txt)",
        rf"{_TRIAL}/(?:params\.json|params\.pkl|progress\.csv|error\.txt|error\.pkl|events\.out\.tfevents\.[^/]+)",
        rf"{_TRIAL}/(?:result\.json|checkpoint_\d{{6}}/\.[a-z_]+\.(?:json|pkl))",
        r"(?:[^/]+/)*\.[^/]+\.\d+-[0-9a-f]{12}\.tmp",  # a kill came in the middle of writing (local_files.py)
    )
)
_OURS = re.compile(rf"(?:{_RUN}/)*(?:{_OWN_FILE})")
_FOLDER = re.compile(
    rf"(?:{_RUN}/)*(?:{_RUN}|{_TUNE}|{_TRIAL}|trials|checkpoints|{_CHECKPOINT}|tensorboard|calibrations|export)"
)


def is_ours(path: str) -> bool:
    """Say whether a run writes a file of this path within its directory."""
    return _OURS.fullmatch(path) is not None


def remove_run(run_dir: str, wanted: Kind = "run") -> list[str]:
    """Remove the files that a run writes from `run_dir`, its marker last; return the paths of the others, which stay.

    Nothing there is fine. Raises UserError, and removes nothing, where the marker is not that of a run or a search, or
    of the other of the two than is ``wanted``.
    """
    if not storage.exists(run_dir):
        return []
    found = storage.list_tree(run_dir)
    kind = kind_of(run_dir)
    if found and kind not in (wanted, None):
        raise UserError(
            f"--run.overwrite true: {run_dir} is the directory of a {kind}, and this is a {wanted}. Nothing was "
            "removed: give another --run.name or --run.root, or remove it yourself"
        )
    if found and kind is None:
        raise UserError(
            f"--run.overwrite true: {run_dir} is not the directory of a run or a search: it has no {MARKER} of "
            f"one, and holds {listed(found)}. Nothing was removed: give another --run.name or --run.root, or remove it "
            "yourself"
        )
    if not found and not storage.is_remote(run_dir) and not storage.local_path(run_dir).is_dir():
        raise UserError(f"{run_dir} is a file, and a run needs a folder: give another --run.name or --run.root")
    own = [path for path in found if is_ours(path) or _is_folder(run_dir, path)]
    # A checkpoint is none without its mark, and until the last moment the directory is known for a run's.
    own.sort(key=lambda path: (path == MARKER, not path.endswith("committed.json")))
    first = [path for path in own if path != MARKER]
    with ThreadPoolExecutor(storage.THREADS) as pool:
        list(pool.map(lambda path: storage.remove_file(storage.join(run_dir, path)), first))
    storage.remove_file(storage.join(run_dir, MARKER))
    if not storage.is_remote(run_dir):
        _remove_empty(storage.local_path(run_dir), own)
    return sorted(set(found) - set(own))


def overwrite(run_dir: str, wanted: Kind = "run") -> None:
    """Remove what a run, or a search, left in `run_dir`, and say what stays there because no run writes it."""
    others = remove_run(run_dir, wanted)
    if others:
        print(f"{run_dir}: {listed(others)} stays there: no run writes that", flush=True)


def kind_of(run_dir: str) -> Kind | None:
    """Return whose marker is there; None: there is none, or somebody else's file of its name."""
    try:
        value: Any = json.loads(storage.read_bytes(storage.join(run_dir, MARKER)))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
    if not isinstance(value, dict) or not all(isinstance(value.get(section), dict) for section in _SECTIONS):
        return None
    return "search" if "search" in value else "run"


def _is_folder(run_dir: str, path: str) -> bool:
    """Say whether this is one of a run's folders: a link to it, or the object that marks it."""
    if _FOLDER.fullmatch(path.rstrip("/")) is None:
        return False
    return path.endswith("/") if storage.is_remote(run_dir) else (storage.local_path(run_dir) / path).is_symlink()


def _remove_empty(root: Path, removed: Iterable[str]) -> None:
    """Remove the folders that held the files, and the root, where nothing is left in them."""
    folders = {parent for path in removed for parent in Path(path).parents}
    for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
        try:
            (root / folder).rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT):
                raise
