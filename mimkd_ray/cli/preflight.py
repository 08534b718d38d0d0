"""Checks of everything that can be known to be wrong before workers are started and paid for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.data.augment.pipelines import make_pipeline
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.data.sources.own_dataset import OwnData
from mimkd_ray.errors import UserError
from mimkd_ray.losses.mimkd_loss import queue_channels
from mimkd_ray.losses.shared_classes import check_classes
from mimkd_ray.losses.teacher_queue import check_size
from mimkd_ray.models.build_model import build_model
from mimkd_ray.models.weights_file import FOLDER, HUB, WEB
from mimkd_ray.taps.dry_checks import build_without_weights, check_logits
from mimkd_ray.teacher_cache import calibration
from mimkd_ray.teacher_cache.codec import needs_calibration
from mimkd_ray.teacher_cache.keys import calibration_url, logits_entry
from mimkd_ray.train.from_cache.cached_teacher import entries_of, origin_of, parts_of_run, what_is_missing
from mimkd_ray.train.job import check_judged, first_runs, needs_teacher
from mimkd_ray.train.networks.build import PlannedStudent, build_network, build_student, make_order, taps_of_run
from mimkd_ray.train.networks.teacher_check import refuse_random
from mimkd_ray.train.networks.teacher_head import teacher_head
from mimkd_ray.train.networks.teacher_input import teacher_input
from mimkd_ray.train.records.loggers import require_loggers
from mimkd_ray.train.trained_teacher import teacher_config

NO_FILE = ("random", "published")


def preflight(config: Config, given: OwnData | None = None) -> None:
    """Raise UserError for missing data, wrong class counts, impossible layers, queues that are too large, weights and
    caches that do not fit.

    Reads listings, footers and weights; builds the networks and runs them dry: on the meta device, without memory, if
    they can be and are not small.
    Published weights may not be on this machine: their caches are checked only by the workers.
    """
    require_loggers(config.run.loggers)
    data = open_data(config.data, given)
    make_order(config, data.train)
    make_pipeline(config.data.pipeline, config.data.image_size)
    check_judged(config, data)
    for weights in (config.teacher.weights, config.student.weights):
        at_hub = weights.startswith((HUB, FOLDER, *WEB))  # a server may refuse to say, and still give
        if weights not in NO_FILE and not at_hub and not storage.exists(weights):
            raise UserError(f"there is no weights file {weights}")
    size = config.data.image_size
    student = build_without_weights(config.student.name, data.num_classes, size)
    check_logits(student, size, data.num_classes, trained=True)
    if needs_teacher(config):
        head = teacher_head(config, data)
        its_size = teacher_input(config).size
        teacher = build_without_weights(config.teacher.name, head.count, its_size)
        check_logits(teacher, its_size, head.count, trained=config.teacher.trains)
    for network in (config.student, *([config.teacher] if needs_teacher(config) else ())):
        own = network.name.startswith("cifar/") or (":" in network.name and not network.name.startswith((HUB, FOLDER)))
        if network.weights == "published" and own and not network.name.startswith("timm/"):
            build_model(network.name, data.num_classes, network.weights)  # which says that there are none
    if config.student.weights not in NO_FILE:
        build_student(config, data.num_classes)
    if not needs_teacher(config):
        return
    refuse_random(config.teacher)
    planned = []
    for run in first_runs(config):
        check_classes(run.loss, head.shared, data.num_classes)
        planned.append(PlannedStudent(run, student, taps_of_run(run, teacher, student, head.shared), head.shared))
    for one in planned:
        check_size(one.config.loss.queue, queue_channels(one.config.loss, one.plan.terms))
    logits_entry(head.count, config.cache.logits)
    reads = config.cache.reads and not config.teacher.trains and config.teacher.weights != "published"
    if config.teacher.finetune and config.teacher.weights not in NO_FILE:
        build_student(teacher_config(config), data.num_classes)
    elif reads or config.teacher.weights not in NO_FILE:
        network = build_network(config, head.count, config.teacher.weights)
        for one in planned if reads else ():
            if one.config.loss.uses_teacher:
                check_cache(one, data, network)


def check_cache(planned: PlannedStudent, data: Data, network: nn.Module) -> None:
    """Raise UserError for a cache that no worker of this student could use, whatever its device; DamagedDataError.

    Reads calibrations, listings and, if something is missing, every key. Hashes the weights.
    """
    config = planned.config
    entries = entries_of([planned], network, teacher_head(config, data).count)
    fitted = [entry for entry in entries if needs_calibration(entry.spec, entry.shape)]
    root, rows = config.cache.root, config.cache.calibration_rows
    here = origin_of(config, data, network, torch.device("cpu"))
    # With `auto`, a worker's GPU may use bf16, which is not known before it starts.
    unknown = config.cache.precision == config.train.precision == "auto" and config.launch.gpu != "off"
    problems = []
    for origin in (here, replace(here, precision="bf16")) if unknown else (here,):
        urls = {entry.label: calibration_url(root, entry, origin, rows) for entry in fitted}
        found = {label: calibration.read(url) for label, url in urls.items()}
        for label, value in found.items():
            if value is not None:
                calibration.from_bytes(value, urls[label])
        unfitted = [label for label, value in found.items() if value is None]
        problems.append(what_is_missing([config], parts_of_run(entries, origin, found), unfitted))
    if all(problems):
        raise UserError(problems[0])
