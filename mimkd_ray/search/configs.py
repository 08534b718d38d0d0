"""From a search to the configs of its trials, and back to the config that is trained with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property, reduce
from operator import getitem
from typing import Any, NamedTuple

import numpy as np

from mimkd_ray import storage
from mimkd_ray.config import CompareConfig, Config, RunConfig, SearchConfig, SearchJob
from mimkd_ray.config.digest import differences, digest_of, filled, refuse_changes, training_part
from mimkd_ray.config.form.json_form import dotted, from_dict, to_dict
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.errors import UserError, nearest
from mimkd_ray.json_files import read_json
from mimkd_ray.search.suggest import Options, Space, Suggest, compose, given
from mimkd_ray.search.tap_candidates import find_candidates, flat_space, widest
from mimkd_ray.search.trials import Value
from mimkd_ray.train.networks.teacher_head import teacher_head, trains_head
from mimkd_ray.train.records.outcomes import DAMAGED_CONFIG
from mimkd_ray.train.records.run_dir import write_json

MAY_CHANGE = ("hours", "gpu_hours", "finalists", "seeds")
"""Fields of the search's config that may differ when it is given again."""

SCORED_BY = {"data": "val_rows", "train": "eval_every"}
"""Fields that may change while a run is trained, but not in a search: they say on what and when trials are judged."""

UNREAD = {
    "launch": "given their resources by tune.with_resources",
    "run": "kept and named by Ray Tune's RunConfig",
    "compare": "single runs",
}
"""Sections of a config that a trial does not read, and why."""


class Made(NamedTuple):
    """The config of a trial, and those of its hyperparameters that count in it."""

    config: Config
    params: dict[str, Value]


class TrialConfigs:
    """The map from a trial's hyperparameters to its config, by search spaces. It can be pickled."""

    def __init__(self, base: Config, spaces: Sequence[Space]) -> None:
        """``base`` is what trials share, from :func:`trial_config`."""
        self.base = base
        data = open_data(base.data)
        if not data.judged:
            raise UserError(
                f"nothing in the validation set of {base.data.root} has a label, by which a search could judge: name a "
                "labelled split with --data.val-split"
            )
        head = teacher_head(base, data)
        self.candidates = find_candidates(base, data.num_classes, head.count)
        self.head_learns = trains_head(base, head.shared)
        self.spaces = tuple(spaces)

    def build(self, trial: Suggest) -> Config:
        """Ask for every value of a trial, and return its config."""
        return compose(self.spaces, self.base, self.candidates)(trial)

    def ask(self, trial: Suggest) -> None:
        """Ask for every value of a trial: the define-by-run function that Ray Tune's OptunaSearch takes."""
        self.build(trial)

    def widest(self) -> Config:
        """Return a config that reads everything of the teacher that any trial may read, and trains it as the recipe
        says."""
        return replace(widest(self.build, self.candidates), optim=self.base.optim)

    def check(self, params: Iterable[str]) -> None:
        """Raise UserError for a value that the spaces do not ask for: it would change nothing."""
        for name in params:
            if name not in self.asked:
                raise UserError(
                    f"hyperparameter {name!r} is asked for by no space{nearest(name, self.asked)} (they ask for "
                    f"{', '.join(self.asked)}): leave it out; a field of the config needs a space of its own"
                )

    @cached_property
    def asked(self) -> dict[str, Options]:
        """All values that any trial may ask for, without conditions: see `flat_space`. To find them takes a second."""
        return flat_space(self.build)

    def __call__(self, params: Mapping[str, Any]) -> Made:
        """Return the config of these values."""
        trial = given(params)
        return Made(self.build(trial), trial.params)


class FieldConfigs:
    """The map from values of config fields, by dotted name or nested, to a trial's config."""

    def __init__(self, base: Config) -> None:
        self.base = base

    def check(self, names: Iterable[str]) -> None:
        """Raise UserError for a name that is no field, or none that a trial reads."""
        known = dict(dotted(to_dict(self.base)))
        for name, (section, *_) in ((name, name.split(".")) for name in names):
            if name not in known:
                raise UserError(f"hyperparameter {name!r} is no field of a config{nearest(name, known)}")
            if section in UNREAD:
                raise UserError(f"hyperparameter {name!r} would change nothing: trials are {UNREAD[section]}")

    def __call__(self, params: Mapping[str, Any]) -> Made:
        """Return the base with these fields changed. Raises UserError for a name that is no field."""
        # Draws from NumPy's arrays are NumPy's scalars.
        flat = {name: item.item() if isinstance(item, np.generic) else item for name, item in dotted(params)}
        self.check(flat)
        return Made(from_dict(Config, _changed(to_dict(self.base), flat)), flat)


def trial_config(config: Config, search: SearchConfig) -> Config:
    """Return the config that all trials share: the recipe with a held-out part, views of one seed, and the trial's
    length, to which a step schedule and its warm-up are shortened."""
    config = plain(config)
    epochs = search.epochs or config.train.epochs
    share = epochs / config.train.epochs
    milestones = {round(epoch * share) for epoch in config.optim.milestones}  # several may round to the same epoch
    optim = replace(
        config.optim,
        milestones=tuple(sorted(milestones - {0})),
        warmup_epochs=config.optim.warmup_epochs * share,
    )
    return replace(
        config,
        data=replace(config.data, holdout=config.data.holdout or search.holdout, view_seed=config.view_seed),
        train=replace(config.train, epochs=epochs, eval_every=config.train.eval_every or 1),
        optim=optim if share != 1 else config.optim,
        launch=replace(config.launch, workers=search.workers),
        run=RunConfig(
            # Ray Tune logs to TensorBoard, and keeps copies of the newest state.
            keep_checkpoints=2 if search.pack > 1 or search.workers > 1 else 1,
            checkpoint_minutes=config.run.checkpoint_minutes,
            keep_best=True,
            tensorboard=search.workers > 1,
        ),
    )


def final_config(job: SearchJob, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config to train with through `jobs/`: the search's choice with the recipe's own data, length and
    schedule, in a run directory of its own.

    ``chosen`` is a trial's config; every field that differs from the config shared by all trials is part of the choice.
    """
    own = plain(job)
    own = replace(own, run=replace(own.run, name="", overwrite=False))  # those belong to the search
    shared = dict(dotted(to_dict(trial_config(job, job.search))))
    return _changed(to_dict(own), {name: value for name, value in dotted(chosen) if value != shared[name]})


def plain(config: Config) -> Config:
    """Return a job without its search and its comparison. A teacher that is trained first keeps the recipe's rate,
    whatever the student's will be."""
    own = Config(**{f.name: getattr(config, f.name) for f in fields(Config)} | {"compare": CompareConfig()})
    if not own.teacher.trains:
        return own
    return replace(own, teacher=replace(own.teacher, lr=own.teacher.lr or own.optim.lr))


def _changed(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON form of a config with fields changed, by their dotted names."""
    for name, value in changes.items():
        *sections, last = name.split(".")
        reduce(getitem, sections, config)[last] = value
    return config


def claim(job: SearchJob, folder: str, write: bool = True) -> None:
    """Write the search's config.json; without ``write`` only look. Raises UserError for a folder that was begun with
    another search."""
    url = storage.join(folder, "config.json")
    old = read_json(url, {"data": dict, "train": dict}, DAMAGED_CONFIG)
    if old is not None and not isinstance(old.get("search"), dict):
        raise UserError(f"{folder} is no search's: its config.json has no 'search'; pass another --run.name")
    if old is not None:
        refuse_changes(folder, differences(_lasting(old), _lasting(to_dict(job))))
    if write:
        write_json(url, to_dict(job))


def _lasting(value: Mapping[str, Any]) -> dict[str, Any]:
    kept = training_part({name: fields for name, fields in value.items() if name != "search"})
    known = to_dict(SearchJob())
    for section, name in SCORED_BY.items():
        kept[section][name] = filled(value[section], known[section])[name]
    search = filled(value["search"], known["search"])
    search = {name: item for name, item in search.items() if name not in MAY_CHANGE}
    return json.loads(json.dumps(kept | {"search": search}))


def search_digest(job: SearchJob) -> str:
    """Return the hex digest of a search's lasting fields. It names the folder, so that the same command finds it
    again."""
    return digest_of(_lasting(to_dict(job)), _lasting(to_dict(SearchJob())))
