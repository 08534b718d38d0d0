"""A trial under Ray Tune, in this process or as a Ray Train run of several workers. search/ defines the trial
itself."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
import torch
from ray import tune

from mimkd_ray import console, storage
from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.config.json_form import from_dict
from mimkd_ray.errors import Interrupted
from mimkd_ray.search.run_trials import explain, prepare, run_trials
from mimkd_ray.search.trial_folders import Ended, Planned
from mimkd_ray.secret_urls import Carried
from mimkd_ray.train.records.run_dir import read_metrics, write_json

LOOK_SECONDS = 2.0
"""Seconds between two checks for evaluations of a trial of several workers."""


def trial_device() -> torch.device:
    """Return the GPU that Ray assigned to this process, or the CPU."""
    return torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")


def prepare_remotely(config: dict[str, Any], folder: str, _secrets: Carried) -> None:
    """Call search.run_trials.prepare, as a Ray task."""
    prepare(from_dict(Config, config), folder, trial_device())


def trainable(setup: dict[str, Any]) -> None:
    """Run the trials of ``setup``, from :func:`payload`, as Ray Tune's trainable. It never raises for a trial's
    failure.

    Reports "figures", {number: evaluation}, after each evaluation, and "ended", {number: ending}, at the end: both as
    JSON, because Tune flattens nested values.
    """
    console.use(console.Nobody())  # the search tells of its trials
    search = from_dict(SearchConfig, setup["search"])
    planned = [Planned(**each) for each in setup["planned"]]
    places = {int(number): place for number, place in setup["places"].items()}

    def tell(figures: Mapping[int, Mapping[str, Any]]) -> None:
        first = next(iter(figures.values()))  # also under their own names, for dashboards and loggers
        plain = {key: first[key] for key in ("epoch", "top1", "top5", "cross_entropy")}
        tune.report(plain | {"figures": json.dumps({number: dict(each) for number, each in figures.items()})})

    if setup["workers"] > 1:
        ended = run_large(planned[0], places[planned[0].number], setup["own"], tell)
    else:
        planned = [within(each, setup["cpus"]) for each in planned]
        ended = run_trials(search, planned, setup["folder"], places, trial_device(), tell)
    tune.report({"ended": json.dumps({number: vars(each) for number, each in ended.items()})})


def within(planned: Planned, cpus: float) -> Planned:
    """Return the trial with one loader process for each of its CPUs but one, if their number is automatic: the default
    would take all CPUs of the machine, which other trials share."""
    data = planned.config["data"]
    if data["loader_workers"] != -1:
        return planned
    own = {**data, "loader_workers": max(0, int(cpus) - 1)}
    return replace(planned, config={**planned.config, "data": own})


def payload(
    search: Mapping[str, Any],
    planned: list[Planned],
    folder: str,
    places: Mapping[int, str],
    workers: int,
    cpus: float,
    own: bool,
) -> dict[str, Any]:
    """Return the start argument of a trial's process."""
    return {
        "search": dict(search),
        "planned": [vars(each) | {"params": dict(each.params), "config": dict(each.config)} for each in planned],
        "places": {str(number): place for number, place in places.items()},
        "folder": folder,
        "workers": workers,
        "cpus": cpus,
        "own": own,
        "secrets": Carried(),
    }


def run_large(
    planned: Planned, place: str, own: bool, tell: Callable[[Mapping[int, Mapping[str, Any]]], None]
) -> dict[int, Ended]:
    """Run a trial as a Ray Train run: this process starts the workers and passes on their evaluations.

    It is stopped by a file that asks the workers to save and end (:func:`ask_to_stop`), never by killing, which would
    leave its workers running.
    """
    from mimkd_ray.on_ray.train_workers import fit_workers

    config = from_dict(Config, planned.config)
    outcome: list[BaseException | None] = []

    def fit() -> None:
        try:
            fit_workers(config, place, own)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    began = time.perf_counter()
    thread = threading.Thread(target=fit, name="fit")
    thread.start()
    seen = 0
    while True:
        running = thread.is_alive()  # read before the metrics, so that the last ones are not missed
        for figures in read_metrics(place, "eval"):
            if figures["step"] > seen:
                seen = figures["step"]
                tell({planned.number: figures})
        if not running:
            break
        thread.join(LOOK_SECONDS)
    error, seconds = outcome[0], time.perf_counter() - began
    if error is None:
        return {planned.number: Ended(state="completed", seconds=seconds)}
    if isinstance(error, Interrupted):
        return {planned.number: Ended(state="stopped", kind="early", reason=str(error), seconds=seconds)}
    kind, reason = explain(error)
    return {planned.number: Ended(state="failed", kind=kind, reason=reason, seconds=seconds)}


def ask_to_stop(place: str) -> None:
    """Ask the workers of a trial of several workers to save and end."""
    from mimkd_ray.on_ray.train_workers import ANYBODY, STOP

    write_json(storage.join(place, STOP), {"launch_id": ANYBODY})
