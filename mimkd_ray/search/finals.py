"""The best configurations, trained again with new seeds, to measure how much of a search's best result is luck.

Finalists are scored on the held-out part of the training set, as trials are; the validation set is not used.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import Config, SearchJob
from mimkd_ray.config.form.json_form import from_dict
from mimkd_ray.search.configs import Made, final_config
from mimkd_ray.search.trial_files import FINALS, Table, point_of
from mimkd_ray.search.trials import Final, Trial, direction
from mimkd_ray.train.records.run_dir import write_json

FIGURES = ("top1", "top5", "cross_entropy", "knn")
"""Figures of a run that finals.json has, those that were measured."""


class Finals:
    """The runs of the finalists, by number: a map from {"run": number} to its config. It can be pickled."""

    def __init__(self, job: SearchJob, table: Table) -> None:
        search = job.search
        self.metric, self.seeds, self.retries = search.metric, search.seeds, search.retries
        self.chosen: dict[int, Trial] = {trial.number: trial for trial in table.ranked()[: search.finalists]}
        self.runs = [(number, seed) for number in self.chosen for seed in range(1, search.seeds + 1)]

    @property
    def name(self) -> str:
        """The name of their experiment: other finalists have another one."""
        return f"finals-{hashlib.sha256(json.dumps(self.runs).encode()).hexdigest()[:8]}"

    def __call__(self, params: Mapping[str, Any]) -> Made:
        """Return the config of a run. Seeds are new: the seed with which a trial was chosen is not among them. Views
        keep their seed, so that all runs read one cache."""
        number, seed = self.runs[params["run"]]
        config = from_dict(Config, self.chosen[number].config)
        return Made(replace(config, train=replace(config.train, seed=config.train.seed + seed)), dict(params))

    def publish(self, job: SearchJob, folder: str, results: Mapping[int, Mapping[str, Any]]) -> list[Final]:
        """Write best.json with the config of the finalist with the best mean (finals.json has them all), and return the
        finalists, best first. Those with a failed run are left out. ``results``: last figures by number of run."""
        found: dict[int, dict[int, dict[str, float]]] = {}
        for number, figures in sorted(results.items()):
            trial, seed = self.runs[number]
            if "failed" not in figures and math.isfinite(point_of(figures).value(self.metric)):
                found.setdefault(trial, {})[seed] = {name: figures[name] for name in FIGURES if name in figures}
        means = {
            trial: statistics.fmean(each[self.metric] for each in seeds.values())
            for trial, seeds in found.items()
            if len(seeds) == self.seeds
        }
        order = sorted(means, key=lambda trial: means[trial], reverse=direction(self.metric) == "maximize")
        lines = [{"trial": trial, "mean": means[trial], "seeds": found[trial]} for trial in order]
        if order:
            write_json(storage.join(folder, FINALS), {"metric": self.metric, "name": self.name, "finals": lines})
            write_json(storage.join(folder, "best.json"), final_config(job, self.chosen[order[0]].config))
        shown = "knn" if self.metric == "knn" else "top1"
        return [
            Final(trial=trial, seeds=tuple(found[trial]), top1=tuple(each[shown] for each in found[trial].values()))
            for trial in order
        ]
