"""Section `search`: the space, the algorithm, the budget, and the trials and their score."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from mimkd_ray.config.config import Config
from mimkd_ray.config.form.values import FROM_0, FROM_1, LARGEST, check_values
from mimkd_ray.errors import UserError, count, nearest

Metric = Literal["top1", "cross_entropy", "knn"]
Scheduler = Literal["asha", "hyperband", "pbt", "pb2", "median", "none"]

ALGORITHMS = ("tpe", "random", "grid", "hyperopt", "ax", "bohb")
PACKAGES = {"hyperopt": "hyperopt", "ax": "ax", "bohb": "hpbandster"}
"""What Ray Tune's searchers need."""
POPULATION = ("pbt", "pb2")
"""Schedulers that draw the first values themselves, and change them on the way."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A search for the best critic, taps, bound, negatives, weights and learning rate of a teacher and a student."""

    space: tuple[str, ...] = ("temperature", "taps", "weights")
    """Fields to search: names of mimkd_ray/search/spaces.py, or package.module:function."""
    algorithm: str = "tpe"
    """tpe: Optuna's tree-structured Parzen estimator. random: independent draws. grid: every combination of `points`
    values of each number, in order, the first `trials` of them. hyperopt, ax, bohb: those searchers of Ray Tune.
    package.module:function: called with this section, it returns a searcher of Ray Tune."""
    points: int = 4
    """grid: number of values of each number, evenly spaced on the number's own scale."""
    scheduler: Scheduler = "asha"
    """Ray Tune's scheduler. asha: asynchronous successive halving stops the trials that are behind. hyperband: its
    synchronous brackets. median: those below the median stop. pbt, pb2: a population, of which the worst go on from
    the best with other numbers. none: every trial runs to its end."""
    grace: int = 1
    """asha, median: fewest epochs of a trial. pbt, pb2: epochs between two perturbations."""
    reduction: int = 3
    """asha, hyperband: one in this many trials continues past each rung (grace, grace * reduction, ... epochs)."""
    metric: Metric = "top1"
    """Quantity to optimise, measured on the held-out part of the training set. knn: top-1 of the features by nearest
    neighbours, with data.labels none or partial."""
    trials: int = 24
    """Configurations to try, or the size of the population; 0: as many as the other budgets allow."""
    hours: float = 0.0
    """Hours after which no trial begins and the running ones end at their next evaluation; 0: no limit. Time
    before a restart counts, and that of preparations and finals."""
    gpu_hours: float = 0.0
    """Limit on the sum over trials of GPUs times hours, with the same effect as `hours`; 0: no limit."""
    holdout: float = 0.1
    """Share of the training rows, of each class, on which trials are scored; the validation set is never used."""
    epochs: int = 0
    """Epochs of a trial and of its schedule; 0: those of the recipe. best.json has the recipe's."""
    pack: int = 1
    """Students that are trained in one process on the same batches and the same teacher pass."""
    workers: int = 1
    """Workers of a trial. 1: a process with a share of a node. More: a Ray Train run with this many workers."""
    concurrent: int = 0
    """Trials (packs) that run at the same time; 0: as many as fit in the cluster. A higher number makes an autoscaler
    add nodes. pbt, pb2: members run as room comes, whatever is given."""
    cpus_per_trial: float = 0.0
    """CPUs of a trial of one worker; 0: 1 on CPU, and with a GPU its share of the CPUs."""
    gpus_per_trial: float = 0.0
    """GPUs of a trial of one worker, such as 0.25; 0: 1 if the cluster has any and launch.gpu allows."""
    retries: int = 2
    """Most restarts, from its last checkpoint, of a trial whose worker or node was lost."""
    finalists: int = 3
    """Best configurations that are trained again with new seeds; 0: none, the best trial is the result."""
    seeds: int = 3
    """Seeds of each finalist."""
    seed: int = 0
    """Seed of the algorithm: 0 to 2**64 - 1."""

    def __post_init__(self) -> None:
        budget = {"trials": (0, 10**6), "hours": FROM_0, "gpu_hours": FROM_0, "epochs": FROM_0, "retries": FROM_0}
        shape = {"pack": (1, 1024), "concurrent": (0, 100_000), "cpus_per_trial": FROM_0, "gpus_per_trial": FROM_0}
        finals = {"finalists": (0, 10_000), "seeds": (0, 10_000)}
        halving = {"points": FROM_1, "grace": FROM_1, "reduction": (2, LARGEST)}
        check_values(self, "search", workers=FROM_1, **budget, **shape, **finals, **halving)
        if not self.space:
            raise UserError("search.space is empty: name what to search, such as --search.space temperature taps")
        if not (self.trials or self.hours or self.gpu_hours):
            raise UserError("search.trials, hours and gpu_hours are all 0: the search would never end; give one")
        if self.workers > 1 and self.pack > 1:
            raise UserError(
                f"search.workers is {self.workers} and search.pack {self.pack}: a pack trains in one process; give 1 "
                "to one of them"
            )
        if self.algorithm not in ALGORITHMS and ":" not in self.algorithm:
            raise UserError(
                f"search.algorithm {self.algorithm!r} is unknown{nearest(self.algorithm, ALGORITHMS)} (algorithms: "
                f"{', '.join(ALGORITHMS)}, package.module:function)"
            )
        self._check_scheduler()
        if self.finalists and not self.seeds:
            raise UserError("search.seeds is 0: give the seeds of each finalist, or pass --search.finalists 0")
        if not 0 <= self.holdout < 1:
            raise UserError(f"search.holdout is {self.holdout}: give a share above 0 and below 1, such as 0.1")

    def _check_scheduler(self) -> None:
        """Raise UserError for a scheduler that does not go with the algorithm, packs or several workers."""
        name = self.scheduler
        if self.algorithm == "bohb" and name != "hyperband":
            raise UserError(f"search.algorithm bohb goes with --search.scheduler hyperband, and it is {name}")
        if name in POPULATION and self.algorithm not in ("tpe", "random"):
            raise UserError(
                f"search.scheduler {name} draws its population itself, and search.algorithm is {self.algorithm}: leave "
                "it out"
            )
        if name in POPULATION and not self.trials:
            raise UserError(f"search.scheduler {name} needs the size of its population: give --search.trials")
        if self.pack > 1 and (name not in ("asha", "none") or self.algorithm not in ("tpe", "random", "grid")):
            raise UserError(
                f"search.pack is {self.pack}, and a pack halves by itself and asks Optuna: give --search.scheduler "
                f"asha or none (it is {name}) and --search.algorithm tpe, random or grid (it is {self.algorithm})"
            )
        if self.workers > 1 and name in (*POPULATION, "hyperband"):
            raise UserError(
                f"search.scheduler {name} moves checkpoints between trials, and those of {self.workers} workers have "
                "their own: give --search.scheduler asha, median or none, or --search.workers 1"
            )


@dataclass(frozen=True, kw_only=True)
class SearchJob(Config):
    """A recipe with a search: the fields that all trials share, and the search over the others."""

    search: SearchConfig = field(default_factory=SearchConfig)
    """The search."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.holdout and not self.search.holdout:
            raise UserError(
                "search.holdout and data.holdout are 0: trials are scored on a part of the training set, never on the "
                "validation set; pass --search.holdout 0.1"
            )
        if self.train.max_steps:
            raise UserError(
                f"train.max_steps is {self.train.max_steps}, and trials end after whole epochs: leave it out; short "
                "trials are made by --search.epochs"
            )
        if self.search.metric == "knn" and self.data.labels == "all":
            raise UserError(
                "search.metric is knn, which is measured where labels are missing, and data.labels is all: pass "
                "--search.metric top1, or --data.labels none"
            )
        epochs = self.search.epochs or self.train.epochs
        if self.search.grace > epochs and self.search.scheduler not in ("hyperband", "none"):
            raise UserError(
                f"search.grace is {self.search.grace}, and a trial has {count(epochs, 'epoch')}: search.scheduler "
                f"{self.search.scheduler} would do nothing; give fewer, or --search.scheduler none"
            )
        if self.search.workers > self.train.lanes:
            raise UserError(
                f"search.workers is {self.search.workers} and train.lanes {self.train.lanes}: a worker needs a lane of "
                f"its own; pass --train.lanes {self.search.workers}"
            )


def search_job(config: Config, **changes: Any) -> SearchJob:
    """Return a recipe's config with the fields of a search added."""
    own = {f.name: getattr(config, f.name) for f in fields(Config)}
    return SearchJob(**(own | changes))
