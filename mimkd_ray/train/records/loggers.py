"""MLflow, Weights & Biases and Comet for a run: the numbers of metrics.jsonl, by the interface of each library.

The libraries read their own settings (MLFLOW_TRACKING_URI, WANDB_MODE, COMET_API_KEY ...). A run that goes on writes to
the same run of a logger, whose id is in loggers.json. A logger that fails ends nothing: training goes on without it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from mimkd_ray import console, storage
from mimkd_ray.config.form.json_form import dotted
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_if_sound, read_json
from mimkd_ray.user_functions import told

FILE = "loggers.json"

MODULES = {"mlflow": "mlflow", "wandb": "wandb", "comet": "comet_ml"}

PIP = {"ax": "ax-platform sqlalchemy", "hpbandster": "hpbandster ConfigSpace", "comet_ml": "comet-ml"}
"""Names for pip, where they differ from the module's."""


def require(module: str, flag: str) -> None:
    """Raise UserError where a package that the flag needs is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{flag}: {module} is not installed; pip install {PIP.get(module, module)}")


def require_loggers(names: Sequence[str]) -> None:
    """Raise UserError where a logger's package is missing."""
    for name in names:
        require(MODULES[name], f"--run.loggers {name}")


class Opened(NamedTuple):
    """A run of a logger."""

    id: str
    write: Callable[[dict[str, float], int], Any]
    """Called with numbers and the step."""
    close: Callable[[], Any]


def _mlflow(project: str, name: str, known: str | None, params: Mapping[str, Any]) -> Opened:
    import mlflow

    client = mlflow.MlflowClient()
    own = known
    if own is None:
        own = client.create_run(mlflow.set_experiment(project).experiment_id, run_name=name).info.run_id
        mlflow.log_params(dict(params), run_id=own)
    return Opened(
        own,
        lambda values, step: mlflow.log_metrics(values, step=step, run_id=own),
        lambda: client.set_terminated(own),
    )


def _wandb(project: str, name: str, known: str | None, params: Mapping[str, Any]) -> Opened:
    import wandb

    run = wandb.init(project=project, name=name, id=known, resume="allow", config=dict(params))
    return Opened(run.id, lambda values, step: run.log(values, step=step), run.finish)


def _comet(project: str, name: str, known: str | None, params: Mapping[str, Any]) -> Opened:
    os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # else it patches torch; Ray's callback does the same
    import comet_ml

    quiet = comet_ml.ExperimentConfig(name=name, log_code=False, auto_output_logging=False)
    run = comet_ml.start(project_name=project, experiment_key=known, experiment_config=quiet)
    run.log_parameters(dict(params))
    return Opened(run.get_key(), lambda values, step: run.log_metrics(values, step=step), run.end)


_OPEN = {"mlflow": _mlflow, "wandb": _wandb, "comet": _comet}


class Loggers:
    """The loggers of one run."""

    def __init__(self, run_dir: str, names: Sequence[str]) -> None:
        require_loggers(names)
        self._opened: dict[str, Opened] = {}
        if not names:
            return
        url = storage.join(run_dir, FILE)
        ids = read_if_sound(url, (), "the loggers begin new runs") or {}
        config = read_json(storage.join(run_dir, "config.json")) or {}
        project, own = f"mimkd-{config.get('recipe', 'custom')}", run_dir.rstrip("/").rpartition("/")[2]
        for name in names:
            self._try(name, partial(self._open, name, project, own, ids, config))
        storage.write_bytes(url, json.dumps(ids).encode())

    def _open(self, name: str, project: str, own: str, ids: dict[str, str], config: Mapping[str, Any]) -> None:
        self._opened[name] = _OPEN[name](project, own, ids.get(name), dict(dotted(config)))
        ids[name] = self._opened[name].id

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers."""
        for name, opened in list(self._opened.items()):
            self._try(name, partial(opened.write, dict(values), step))

    def close(self) -> None:
        """End the loggers' runs."""
        for name, opened in list(self._opened.items()):
            self._try(name, opened.close)

    def _try(self, name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # a server's, which must not cost the training
            console.line(f"the run goes on without {name}: {told(error)}")
            self._opened.pop(name, None)
