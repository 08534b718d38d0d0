"""The best configurations, trained again with new seeds, to measure how much of a search's best result is luck.

Finalists are scored on the held-out part of the training set, as trials are; the validation set is not used.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.json_form import from_dict, to_dict
from mimkd_ray.json_files import read_if_sound
from mimkd_ray.search.driver import Search, final_config
from mimkd_ray.search.trial_folders import Ended, Planned
from mimkd_ray.search.trials import Final, direction
from mimkd_ray.train.records.run_dir import write_json


class Finals:
    """The runs of the finalists, handed out like trials. A finished run is not repeated."""

    def __init__(self, search: Search) -> None:
        self.search, self.config = search, search.config
        self.runs: list[tuple[int, int]] = [
            (trial.number, seed)
            for trial in search.ranked()[: self.config.finalists]
            for seed in range(1, self.config.seeds + 1)
        ]
        self._left = [number for number in range(len(self.runs)) if self._result(number) is None]

    def place(self, number: int) -> str:
        """Return the directory of a run."""
        trial, seed = self.runs[number]
        return storage.join(self.search.folder, "finals", f"{trial:04d}-seed{seed:02d}")

    def label(self, number: int) -> str:
        """Return the name of a run for display."""
        trial, seed = self.runs[number]
        return f"trial {trial} with seed {seed}"

    def _result(self, number: int) -> Mapping[str, Any] | None:
        return read_if_sound(storage.join(self.place(number), "result.json"), ("student",), "trained again")

    def next(self) -> list[Planned]:
        """Return the next run, empty if there is none. Seeds are new: the seed with which a trial was chosen is not
        among them. Views keep their seed, so that all runs read one cache."""
        if not self._left:
            return []
        number = self._left.pop(0)
        trial, seed = self.runs[number]
        config = from_dict(Config, self.search.trials[trial].config)
        config = replace(config, train=replace(config.train, seed=config.train.seed + seed))
        return [Planned(number, number, self.search.trials[trial].params, to_dict(config))]

    def heard(self, number: int, figures: Mapping[str, Any], alone: bool = True) -> Ended | None:
        """Return None: every finalist runs to its end."""
        return None

    def ended(self, number: int, ended: Ended, gpus: float = 0.0) -> bool:
        """Record a run's end; return True."""
        return True

    def publish(self) -> list[Final]:
        """Write best.json with the config of the finalist with the best mean (finals.json has them all), and return the
        finalists, best first. Those with a failed run are left out."""
        found: dict[int, dict[int, Mapping[str, float]]] = {}
        for number, (trial, seed) in enumerate(self.runs):
            result = self._result(number)
            if result is not None:
                found.setdefault(trial, {})[seed] = result["student"]
        whole = {trial: seeds for trial, seeds in found.items() if len(seeds) == self.config.seeds}
        means = {
            trial: statistics.fmean(student[self.config.metric] for student in seeds.values())
            for trial, seeds in whole.items()
        }
        order = sorted(whole, key=lambda trial: means[trial], reverse=direction(self.config.metric) == "maximize")
        lines = [{"trial": trial, "mean": means[trial], "seeds": whole[trial]} for trial in order]
        write_json(storage.join(self.search.folder, "finals.json"), {"metric": self.config.metric, "finals": lines})
        if order:
            chosen = self.search.trials[order[0]].config
            write_json(storage.join(self.search.folder, "best.json"), final_config(self.search.job, chosen))
        return [
            Final(
                trial=trial,
                seeds=tuple(whole[trial]),
                top1=tuple(student["top1"] for student in whole[trial].values()),
            )
            for trial in order
        ]
