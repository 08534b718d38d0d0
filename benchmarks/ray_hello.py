"""The smallest Ray Train job: two workers that record the time. `ray_overhead.py` compares our start with it.

python benchmarks/ray_hello.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def first_step(setup: dict[str, Any]) -> None:
    """Record the time: the training function of the job."""
    if ray.train.get_context().get_world_rank() == 0:
        marks = {**setup["marks"], "first_step": time.time()}
        Path(setup["file"]).write_text(json.dumps(marks))


def main() -> None:
    """Start Ray as a beginner does, and a trainer on two workers."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("folder", type=Path)
    folder = options.parse_args().folder.absolute()
    marks = {"imported": time.time()}
    ray.init()
    marks["connected"] = time.time()
    TorchTrainer(
        first_step,
        train_loop_config={"marks": marks, "file": str(folder / "marks.json")},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(folder)),
    ).fit()


if __name__ == "__main__":
    main()
