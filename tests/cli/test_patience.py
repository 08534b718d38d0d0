"""--storage.patience-minutes holds in every job, and in every process of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import tiny_config
from tiny_search import tiny_job

import mimkd_ray
from mimkd_ray.cli import cache_teacher, evaluate
from mimkd_ray.cli import search as search_line
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.config.jobs.evaluate import evaluate_job
from mimkd_ray.on_ray import cache_actors, evaluate_workers, train_workers
from mimkd_ray.on_ray.search import tune_search, tune_trials
from mimkd_ray.retries import PATIENCE
from mimkd_ray.secret_urls import Carried

CONFIG = tiny_config(storage={"patience_minutes": 3.5}, launch={"backend": "local"})
JOB = evaluate_job(CONFIG)


class ReachedError(Exception):
    """The first thing that a job may wait for."""


JOBS: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "a cache": (cache_teacher, "Setup", lambda: cache_teacher.make(CONFIG)),
    "an evaluation": (evaluate, "local_context", lambda: evaluate.evaluate(JOB)),
    "a search": (
        search_line,
        "find_spaces",
        lambda: search_line.search(tiny_job("x", {"storage": {"patience_minutes": 3.5}})),
    ),
    "a search from Python": (tune_search, "search", lambda: mimkd_ray.search(CONFIG)),
    "a builder": (cache_actors, "Setup", lambda: cache_actors._setup(to_dict(CONFIG), 1)),
    "a worker": (train_workers, "run_job", lambda: train_workers.worker({"config": to_dict(CONFIG), "run_dir": ""})),
    "a worker that evaluates": (
        evaluate_workers,
        "measure",
        lambda: evaluate_workers.evaluate_worker({"job": to_dict(JOB), "trained_on": None, "run": "", "run_dir": ""}),
    ),
    "a search's preparation": (
        tune_trials,
        "trial_device",
        lambda: tune_trials.prepare_remotely(CONFIG, "x", Carried()),
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_patience_is_told_before_anything_is_read(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, first, start = JOBS[job]

    def reached(*_: Any, **__: Any) -> Any:
        raise ReachedError(os.environ[PATIENCE])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PATIENCE, "10")
    monkeypatch.setattr(cache_actors.torch, "set_num_threads", print)
    monkeypatch.setattr(cache_actors.ray, "get_gpu_ids", list)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for workers in (train_workers, evaluate_workers):
        worker = SimpleNamespace(device=SimpleNamespace(type="cuda"))
        monkeypatch.setattr(workers, "context_of", lambda _, worker=worker: nullcontext(worker))
    monkeypatch.setattr(module, first, reached)
    with pytest.raises(ReachedError, match=r"^3\.5$"):
        start()
