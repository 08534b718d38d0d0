"""A teacher that is trained first, or fine-tuned, once for all runs beside each other: `teachers/NAME-KEY/`.

The key is a digest of what decides the training, so that a run with another loss finds the teacher of the last one.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import CacheConfig, CompareConfig, Config, LossConfig, ModelConfig, TeacherConfig
from mimkd_ray.config.digest import differences, digest, training_dict
from mimkd_ray.config.form.json_form import from_dict
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.errors import Interrupted, UserError, count
from mimkd_ray.json_files import read_json
from mimkd_ray.run_lock import InUse, held
from mimkd_ray.train.distributed import Context, ask_first, share_from_first
from mimkd_ray.train.held_out.known_accuracy import beside
from mimkd_ray.train.loop import train_on
from mimkd_ray.train.networks.build import build_student
from mimkd_ray.train.networks.teacher import weights_digest
from mimkd_ray.train.records.outcomes import CONFIG, begin, find_result, has_trained
from mimkd_ray.train.records.progress import say

FOLDER = "teachers"
LOOK_SECONDS = 5.0
"""Between two looks whether another run has trained the teacher."""


def teacher_config(config: Config) -> Config:
    """The run that trains the teacher: the job's own, with the teacher as student, labels only, all training rows."""
    teacher = config.teacher
    return replace(
        config,
        recipe=f"{config.recipe} teacher",
        student=ModelConfig(
            name=teacher.name,
            weights=teacher.weights if teacher.finetune else "random",
            head_epochs=teacher.head_epochs if teacher.finetune else 0,
        ),
        teacher=TeacherConfig(name=teacher.name),
        cache=CacheConfig(),
        loss=LossConfig(name=(), label_smoothing=config.loss.label_smoothing),
        data=replace(config.data, subset=0),
        optim=replace(config.optim, lr=teacher.lr or config.optim.lr),
        train=replace(config.train, epochs=teacher.epochs or config.train.epochs),
        compare=CompareConfig(),
        run=replace(config.run, start_from=""),
    )


def folder_of(own: Config, data: Data, labels: str, run_dir: str) -> str:
    """Return the directory of the teacher's run. ``own``: its config, ``data``: its images, ``labels``: the digest of
    their labels, where that of the images does not cover them. Weights that it starts from count by their content: a
    file may be replaced by another."""
    start = weights_digest(build_student(own, data.num_classes)) if own.student.weights != "random" else ""
    what = json.dumps({"config": digest(own), "data": data.digest + labels, "start": start}, sort_keys=True)
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", own.student.name).strip("-.")[-60:]
    return beside(run_dir, FOLDER, f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}")


def train_teacher(
    config: Config, data: Data, labels: str, context: Context, run_dir: str
) -> tuple[str, dict[str, Any]]:
    """Train the teacher of a run, unless it is there. Return its weights file, and the held-out figures of its end.

    While another run trains the same teacher, this one waits. Every worker calls it.
    """
    own = teacher_config(config)
    images = open_data(own.data, data.own)
    folder = ask_first(lambda: folder_of(own, images, labels, run_dir))
    finished = ask_first(lambda: find_result(own, folder))
    with ExitStack() as lock:
        if finished is None:
            _in_turn(lock, folder, context)
            finished = ask_first(lambda: begin(own, folder))  # another run may have trained it meanwhile
        if finished is not None:
            say(context, f"the teacher {config.teacher.name} was trained before, in {folder}")
        else:
            how = "fine-tuning" if config.teacher.finetune else "training"
            say(context, f"{how} the teacher {config.teacher.name}, {count(own.train.epochs, 'epoch')}, in {folder}")
            finished = train_on(own, images, None, context, folder)
    return storage.join(folder, "student.safetensors"), finished["student"]


def check_leg(config: Config, run_dir: str) -> None:
    """Raise UserError if a leg that is to begin would train a teacher of its own, as its epochs, rate or data are
    others: critics and queue know that of the last one."""
    last = config.run.start_from
    if not (last and config.teacher.trains and config.loss.uses_teacher) or has_trained(run_dir):
        return
    begun, known = (read_json(storage.join(last, name)) or {} for name in (CONFIG, "teacher.json"))
    before, now = (training_dict(teacher_config(each)) for each in (from_dict(Config, begun), config))
    changed = differences(before, now)
    if changed and "weights" in known:
        how = "train" if config.teacher.train else "finetune"
        raise UserError(
            f"teacher.{how} is true, and would train another teacher than that of {last} ({'; '.join(changed)}): pass "
            f"--teacher.{how} false --teacher.weights {known['weights']} to go on with that one"
        )


def _in_turn(lock: ExitStack, folder: str, context: Context) -> None:
    """Let the first worker hold the directory, once nobody else does. Raises Interrupted if the job is to stop."""

    def enter() -> str:
        try:
            lock.enter_context(held(folder))
        except InUse as error:
            return error.holder
        return ""

    told = ""
    while holder := ask_first(enter):
        if holder != told:
            say(context, f"waiting for the teacher in {folder}, which {holder} trains")
            told = holder
        if share_from_first(context.stop_requested()):
            raise Interrupted(f"asked to stop while {holder} trained the teacher in {folder}")
        time.sleep(LOOK_SECONDS)
