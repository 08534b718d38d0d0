"""The summary of a run: what it says at its beginning, and the commands that it names at its end."""

from __future__ import annotations

import shlex

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.data.loading.threads import told, told_by_ray
from mimkd_ray.errors import count
from mimkd_ray.on_ray.nodes.cluster_address import cluster_address


def opening(config: Config, run_dir: str) -> str:
    """Return the block that says who teaches whom, on what, how, where, and where results go."""
    data, train, launch, compare = config.data, config.train, config.launch, config.compare
    weights = f"weights {config.teacher.weights}"
    if config.teacher.trains:
        epochs = count(config.teacher.epochs or train.epochs, "epoch")
        epochs += " of all training images" if data.subset else ""
        weights = f"{weights}, fine-tuned first, {epochs}" if config.teacher.finetune else f"trained first, {epochs}"
    rows = [
        ("teacher", f"{config.teacher.name}, {weights}"),
        ("student", f"{config.student.name}, weights {config.student.weights}"),
        ("loss", _loss(config)),
        ("data", f"{data.root}" + (f", {count(data.subset, 'training image')}" if data.subset else "")),
        ("views", f"{data.pipeline}, {data.image_size} pixels, {data.views or 'a new one'} {_views(config)}"),
        (
            "batch",
            f"{count(train.lanes * train.lane_batch, 'image')} ({train.lanes} x {train.lane_batch}), "
            + count(train.epochs, "epoch")
            + (f", at most {count(train.max_steps, 'step')}" if train.max_steps else ""),
        ),
        ("device", {"auto": "GPU if there is one, else CPU", "on": "GPU", "off": "CPU"}[launch.gpu] + _workers(config)),
        ("results", run_dir),
    ]
    if config.optim.schedule == "step" and min(config.optim.milestones, default=0) >= train.epochs:
        drops = ", ".join(map(str, config.optim.milestones))
        rows.insert(-2, ("rate", f"{config.optim.lr:g} to the end: optim.milestones {drops} come after the last epoch"))
    if compare.seeds:
        rows.insert(3, ("compared", f"{', '.join(compare.arms)}: {count(compare.seeds, 'seed')} each"))
    return "\n".join([config.recipe, *(f"  {name:<9}{text}" for name, text in rows)])


def _loss(config: Config) -> str:
    loss = config.loss
    parts = ["cross-entropy"] if loss.resolved_ce_weight and config.data.labels != "none" else []
    of_logits = "" if loss.kd_logits == "raw" else f" ({loss.kd_logits} logits)"
    parts += [f"KD {loss.resolved_kd_weight:g}{of_logits}"] if loss.resolved_kd_weight else []
    return " + ".join([*parts, *loss.name])


def _views(config: Config) -> str:
    cache = f", teacher's features from {config.cache.root}" if config.cache.reads else ""
    return ("views of an image" if config.data.views else "every epoch") + cache


def _workers(config: Config) -> str:
    launch = config.launch
    if launch.backend == "local":
        return f", this process: {told(config.data)}"
    where = f"the Ray cluster at {launch.address}" if launch.address else "Ray"
    fewest, most = launch.worker_range
    workers = f"{launch.workers} workers" if fewest < most else count(most, "worker") if most else "a worker each"
    joined = bool(cluster_address(launch.address))
    return f", {workers} of {where}: {told_by_ray(config.data, launch.cpus_per_worker, most, joined)}"


def closing(config: Config, run_dir: str, report: str | None = None) -> str:
    """Return the lines below the table of results: where they are, with the page if one was made, and what can be done
    with them; of a comparison with the first run of its last arm."""
    one = storage.join(run_dir, f"{config.compare.arms[-1]}-seed00") if config.compare.seeds else run_dir
    tools = [("evaluate", one), ("export", one), *([] if report else [("report", run_dir)])]
    lines = [f"  python -m mimkd_ray {name} {shlex.quote(place)}" for name, place in tools]
    page = [f"report: {report}"] if report else []
    return "\n".join([f"run directory: {run_dir}", *page, "next:", *lines])
