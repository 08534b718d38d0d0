"""The runs of the CIFAR-100 study: teachers, tuning trials, students; and their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from study_arms import ABLATIONS, FACTORS, METHODS, tuned

from mimkd_ray.config import Config, LaunchConfig, RunConfig
from mimkd_ray.json_files import read_json
from mimkd_ray.recipes import CIFAR_RECIPES, cifar100
from mimkd_ray.train.trained_teacher import teacher_config

SHORT = "resnet20_resnet8"
HOLDOUT = 0.1
TUNING_SEED = 1000  # of tuning trials; students have seeds from 0


@dataclass(frozen=True)
class Plan:
    """The runs of a study, and their directories."""

    base: dict[str, Config]  # by pair
    methods: Sequence[str]
    ablations: Sequence[str]
    seeds: int
    tuning: int
    root: Path

    def teachers(self) -> dict[str, tuple[Config, Path]]:
        """Return the run that trains the teacher of each pair; pairs with one teacher share it."""
        return {
            pair: (replace(teacher_config(config), recipe="teacher"), self.root / config.teacher.name.replace("/", "-"))
            for pair, config in self.base.items()
        }

    def config(self, pair: str, method: str, factor: float, seed: int) -> Config:
        """Return one student's run."""
        base = self.base[pair]
        weights = str(self.teachers()[pair][1] / "student.safetensors")
        base = replace(
            base,
            teacher=replace(base.teacher, weights=weights),
            train=replace(base.train, seed=seed),
            data=replace(base.data, subset_seed=seed),
        )
        if method in ABLATIONS:
            base = tuned(replace(base, loss=METHODS["mimkd"](base.loss)), "mimkd", factor)
            return replace(base, loss=ABLATIONS[method](base.loss))
        return tuned(replace(base, loss=METHODS[method](base.loss)), method, factor)

    def trials(self, pair: str, method: str) -> dict[float, tuple[Config, Path]]:
        """Return the tuning trials by factor; an ablation has those of mimkd."""
        method = "mimkd" if method in ABLATIONS else method
        found = {}
        for factor in FACTORS[: self.tuning]:
            config = self.config(pair, method, factor, TUNING_SEED)
            config = replace(config, data=replace(config.data, holdout=HOLDOUT))
            found[factor] = (config, self.root / pair / "tuning" / f"{method}-x{factor:.2f}")
        return found

    def factor(self, pair: str, method: str) -> float:
        """Return the factor whose trial was best on held-out rows; of equal ones the first. Without trials 1."""
        trials = self.trials(pair, method)
        top1: dict[float, float] = {}
        for factor, (_, place) in trials.items():
            result = read_json(str(place / "result.json"))
            if result is None:
                raise SystemExit(f"{pair}, {method}: the tuning trial in {place} is not finished")
            top1[factor] = result["student"]["top1"]
        return max(top1, key=lambda factor: top1[factor]) if top1 else FACTORS[0]

    def final(self, pair: str, method: str, seed: int) -> tuple[Config, Path]:
        """Return the run of one seed with the tuned setting."""
        factor = self.factor(pair, method)
        return self.config(pair, method, factor, seed), self.root / pair / method / f"x{factor:.2f}-seed{seed:02d}"

    def runs(self) -> Iterator[tuple[str, Config, Path]]:
        """Yield all runs in order, each once the runs that it depends on are finished: (description, config,
        directory)."""
        for pair, (config, place) in self.teachers().items():
            yield f"{pair}: teacher {config.student.name}", config, place
        for pair in self.base:
            for method in self.methods:
                for factor, (config, place) in self.trials(pair, method).items():
                    yield f"{pair}: {method}, tuning, x {factor:.2f}", config, place
        for seed in range(self.seeds):
            for pair in self.base:
                for method in (*self.methods, *self.ablations):
                    yield f"{pair}: {method}, seed {seed}", *self.final(pair, method, seed)

    def total(self) -> int:
        """Return the number of runs."""
        return len(self.base) * (
            1 + self.tuning * len(self.methods) + self.seeds * (len(self.methods) + len(self.ablations))
        )


def short(data: str, root: Path, epochs: int, rows: int) -> Config:
    """Return the short study's student and teacher."""
    config = cifar100(SHORT, "resnet20", "resnet8")
    return replace(
        config,
        data=replace(config.data, root=data, subset=rows, resident="on"),
        teacher=replace(config.teacher, epochs=5, lr=0.1),
        optim=replace(config.optim, schedule="cosine"),
        train=replace(config.train, epochs=epochs or 10, eval_every=0),
        launch=LaunchConfig(backend="local"),
        run=RunConfig(root=str(root), checkpoint_every=0, checkpoint_minutes=5, tensorboard=False),
    )


def by_protocol(pair: str, data: str, root: Path, epochs: int) -> Config:
    """Return a pair of the standard protocol, shortened in proportion if ``epochs`` are given."""
    config = CIFAR_RECIPES[pair]()
    whole = config.train.epochs
    milestones = tuple(round(each * (epochs or whole) / whole) for each in config.optim.milestones)
    return replace(
        config,
        data=replace(config.data, root=data),
        loss=replace(config.loss, rival_warmup=config.loss.rival_warmup * (epochs or whole) / whole),
        optim=replace(config.optim, milestones=milestones),
        train=replace(config.train, epochs=epochs or whole, eval_every=0),
        launch=LaunchConfig(backend="local"),
        run=RunConfig(root=str(root), checkpoint_every=0, checkpoint_minutes=5, tensorboard=False),
    )
