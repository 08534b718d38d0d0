"""What is known of a run, read back from its directory, for pages."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.form.json_form import from_dict
from mimkd_ray.errors import UserError
from mimkd_ray.evaluation.measure import FIGURES, PREDICTIONS
from mimkd_ray.json_files import NUMBER, read_if_sound, read_json
from mimkd_ray.secret_urls import redacted_values
from mimkd_ray.train.records.outcomes import CONFIG, RESULT
from mimkd_ray.train.records.read_run import ARM, TEACHER, WEIGHTS, teacher_file
from mimkd_ray.train.records.run_dir import read_metrics

logger = logging.getLogger(__name__)

EXPORT, REPORT = "export/export.json", "report.html"
WITHOUT = "the page is made without it"

MOST_HEADER = 100_000_000
"""Most bytes that the safetensors format allows a header."""

_SUFFIX = re.compile(r"\.(running_mean|running_var|num_batches_tracked)$")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run, finished or not. Its JSON is without credentials."""

    name: str
    """Last part of its directory."""
    place: str
    """Directory or URL."""
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    """result.json; {} for a run that has not come to its end."""
    train: Sequence[Mapping[str, Any]]
    """Lines of training in metrics.jsonl."""
    evals: Sequence[Mapping[str, Any]]
    """Lines of evaluations in metrics.jsonl."""
    teacher: Mapping[str, Any]
    """teacher.json, of the comparison for an arm of one; {} for a run without a teacher."""
    evaluation: Mapping[str, Any]
    """evaluation.json; {} for a run that was not evaluated by itself."""
    export: Mapping[str, Any]
    """export.json of its default place; {} for a student that was not exported."""
    size: tuple[int, int] | None
    """Parameters and bytes of student.safetensors."""
    teacher_size: tuple[int, int] | None
    """The same of the teacher's weights, where they are a safetensors file that can be read here."""

    @property
    def student_name(self) -> str:
        """Name of the student's network."""
        return str(self.config["student"]["name"])

    @property
    def teacher_name(self) -> str:
        """Name of the teacher's network; empty without a teacher."""
        return str(self.config["teacher"]["name"]) if self.uses_teacher else ""

    @property
    def uses_teacher(self) -> bool:
        """Whether a teacher takes part in its loss."""
        return self.parsed().loss.uses_teacher

    @property
    def head_learns(self) -> bool:
        """Whether anything trains its student's head; if not, top-1 and cross-entropy say nothing."""
        return bool(self.result.get("student", {}).get("head_learns", True))

    @property
    def top1(self) -> float | None:
        """Held-out top-1 in percent: of the result, or of the last evaluation; None for a head that nothing trains."""
        return self.held_out("top1") if self.head_learns else None

    @property
    def teacher_top1(self) -> float | None:
        """Held-out top-1 of the teacher in percent; None without one, without labels, and for classes of its own."""
        value = self.teacher.get("top1")
        return None if value is None else float(value)

    @property
    def seed(self) -> int:
        """The seed of its training."""
        return int(self.config["train"]["seed"])

    def held_out(self, key: str) -> float | None:
        """Return a held-out figure: of the result, or of the last evaluation."""
        last = self.result.get("student") or (self.evals[-1] if self.evals else {})
        value = last.get(key)
        return None if value is None else float(value)

    def parsed(self) -> Config:
        """Return the config as this release reads it. Raises UserError for one of another release."""
        return from_dict(Config, self.config)

    def predictions(self) -> list[dict[str, Any]]:
        """Return the rows of predictions.parquet; none where it is not there."""
        import pyarrow.parquet as pq

        url = storage.join(self.place, PREDICTIONS)
        if not storage.exists(url):
            return []
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(storage.read_bytes(url))).to_pylist()
        return rows


def read_run(run_dir: str) -> RunRecord:
    """Return what is known of the run in a directory. Raises UserError where there is none."""
    config = read_json(storage.join(run_dir, CONFIG))
    if not isinstance(config, dict) or not {"student", "teacher", "loss", "train"} <= config.keys():
        raise UserError(
            f"{run_dir} is not the directory of a run: it has no {CONFIG} of one; give the directory that the run "
            "printed, its --run.root/--run.name"
        )
    name = run_dir.rstrip("/").rpartition("/")[2]
    alone = ARM.fullmatch(name) and name.startswith("alone-")
    file = storage.join(run_dir, TEACHER) if alone else teacher_file(run_dir)
    teacher = redacted_values(read_if_sound(file, {"top1": (*NUMBER, type(None))}, WITHOUT) or {})
    return RunRecord(
        name=name,
        place=run_dir,
        config=redacted_values(config),
        result=redacted_values(read_json(storage.join(run_dir, RESULT), {"student": dict}) or {}),
        train=read_metrics(run_dir, "train"),
        evals=read_metrics(run_dir, "eval"),
        teacher=teacher,
        evaluation=redacted_values(read_if_sound(storage.join(run_dir, FIGURES), instead=WITHOUT) or {}),
        export=read_if_sound(storage.join(run_dir, EXPORT), {"student": dict, "files": dict}, WITHOUT) or {},
        size=weights_size(storage.join(run_dir, WEIGHTS["student"])),
        teacher_size=weights_size(str(teacher.get("weights", ""))),
    )


def runs_of(run_dir: str) -> dict[str, list[RunRecord]]:
    """Return the runs below a comparison's directory by arm, each in the order of its seeds; {} for a lone run."""
    config = read_json(storage.join(run_dir, CONFIG)) or {}
    compare = config.get("compare", {})
    arms: dict[str, list[RunRecord]] = {}
    for arm in compare.get("arms", []) if compare.get("seeds") else []:
        folders = [storage.join(run_dir, f"{arm}-seed{seed:02d}") for seed in range(compare["seeds"])]
        there = [read_run(folder) for folder in folders if storage.exists(storage.join(folder, CONFIG))]
        if there:
            arms[arm] = there
    return arms


def alone_beside(run: RunRecord) -> RunRecord | None:
    """Return the student alone of the same seed, where the run is an arm of a comparison that has one."""
    arm = ARM.fullmatch(run.name)
    if arm is None or arm["arm"] == "alone":
        return None
    folder = storage.join(run.place.rstrip("/").rpartition("/")[0], f"alone-seed{arm['seed']}")
    return read_run(folder) if storage.exists(storage.join(folder, CONFIG)) else None


def weights_size(url: str) -> tuple[int, int] | None:
    """Return parameters and bytes of a safetensors file from its header; None for anything else, and for a file that
    cannot be read here (a teacher's may be on another machine)."""
    if not url.endswith(".safetensors"):
        return None
    try:
        length = int.from_bytes(storage.read_range(url, 0, 8), "little")
        header = json.loads(storage.read_range(url, 8, min(length, MOST_HEADER)))
        size = storage.size(url)
    except (OSError, storage.StorageError, UserError, ValueError) as error:
        logger.info("the size of %s is not known: %s", url, error)
        return None
    kept = {name: tensor for name, tensor in header.items() if name != "__metadata__" and not _SUFFIX.search(name)}
    return sum(math.prod(tensor["shape"]) for tensor in kept.values()), size
