"""The trials of a search in one process: a single one, or a pack. Data and teacher stay open for the next trial."""

from __future__ import annotations

import gc
import json
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mimkd_ray import storage
from mimkd_ray.config import Config, SearchConfig
from mimkd_ray.config.digest import differences, training_dict, training_part
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.errors import NonFiniteLossError, UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.search.optuna_study import halving
from mimkd_ray.search.trial_files import point_of
from mimkd_ray.search.trials import direction
from mimkd_ray.secret_urls import scrubbed
from mimkd_ray.train.distributed import Context
from mimkd_ray.train.from_cache.cached_teacher import open_cached
from mimkd_ray.train.job import obtain_teacher
from mimkd_ray.train.loop import train
from mimkd_ray.train.networks.build import make_order, plan_student
from mimkd_ray.train.networks.teacher_head import teacher_head
from mimkd_ray.train.out_of_memory import is_out_of_memory
from mimkd_ray.train.packed import Member, train_pack
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.outcomes import CONFIG, RESULT, Failed, Stopped
from mimkd_ray.train.records.read_run import TEACHER
from mimkd_ray.train.records.same_inputs import check_same_student
from mimkd_ray.train.start_times import StartTimes
from mimkd_ray.train.trained_teacher import teacher_config

Tell = Callable[[Mapping[str, Any]], None]
"""Callback for the figures of an evaluation. It may end the trial by an exception that is none of a trial's own."""

MOVED = ("loss", "optim")
"""Sections whose numbers may change on the way: those of others say what a step is, by which epochs are counted."""

REASON = 2000
"""Characters of an error that are kept: the error of a non-finite loss names 64 images before the remedy."""


class TrialContext(Context):
    """The context of a trial's process, whose reports go to Ray Tune. It ends in a report, or with its process."""

    reports_are_final = True

    def __init__(self, device: torch.device, tell: Tell) -> None:
        self.times = StartTimes()
        self.times.mark("asked")
        self.device, self.launch_id, self._tell = device, uuid.uuid4().hex, tell

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Tell Ray Tune."""
        self._tell(metrics)


class Opened:
    """The data set and the teacher of the last trial, kept for the next one that has the same."""

    def __init__(self) -> None:
        self.key: Any = None

    def get(self, config: Config, context: Context, folder: str) -> tuple[Data, nn.Module | None, dict[str, Any]]:
        """Open the data set and the teacher, or return those that are open."""
        value = to_dict(config)
        seed = config.train.seed if config.teacher.weights == "random" and not config.teacher.trains else None
        key = (folder, value["data"], value["teacher"], seed, config.loss.uses_teacher)
        if key != self.key:
            self.key = None
            data = open_data(config.data)
            context.times.mark("data")
            unheard = TrialContext(context.device, lambda _: None)  # a teacher's evaluations are no trial's
            self.found = (data, *obtain_teacher(config, data, unheard, folder))
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
    check_same_student(config.student, folder)
    if config.cache.reads:
        planned = plan_student(config, teacher, data.num_classes, teacher_head(config, data).shared)
        open_cached([planned], data, teacher, context, folder)


def taught(config: Config, folder: str) -> Config:
    """Return the config with the teacher that was trained for all trials as weights, unless it asks for another one: by
    itself a trial with another optimiser, a finalist with another seed and a run in a directory elsewhere would each
    train their own."""
    known = read_json(storage.join(folder, TEACHER), {"weights": str}) if config.teacher.trains else None
    if known is None:
        return config
    begun = read_json(storage.join(known["weights"].rpartition("/")[0], CONFIG)) or {}
    if _asked_of_teacher(begun) != _asked_of_teacher(to_dict(teacher_config(config))):
        return config
    own = replace(config.teacher, train=False, finetune=False, weights=known["weights"], expect_top1=0.0)
    return replace(config, teacher=own)


def _asked_of_teacher(of_its_run: Mapping[str, Any]) -> list[Any]:
    """What section `teacher` decides of a teacher's run."""
    named = (("optim", "lr"), ("train", "epochs"))
    return [of_its_run.get("student"), *(of_its_run.get(section, {}).get(name) for section, name in named)]


def train_trial(config: Config, folder: str, run_dir: str, device: torch.device, tell: Tell) -> None:
    """Train a trial to its end. ``folder`` is where the teacher is that trials share, ``run_dir`` is the trial's own,
    from which it goes on."""
    config = taught(config, folder)
    _adopt(run_dir, config)
    context = TrialContext(device, tell)
    data, teacher, facts = _opened.get(config, context, folder)
    train(config, data, teacher, context, run_dir, facts, quiet=True)


def _adopt(run_dir: str, config: Config) -> None:
    """Let a run go on with the values of ``config``: population-based training gives a trial the checkpoint of another
    one, and other numbers."""
    old = read_json(storage.join(run_dir, CONFIG))
    changed = [] if old is None else differences(training_part(old), training_dict(config))
    if not changed:
        return
    if fixed := [each for each in changed if each.split(".")[0] not in MOVED or each.startswith("optim.name:")]:
        raise UserError(
            f"a trial was given another one's checkpoint and other values ({'; '.join(fixed)}): population-based "
            f"training can change numbers of {' and '.join(MOVED)} on the way; leave this out of its mutations"
        )
    for name in (RESULT, CONFIG):
        storage.remove_file(storage.join(run_dir, name))
    found = checkpoint.newest(run_dir)
    if found is not None:
        state = checkpoint.parse(found[1], torch.device("cpu"))
        state["config"] = training_dict(config)
        checkpoint.drop_after(run_dir, -1)
        checkpoint.save(run_dir, state["step"], state, keep=1)


def train_members(
    search: SearchConfig, configs: Sequence[Config], folder: str, run_dir: str, device: torch.device, tell: Tell
) -> None:
    """Train the members of a pack to their ends, in folders 0, 1, ... of ``run_dir``, and halve them.

    Tells the figures of the best member that is still going, and as "members" a line of JSON with the figures of those
    evaluated ("figures") and the ends so far ("ended": index -> kind, reason).
    """
    context = TrialContext(device, lambda _: None)
    configs = [taught(config, folder) for config in configs]
    with_teacher = next((config for config in configs if config.loss.uses_teacher), configs[0])
    data, teacher, facts = _opened.get(with_teacher, context, folder)
    members = [Member(config, storage.join(run_dir, str(at))) for at, config in enumerate(configs)]
    steps = make_order(configs[0], data.train).steps_per_epoch
    last: dict[str, Any] = {}

    def judge(epoch: int, figures: Mapping[int, Mapping[str, Any]]) -> set[int]:
        told = {at: {"epoch": epoch, "step": epoch * steps, **value} for at, value in figures.items()}
        scores = {at: point_of(value).value(search.metric) for at, value in told.items()}
        best = (max if direction(search.metric) == "maximize" else min)(scores, key=lambda at: scores[at])
        last.update({**told[best], search.metric: scores[best]})
        before = epoch - configs[0].train.eval_every
        stop = halving(search, before, epoch, scores) if epoch < configs[0].train.epochs else set()
        reason = f"behind at epoch {epoch}: one trial of the pack in {search.reduction} goes on past this rung"
        tell({**last, "members": json.dumps({"figures": told, "ended": {at: ["early", reason] for at in stop}})})
        return stop

    outcomes = train_pack(members, data, teacher, context, judge, facts)
    ended = {}
    for at, outcome in enumerate(outcomes):
        if isinstance(outcome, Failed):
            ended[at] = list(explain(outcome.error))
        elif not isinstance(outcome, Stopped):
            ended[at] = ["", ""]
    tell({**(last or failure(0)), "members": json.dumps({"figures": {}, "ended": ended})})


@contextmanager
def failures_told(tell: Tell) -> Iterator[Tell]:
    """A with-block in which a trial's own failure is told as the worst result, with "failed" (the kind) and "reason":
    a restart would not cure it, and the searcher learns where not to look. It yields the callback to tell by."""
    epoch, raised = 0, None

    def telling(figures: Mapping[str, Any]) -> None:
        nonlocal epoch, raised
        epoch = figures.get("epoch", epoch)
        try:
            tell(figures)
        except Exception as error:
            raised = error
            raise

    try:
        yield telling
    except Exception as error:
        if error is raised:
            raise
        kind, reason = explain(error)
        more = {"traceback": scrubbed(traceback.format_exc())} if kind == "error" else {}
        tell({**failure(epoch), "failed": kind, "reason": reason, **more})
    finally:
        gc.collect()  # frees memory after a failed allocation, before the next trial
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def failure(epoch: int) -> dict[str, Any]:
    """Return the figures of a trial that failed after so many epochs."""
    return {"epoch": epoch, "step": 0, "top1": 0.0, "top5": 0.0, "knn": 0.0, "cross_entropy": float("inf")}


def explain(error: BaseException) -> tuple[str, str]:
    """Return the kind and reason of a trial that failed."""
    text = " ".join(scrubbed(str(error)).split())[:REASON]
    if isinstance(error, NonFiniteLossError):
        return "non-finite", text
    if is_out_of_memory(error):
        return "out of memory", text or type(error).__name__
    return "error", f"{type(error).__name__}: {text}"
