"""The trials of a search in one process: a single one, or a pack. Data and teacher stay open for the next trial."""

from __future__ import annotations

import gc
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mimkd_ray import storage
from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.config.json_form import from_dict, to_dict
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.errors import Interrupted, NonFiniteLossError
from mimkd_ray.search.optuna_study import halving
from mimkd_ray.search.trial_folders import Ended, Ending, Planned, point_of
from mimkd_ray.secret_urls import scrubbed
from mimkd_ray.train.build import make_order, plan_student
from mimkd_ray.train.distributed import Context, Preemption
from mimkd_ray.train.from_cache.cached_teacher import open_cached
from mimkd_ray.train.loop import train
from mimkd_ray.train.out_of_memory import is_out_of_memory
from mimkd_ray.train.packed import Member, train_pack
from mimkd_ray.train.records.outcomes import Failed, Outcome, Stopped
from mimkd_ray.train.start_times import StartTimes
from mimkd_ray.train.teacher_head import teacher_head
from mimkd_ray.train.worker import obtain_teacher

Tell = Callable[[Mapping[int, Mapping[str, Any]]], None]
"""Callback for the figures of an evaluation, by number of trial. It raises to end the trial."""

REASON = 2000
"""Characters of an error that are kept: the error of a non-finite loss names 64 images before the remedy."""


class TrialContext:
    """The context of a trial's process: one worker, whose reports go to the search's driver."""

    rank, world_size = 0, 1
    reports_are_final = True

    def __init__(
        self, device: torch.device, tell: Callable[[Mapping[str, Any]], None], times: StartTimes | None = None
    ) -> None:
        self.times = times or StartTimes()
        self.device, self.launch_id, self._tell = device, uuid.uuid4().hex, tell

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Report an evaluation to the driver; its data is already committed."""
        self._tell(metrics)

    def stop_requested(self) -> bool:
        """Return False: a trial ends in a report, or with its process."""
        return False

    def observe(self, run_dir: str, values: Mapping[str, float]) -> None:
        """Do nothing: a search shows its trials by their reports."""

    def preemption(self) -> Preemption | None:
        """Return None: trials save at every evaluation in any case."""
        return None


class Opened:
    """The data set and the teacher of the last trial, kept for the next one that has the same."""

    def __init__(self) -> None:
        self.key: Any = None

    def get(self, config: Config, context: Context, folder: str) -> tuple[Data, nn.Module | None, dict[str, Any]]:
        """Open the data set and the teacher, or return those that are open."""
        value = to_dict(config)
        seed = config.train.seed if config.teacher.weights == "random" and not config.teacher.train else None
        key = (folder, value["data"], value["teacher"], seed, config.loss.uses_teacher)
        if key != self.key:
            self.key = None
            data = open_data(config.data)
            context.times.mark("data")
            self.found = (data, *obtain_teacher(config, data, context, folder))
            self.key = key
        context.times.mark("data")  # immediate if it was open
        context.times.mark("teacher")
        return self.found


_opened = Opened()


def prepare(config: Config, folder: str, device: torch.device) -> None:
    """Prepare the first trial: train the teacher if the config says so, measure it once, and check that the cache holds
    everything that trials may read. ``config`` is the widest of the search. Raises UserError."""
    context = TrialContext(device, lambda _: None)
    data, teacher, _ = _opened.get(config, context, folder)
    if config.cache.reads:
        planned = plan_student(config, teacher, data.num_classes, teacher_head(config, data).shared)
        open_cached([planned], data, teacher, context, folder)


def run_trials(
    search: SearchConfig,
    planned: Sequence[Planned],
    folder: str,
    places: Mapping[int, str],
    device: torch.device,
    tell: Tell,
) -> dict[int, Ended]:
    """Train the trials to their ends. One that fails is an :class:`Ended`, not an exception.

    ``folder`` is the search's (the teacher is there), ``places`` are the trials' own. Raises what ``tell`` raises.
    """
    began = time.perf_counter()
    times = StartTimes()
    times.mark("asked")
    telling = Telling(tell)
    try:
        outcomes = _train(search, planned, folder, places, device, telling, times)
    except Exception as error:
        if error is telling.raised or isinstance(error, Interrupted):
            raise
        kind, reason = explain(error)
        if kind == "error":
            text = scrubbed(traceback.format_exc()).encode()
            for each in planned:
                storage.write_bytes(storage.join(places[each.number], "error.txt"), text)
        outcomes = {each.number: Ended(state="failed", kind=kind, reason=reason) for each in planned}
        del error
    gc.collect()  # frees memory after a failed allocation, before the next trial
    if device.type == "cuda":
        torch.cuda.empty_cache()
    marks = times.marks()
    stages = {name: at - marks["asked"] for name, at in marks.items()}
    seconds = time.perf_counter() - began
    return {
        number: Ended(state=e.state, kind=e.kind, reason=e.reason, seconds=seconds, details=stages)
        for number, e in outcomes.items()
    }


class Telling:
    """A wrapper of `tell` that keeps its exception, to distinguish it from a trial's own failure."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.raised: Exception | None = None

    def __call__(self, figures: Mapping[int, Mapping[str, Any]]) -> None:
        try:
            self.tell(figures)
        except Exception as error:
            self.raised = error
            raise


def _train(
    search: SearchConfig,
    planned: Sequence[Planned],
    folder: str,
    places: Mapping[int, str],
    device: torch.device,
    tell: Tell,
    times: StartTimes,
) -> dict[int, Ended]:
    configs = [from_dict(Config, each.config) for each in planned]
    if len(planned) == 1:
        number = planned[0].number
        context = TrialContext(device, lambda metrics: tell({number: metrics}), times)
        data, teacher, facts = _opened.get(configs[0], context, folder)
        train(configs[0], data, teacher, context, places[number], facts, quiet=True)
        return {number: Ended(state="completed")}
    context = TrialContext(device, lambda _: None, times)
    with_teacher = next((config for config in configs if config.loss.uses_teacher), configs[0])
    data, teacher, facts = _opened.get(with_teacher, context, folder)
    members = [Member(config, places[each.number]) for config, each in zip(configs, planned, strict=True)]

    steps = make_order(configs[0], data.train).steps_per_epoch

    def judge(epoch: int, figures: Mapping[int, Mapping[str, Any]]) -> set[int]:
        told = {at: {"epoch": epoch, "step": epoch * steps, **value} for at, value in figures.items()}
        tell({planned[at].number: value for at, value in told.items()})
        return halving(search, epoch, {at: getattr(point_of(value), search.metric) for at, value in told.items()})

    outcomes = train_pack(members, data, teacher, context, judge, facts)
    return {each.number: _ended(search, outcome) for each, outcome in zip(planned, outcomes, strict=True)}


def _ended(search: SearchConfig, outcome: Outcome) -> Ended:
    if isinstance(outcome, Failed):
        kind, reason = explain(outcome.error)
        return Ended(state="failed", kind=kind, reason=reason)
    if isinstance(outcome, Stopped):
        reason = f"behind at epoch {outcome.epoch}: one trial of the pack in {search.reduction} goes on past this rung"
        return Ended(state="stopped", kind="early", reason=reason)
    return Ended(state="completed")


def explain(error: BaseException) -> tuple[Ending, str]:
    """Return the kind and reason of a trial that failed."""
    text = " ".join(scrubbed(str(error)).split())[:REASON]
    if isinstance(error, NonFiniteLossError):
        return "non-finite", text
    if is_out_of_memory(error):
        return "out of memory", text or type(error).__name__
    return "error", f"{type(error).__name__}: {text}"
