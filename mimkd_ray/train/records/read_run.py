"""A run that was trained, read back from its directory: what it was, its student, and where its teacher is told of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.form.json_form import from_dict
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.weights import put_state
from mimkd_ray.train.distributed import ask_first
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.outcomes import CONFIG, RESULT

TEACHER = "teacher.json"
WEIGHTS = {"student": "student.safetensors", "best": "best.safetensors"}
ARM = re.compile(r"(?P<arm>\w+)-seed(?P<seed>\d{2,})")
"""The name of a run's directory within that of a comparison."""


@dataclass(frozen=True)
class RunFacts:
    """What a run directory says of its run."""

    place: str
    config: Config
    result: Mapping[str, Any] = field(default_factory=dict)
    """result.json; empty: the run did not come to its end."""
    several: str = ""
    """search or comparison: the directory holds several runs."""

    def single(self) -> RunFacts:
        """Return it, of one run. Raises UserError for the directory of several, with the names of some."""
        if not self.several:
            return self
        inner = [url.rpartition("/")[2] for url in storage.list_dirs(self.place)]
        runs = [name for name in inner if ARM.fullmatch(name)] or inner
        some = ", ".join(storage.join(self.place, name) for name in runs[:3]) or "those below its folders"
        raise UserError(f"{self.place} is a {self.several} of several runs: name one of them, such as {some}")


def read_run(place: str) -> RunFacts:
    """Read what a run directory says. Raises UserError for what is none, and DamagedDataError for damaged files."""
    value = read_json(storage.join(place, CONFIG))
    if value is None:
        there = "" if storage.exists(place) else ", nor is there such a folder"
        raise UserError(f"{place} has no {CONFIG}{there}: give the directory of a run, as its last line named it")
    config = from_dict(Config, {key: part for key, part in value.items() if key != "search"})
    several = "search" if "search" in value else "comparison" if config.compare.seeds else ""
    return RunFacts(place, config, read_json(storage.join(place, RESULT)) or {}, several)


def student_of_run(
    run_dir: str, name: str, num_classes: int, image_size: int, which: str = "student"
) -> tuple[nn.Module, str]:
    """Return a run's student, or its best, and where its weights are: the file with which a run ends, or else the
    newest checkpoint. Every worker calls it.

    Raises UserError where there is neither, where they are damaged, and where they are of other classes.
    """
    file = storage.join(run_dir, WEIGHTS[which])
    if storage.exists(file):
        return build_model(name, num_classes, file, image_size), file
    if which == "best":
        raise UserError(f"{run_dir} has no {WEIGHTS[which]}: train with --run.keep-best true")
    folder = ask_first(lambda: (checkpoint.newest(run_dir) or ("",))[0])
    if not folder:
        damaged = len(storage.list_dirs(storage.join(run_dir, checkpoint.FOLDER)))
        why = f"its {damaged} checkpoints are damaged" if damaged > 1 else "its only checkpoint is damaged"
        raise UserError(
            f"{run_dir} has no {WEIGHTS[which]} and {why if damaged else 'no checkpoint'}: let the run go on, with its "
            "own command, to its end or its next checkpoint"
        )
    state = checkpoint.parse(checkpoint.read(folder), torch.device("cpu"))
    model = build_model(name, num_classes, "random", image_size)
    put_state(model, {"": checkpoint.student_of(state)}, folder, num_classes)
    return model, folder


def teacher_file(run_dir: str) -> str:
    """Return the place of the teacher.json of a run: its own, or that of the comparison whose arm it is, as the arms
    share their teacher."""
    own = storage.join(run_dir, TEACHER)
    above, _, name = run_dir.rstrip("/").rpartition("/")
    return storage.join(above, TEACHER) if ARM.fullmatch(name) and not storage.exists(own) else own
