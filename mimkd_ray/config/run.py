"""Section `run`: the run directory and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mimkd_ray.config.form.values import FROM_0, FROM_1, check_values
from mimkd_ray.places import check_name
from mimkd_ray.secret_urls import hide


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run directory and its checkpoints."""

    root: str = "runs"
    """Folder or URL that contains the run directories."""
    name: str = ""
    """Name of the run's directory; unset: teacher, student, data and a digest of the fields
    that determine the training."""
    overwrite: bool = False
    """Delete what a run has written in the directory and start anew, instead of resuming or repeating the result. Other
    files stay; a directory that is no run's is refused."""
    extend: bool = False
    """Go on after the end of run.name with another configuration: more epochs, another rate, more data. A new leg
    starts in NAME-leg2, from the weights and the optimiser's state of the last one, with a schedule of its own."""
    start_from: str = ""
    """Directory or URL of the run whose last state this one starts from; run.extend sets it."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints; 0: not by epochs."""
    checkpoint_steps: int = 0
    """Steps between two checkpoints; 0: not by steps."""
    checkpoint_minutes: float = 1.0
    """Most minutes between two checkpoints; 0: not by time. A stop or preemption notice always writes one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = False
    """Also keep the student of the best evaluation so far: best.safetensors and, with its figures, best.json."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    loggers: tuple[Literal["mlflow", "wandb", "comet"], ...] = ()
    """Loggers that also receive every number of metrics.jsonl (of a search every evaluation, by Ray's callbacks); each
    needs its package, and reads its own settings (MLFLOW_TRACKING_URI, WANDB_API_KEY, COMET_API_KEY)."""
    log_samples: bool = False
    """Write samples.jsonl: step, lane, view and sample ids of every training batch."""

    def __post_init__(self) -> None:
        often = {"checkpoint_every": FROM_0, "checkpoint_steps": FROM_0, "checkpoint_minutes": FROM_0}
        check_values(self, "run", keep_checkpoints=FROM_1, **often)
        hide(self, "root", "start_from")
        if self.name:
            check_name("run.name", self.name)
