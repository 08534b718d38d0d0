"""A whole run on a Dataset of your own under Ray: each worker calls the function that `data.root` names.

python examples/own_dataset_on_ray.py [FOLDER OF RUNS]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from own_dataset import Digits
from torch.utils.data import Subset

import mimkd_ray


def sets() -> tuple[Subset, Subset]:
    """Return the training and the validation set. On a cluster this opens what every node can reach."""
    digits = Digits()
    return Subset(digits, range(1400)), Subset(digits, range(1400, len(digits)))


def main(root: str, epochs: int = 12, workers: int = 2) -> dict[str, Any]:
    """Train a teacher and a student on ``workers`` workers, or go on. Returns what result.json says.

    As a job: ray job submit --working-dir . -- python jobs/imagenet.py --data.root my_module:sets
    """
    recipe = mimkd_ray.demo()
    config = replace(
        recipe,
        recipe="own_dataset_on_ray",
        data=replace(recipe.data, root="own_dataset_on_ray:sets", subset=0),
        teacher=replace(recipe.teacher, epochs=epochs),
        train=replace(recipe.train, epochs=epochs, lanes=workers),
        compare=mimkd_ray.CompareConfig(),
        run=replace(recipe.run, root=root),
        launch=mimkd_ray.LaunchConfig(workers=workers, cpus_per_worker=1),
    )
    return mimkd_ray.run(config)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs")
