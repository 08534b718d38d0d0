"""Evaluation on Ray workers: each takes its share of the images, and the first writes the files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.form.json_form import from_dict, to_dict
from mimkd_ray.config.jobs.evaluate import EvaluateJob
from mimkd_ray.errors import UserError
from mimkd_ray.evaluation.measure import FIGURES, measure, save
from mimkd_ray.json_files import read_json
from mimkd_ray.on_ray.train_workers import fit, joined
from mimkd_ray.on_ray.worker_context import context_of
from mimkd_ray.train.start_times import StartTimes

MOST_WORKERS = 65_536
"""Training has at most as many workers as lanes; an evaluation has no lanes."""


def evaluate_worker(setup: dict[str, Any]) -> None:
    """Evaluate in a Ray worker."""
    with context_of(setup) as context:
        if context is not None:
            trained_on = from_dict(Config, setup["trained_on"]) if setup["trained_on"] else None
            job = from_dict(EvaluateJob, setup["job"])
            storage.be_patient(job.storage.patience_minutes)
            found = measure(job, context, setup["run"], trained_on, setup["run_dir"])
            if context.rank == 0:
                save(found, setup["run_dir"])


def evaluate_on_ray(job: EvaluateJob, out: str, run_dir: str, trained_on: Config | None) -> dict[str, Any]:
    """Evaluate on the workers that ``job.launch`` asks for, and return the figures, which lie in ``out``. Raises
    UserError, also where this process does not see what the workers wrote."""
    times = StartTimes()
    setup = {"job": to_dict(job), "run": run_dir, "trained_on": to_dict(trained_on) if trained_on else None}
    placed = replace(job, train=replace(job.train, lanes=MOST_WORKERS))
    with joined(job, out, times) as own:
        fit(evaluate_worker, setup, placed, out, own, times)
    figures = read_json(storage.join(out, FIGURES))
    if figures is None:
        raise UserError(
            f"the workers wrote no {FIGURES} that is seen here, in {out}: on several nodes --eval.out must be a folder "
            "or URL that all of them see, such as s3://bucket/evaluation"
        )
    return figures
