"""Several arms over several seeds, one after the other in the same workers, compared seed by seed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from mimkd_ray import storage
from mimkd_ray.config import CompareConfig, Config
from mimkd_ray.config.compare import Arm
from mimkd_ray.config.digest import digest
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.train.distributed import Context, ask_first
from mimkd_ray.train.loop import train
from mimkd_ray.train.records.outcomes import RESULT
from mimkd_ray.train.records.progress import say
from mimkd_ray.train.records.run_dir import write_json
from mimkd_ray.train.records.same_inputs import check_same_student
from mimkd_ray.versions import machine, versions


def arm_config(config: Config, arm: Arm, seed: int) -> Config:
    """The single run of one arm and one seed. The arms of a seed differ in their loss alone."""
    loss = config.loss
    if arm == "alone":
        loss = replace(loss, name=(), kd_weight=0.0, ce_weight=None)  # as without a teacher, whatever the others have
    elif arm == "kd":
        loss = replace(loss, name=(), kd_weight=config.compare.kd_weight)
    elif arm != "mimkd":
        loss = replace(loss, name=(arm,))
    return replace(
        config,
        recipe=f"{config.recipe} {arm} seed {seed}",
        loss=loss,
        data=replace(
            config.data,
            subset_seed=config.data.subset_seed + seed,
            view_seed=config.view_seed if config.cache.root else config.data.view_seed,  # all seeds read one cache
        ),
        train=replace(config.train, seed=config.train.seed + seed),
        compare=CompareConfig(),
    )


def compare(
    config: Config,
    data: Data,
    teacher: nn.Module | None,
    facts: dict[str, Any],
    context: Context,
    run_dir: str,
) -> dict[str, Any]:
    """Train every arm with every seed and return the comparison, which is also the job's result.json.

    A run that is finished is not repeated, so a killed comparison goes on where it was. The comparison's own directory
    was begun (records/outcomes.py) and has no result.
    """
    began = time.perf_counter()
    ask_first(lambda: check_same_student(config.student, run_dir))
    results: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in config.compare.arms}
    for seed in range(config.compare.seeds):
        for arm, done in results.items():
            own = arm_config(config, arm, seed)
            rows = open_data(own.data, data.own) if config.data.subset else data
            network = teacher if own.loss.uses_teacher else None
            folder = storage.join(run_dir, f"{arm}-seed{seed:02d}")
            done.append(train(own, rows, network, context, folder, quiet=True))
        tops = ", ".join(f"{arm} {done[-1]['student']['top1']:.2f}" for arm, done in results.items())
        say(context, f"seed {seed + 1} of {config.compare.seeds}: top-1 {tops}")
    result = {
        "recipe": config.recipe,
        **facts,
        "student": {"name": config.student.name},
        "compare": {arm: summarise(done, results.get("alone")) for arm, done in results.items()},
        "seeds": config.compare.seeds,
        "workers": context.world_size,
        "lanes": config.train.lanes,
        "lane_batch": config.train.lane_batch,
        "train_rows": rows.train.num_rows,
        "held_out_rows": data.val.num_rows,
        "seconds": time.perf_counter() - began,
        "digests": {"config": digest(config), "data": data.digest},
        "machine": machine(context.device),
        "versions": versions(),
    }
    ask_first(lambda: write_json(storage.join(run_dir, RESULT), result))
    return result


def summarise(done: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Mean, spread and paired difference to the student alone (percentage points, with its standard error)."""
    top1 = [run["student"]["top1"] for run in done]
    summary: dict[str, Any] = {
        "top1": top1,
        "mean": statistics.fmean(top1),
        "sd": statistics.stdev(top1) if len(top1) > 1 else None,
        "images_per_second": statistics.median(run["images_per_second"] for run in done),
        "nats": {
            name: {key: _mean([run["nats"][name][key] for run in done]) for key in ("nats", "ceiling")}
            for name in done[0]["nats"]
        },
    }
    if alone is not None and done is not alone:
        differences = [a - b["student"]["top1"] for a, b in zip(top1, alone, strict=True)]
        summary["against_alone"] = paired(differences)
    return summary


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]  # JSON has None for these
    return statistics.fmean(known) if known else None


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Mean of paired differences, its standard error, and in how many pairs it was positive."""
    count = len(differences)
    return {
        "mean": statistics.fmean(differences),
        "standard_error": statistics.stdev(differences) / count**0.5 if count > 1 else None,
        "wins": sum(difference > 0 for difference in differences),
        "of": count,
    }


def clear(found: Mapping[str, Any]) -> str:
    """Return "gain" or "loss" for figures of :func:`paired` whose mean is outside of Student's 95 % interval around 0,
    else "". Half the interval is 4.3 standard errors for three pairs, 2.3 for ten."""
    from scipy.special import stdtrit

    mean, error = found["mean"], found["standard_error"]
    if error is None or abs(mean) <= float(stdtrit(found["of"] - 1, 0.975)) * error:
        return ""
    return "gain" if mean > 0 else "loss"
