"""A whole job in one worker: data, teacher (trained or loaded, and checked), then one run or a comparison."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimkd_ray import console, storage
from mimkd_ray.config import Config
from mimkd_ray.data.loading.loader import eval_batches
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.data.sources.own_dataset import OwnData
from mimkd_ray.data.sources.source import Source, SubsetSource
from mimkd_ray.errors import UserError, count
from mimkd_ray.losses.shared_classes import SharedClasses
from mimkd_ray.models.outputs import logits_from
from mimkd_ray.models.weights_file import shown
from mimkd_ray.train.compare import arm_config, compare
from mimkd_ray.train.distributed import Context, ask_first
from mimkd_ray.train.held_out.accuracy import accuracy, held_out_name, told_batches
from mimkd_ray.train.held_out.known_accuracy import known_or_measured
from mimkd_ray.train.loop import train_on
from mimkd_ray.train.networks.build import build_network, teacher_images
from mimkd_ray.train.networks.device_settings import parameter_dtype, place, uses_channels_last
from mimkd_ray.train.networks.student_module import Normalizer
from mimkd_ray.train.networks.teacher import weights_digest
from mimkd_ray.train.networks.teacher_check import check_accuracy, refuse_random
from mimkd_ray.train.networks.teacher_head import teacher_head
from mimkd_ray.train.networks.teacher_input import sees_data
from mimkd_ray.train.records.extended_runs import history
from mimkd_ray.train.records.outcomes import begin
from mimkd_ray.train.records.progress import say
from mimkd_ray.train.records.run_dir import write_json
from mimkd_ray.train.records.same_inputs import check_same_labels, check_same_teacher
from mimkd_ray.train.trained_teacher import train_teacher


def run_job(config: Config, context: Context, run_dir: str, given: OwnData | None = None) -> dict[str, Any]:
    """Do what ``config`` says in ``run_dir``, with the ``given`` data sets in the place of ``data.root``, and return
    the result. A finished job is returned as it is. Every worker calls this."""
    finished = ask_first(lambda: begin(config, run_dir))
    return do_job(config, context, run_dir, given) if finished is None else finished


def do_job(config: Config, context: Context, run_dir: str, given: OwnData | None = None) -> dict[str, Any]:
    """Do a job whose directory was begun (records/outcomes.py) and has no result. Every worker calls this."""
    say(context, f"{count(context.world_size, 'worker')} on {_device(context)}; opening the data")
    with console.phase("opening the data", said=False):
        data = open_data(config.data, given)
    check_judged(config, data)
    context.times.mark("data")
    with console.phase("preparing the teacher", said=False):
        teacher, facts = obtain_teacher(config, data, context, run_dir)
    context.times.mark("teacher")
    if config.compare.seeds:
        return compare(config, data, teacher, facts, context, run_dir)
    legs = ask_first(lambda: history(config))
    return train_on(config, data, teacher, context, run_dir, facts | ({"legs": legs} if legs else {}))


def _device(context: Context) -> str:
    """The device of the first worker, in words."""
    if context.device.type == "cuda":
        return torch.cuda.get_device_name(context.device)
    return f"CPU, {count(torch.get_num_threads(), 'thread')}{' each' if context.world_size > 1 else ''}"


def check_judged(config: Config, data: Data) -> None:
    """Raise UserError for what compares accuracies where nothing held out has a label."""
    if data.judged:
        return
    if config.compare.seeds or (config.teacher.expect_top1 and not config.teacher.has_own_classes):
        what = "compare.seeds" if config.compare.seeds else "teacher.expect_top1"
        raise UserError(
            f"nothing in the validation set of {config.data.root} has a label, and {what} "
            f"asks for accuracies: pass --{what.replace('_', '-')} 0, or name a labelled split with --data.val-split"
        )


def first_runs(config: Config) -> list[Config]:
    """The single run of the job, or those of a comparison's first seed."""
    return [arm_config(config, arm, 0) for arm in config.compare.arms] if config.compare.seeds else [config]


def needs_teacher(config: Config) -> bool:
    """Return whether any arm of the job uses a teacher."""
    return any(run.loss.uses_teacher for run in first_runs(config))


def obtain_teacher(
    config: Config, data: Data, context: Context, run_dir: str
) -> tuple[nn.Module | None, dict[str, Any]]:
    """The teacher's network, trained first where the config says so, and the facts of its check on held-out images.

    The check is made once for all runs beside this one: a start must be quick. teacher.json says what it found. Raises
    UserError if the teacher is random, guesses, or falls short of ``teacher.expect_top1``.
    """
    names = config.teacher.classes if isinstance(config.teacher.classes, str) and needs_teacher(config) else ""
    labels = ask_first(lambda: check_same_labels(data, run_dir, names))
    if not needs_teacher(config):
        return None, {}
    teacher = config.teacher
    refuse_random(teacher)
    weights = teacher.weights
    trained: dict[str, Any] | None = None
    if teacher.trains:
        weights, trained = train_teacher(config, data, labels, context, run_dir)
    head = teacher_head(config, data)
    classes = data.num_classes if head.shared is None else len(head.shared.of_data)
    model = build_network(config, head.count, weights)
    digest = weights_digest(model)
    place(model, config.train, context.device).eval().requires_grad_(False)
    if weights != "random":
        ask_first(lambda: check_same_teacher(teacher, weights, digest, classes, run_dir))
    if trained is not None and head.shared is None and trained["rows"] == data.val.num_rows and sees_data(config):
        figures = {key: trained[key] for key in ("top1", "top5", "rows")}  # of its own last evaluation
    else:
        look = partial(measure, model, config, data, context, head.shared)
        figures = known_or_measured(digest, head, config, data, labels, run_dir, look)
    known = {"name": teacher.name, "weights": shown(weights), **figures, "sha256": digest, "data": data.digest}
    ask_first(lambda: write_json(storage.join(run_dir, "teacher.json"), known))
    if known["top1"] is not None:
        said = f"top-1 {known['top1']:.2f} % on {known['rows']:,} held-out images"
        say(context, f"teacher {teacher.name} ({shown(weights)}): {said}")
        check_accuracy(teacher, known["top1"], known["rows"], classes)
        if known["top1"] < 200 / classes:
            say(context, f"teacher {teacher.name} is hardly better than chance ({100 / classes:.2f} %)")
    elif teacher.expect_top1 and not data.judged:
        say(context, f"teacher {teacher.name}: no held-out image has a label, so its top-1 is not checked")
    return model, {"teacher": known}


def measure(
    model: nn.Module, config: Config, data: Data, context: Context, shared: SharedClasses | None = None
) -> dict[str, Any]:
    """Held-out top-1 and top-5 of a teacher, in percent, over all workers; None where its classes are not the data's.
    Of ``shared`` classes: over the images of these and among these."""
    if not data.judged:
        return {"top1": None, "top5": None, "rows": 0}
    held_out: Source = data.val
    images = teacher_images(config, context.device)

    def logits_of(images_BCHW: Tensor) -> Tensor:
        logits_BC = logits_from(model, images(images_BCHW))
        return logits_BC if shared is None else shared.teacher_as_data(logits_BC, data.num_classes)

    if shared is not None:
        held_out = SubsetSource(data.val, np.flatnonzero(np.isin(data.val.labels(), shared.of_data)))
        if not held_out.num_rows:
            return {"top1": None, "top5": None, "rows": 0}
    layout = uses_channels_last(config.train, context.device)
    normalize = Normalizer(config.data.mean, config.data.std, context.device, parameter_dtype(config.train), layout)
    batches = eval_batches(
        held_out, config.data, config.train.eval_batch or config.train.lane_batch, context.rank, context.world_size
    )
    what = f"checking {config.teacher.name} on {held_out.num_rows:,} held-out images"
    told = told_batches(batches, held_out, context.world_size, what, said=True)
    measured = accuracy(logits_of, told, normalize, config.data.max_damaged, held_out_name(config.data))
    return {"top1": measured.top1, "top5": measured.top5, "rows": measured.rows}
