"""Section `train`: length, batch, precision, engine and evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mimkd_ray.config.form.values import FROM_0, FROM_1, LARGEST, check_values
from mimkd_ray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision, engine and evaluations of training."""

    epochs: int = 240
    """Passes over the training rows. A run may get more, except with a cosine or a schedule of the loss."""
    max_steps: int = 0
    """Stop after this many steps (for a trial run; the schedule is still that of `epochs`); 0 trains to the end. A run
    may get more."""
    lanes: int = 1
    """Fixed slices of each global batch: batch norm and negatives are per lane, whatever the number of workers."""
    lane_batch: int = 64
    """Images in a lane; the global batch is lanes * lane_batch."""
    seed: int = 0
    """Seed of the student's initialisation, the order, the views and the model's random numbers: 0 to 2**64 - 1."""
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    """Autocast of the networks; auto: bf16 on a GPU that supports it, else float32. Losses always compute in float32.
    """
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory layout of images and kernels; auto: channels-last, except for float64 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of student, loss and teacher, before a step is captured, if a C++ compiler is found. auto: on a
    GPU, in runs of 10,000 steps and more for each student of a pack, because compiling takes a minute. on: always."""
    engine: Literal["auto", "plain", "captured"] = "auto"
    """captured: record the step, and the forward pass of evaluations, once as CUDA graphs and replay them, if possible;
    on a CPU the same code is called each time. plain: operation by operation. auto: captured on a GPU by one worker,
    also of Ray or torchrun, and plain by several."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the student with this decay, and evaluate and export it; 0 is off."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    eval_every: int = 1
    """Epochs between two evaluations; 0 evaluates at the end only."""
    eval_batch: int = 0
    """Images in an evaluation batch; 0: as many as in a lane."""
    information_rows: int = 2048
    """Held-out rows per worker on which mutual information is estimated at an evaluation; 0: no estimate."""

    def __post_init__(self) -> None:
        sizes = {"epochs": (1, 10**6), "max_steps": FROM_0, "lanes": (1, 65_536), "lane_batch": (-LARGEST, 10**6)}
        often = {"log_every": FROM_1, "eval_every": FROM_0}
        check_values(self, "train", information_rows=FROM_0, eval_batch=(0, 10**6), **sizes, **often)
        if self.lane_batch < 2:
            raise UserError(f"train.lane_batch is {self.lane_batch}: a lane needs 2 images, or it has no negatives")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"train.ema_decay is {self.ema_decay}; it must lie in [0, 1)")
