"""The student that is exported: of a run directory, finished or stopped, or of a weights file."""

from __future__ import annotations

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
from mimkd_ray.models.weights import put_state
from mimkd_ray.models.zoo import build_model
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.outcomes import CONFIG, RESULT

WEIGHTS = "student.safetensors"


@dataclass(frozen=True)
class RunFacts:
    """What a run directory says of its run."""

    place: str
    config: Config
    result: Mapping[str, Any] = field(default_factory=dict)
    """result.json; empty: the run did not come to its end."""


def read_run(place: str) -> RunFacts:
    """Read what a run directory says. Raises UserError for what is none, and for directories of several runs,
    and DamagedDataError for damaged files."""
    value = read_json(storage.join(place, CONFIG))
    if value is None:
        there = "" if storage.exists(place) else ", nor is there such a folder"
        raise UserError(f"{place} has no {CONFIG}{there}: give the directory of a run, as its last line named it")
    inner = [url.rpartition("/")[2] for url in storage.list_dirs(place)]
    if "search" in value or value.get("compare", {}).get("seeds"):
        runs = [name for name in inner if "-seed" in name] or inner
        kind = "search" if "search" in value else "comparison"
        raise UserError(f"{place} is a {kind} of several runs: name one of them, such as {_some(place, runs)}")
    config = from_dict(Config, value)
    return RunFacts(place, config, read_json(storage.join(place, RESULT)) or {})


def _some(place: str, names: list[str]) -> str:
    return ", ".join(storage.join(place, name) for name in names[:3]) or "those below its folders"


def load_of_run(run: RunFacts, name: str, num_classes: int) -> tuple[nn.Module, str]:
    """Return the run's student and where its weights are: student.safetensors, or else the newest checkpoint.

    Raises UserError where there is neither, where they are damaged, and where they are of other classes.
    """
    size = run.config.data.image_size
    weights = storage.join(run.place, WEIGHTS)
    if storage.exists(weights):
        return build_model(name, num_classes, weights, size), weights
    found = checkpoint.newest(run.place)
    if found is None:
        folders = len(storage.list_dirs(storage.join(run.place, checkpoint.FOLDER)))
        why = "and no checkpoint"
        if folders:
            why = "and its only checkpoint is damaged" if folders == 1 else f"and its {folders} checkpoints are damaged"
        raise UserError(
            f"{run.place} has no {WEIGHTS} {why}: let the run go on, with its own command, to its end or its next "
            "checkpoint"
        )
    folder, data = found
    model = build_model(name, num_classes, "random", size)
    state = checkpoint.parse(data, torch.device("cpu"))
    put_state(model, {"": checkpoint.student_of(state)}, folder, num_classes)
    return model, folder
