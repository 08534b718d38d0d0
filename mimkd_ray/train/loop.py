"""The training loop, the same for a plain process, torchrun and Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from mimkd_ray import storage
from mimkd_ray.data.dataset import Data
from mimkd_ray.errors import Interrupted
from mimkd_ray.train import checkpoint, timeline
from mimkd_ray.train.cached import open_cached
from mimkd_ray.train.config import Config, digest, to_dict
from mimkd_ray.train.context import Context, all_sum, barrier, gather_lanes, share_from_first
from mimkd_ray.train.files import MetricsLog, read_json, write_json
from mimkd_ray.train.metrics import FiniteGuard, Meter, Progress, say
from mimkd_ray.train.report import versions
from mimkd_ray.train.rhythm import Rhythm
from mimkd_ray.train.session import Session


def train(
    config: Config,
    data: Data,
    teacher: nn.Module | None,
    context: Context,
    run_dir: str,
    extra: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train the student of ``config`` to its end and return what result.json says.

    Goes on from the newest checkpoint in ``run_dir``; a finished run is returned as it is. ``teacher`` is None where
    the loss needs none; ``extra`` (about the teacher, say) is added to the result. Raises Interrupted, on all workers,
    when the job was asked to stop and has saved its state.
    """
    finished = share_from_first(read_json(storage.join(run_dir, "result.json")) if context.rank == 0 else None)
    if finished is not None:
        return finished
    began = time.perf_counter()
    session = Session(config, data, teacher, context, open_cached(config, data, teacher, context, run_dir))
    start = session.resume(run_dir)
    resumed = time.perf_counter() - began
    if start:
        say(context, f"resumed from step {start} of {run_dir} in {resumed:.1f} s")
    log = writer = None
    if context.rank == 0:
        write_json(storage.join(run_dir, "config.json"), to_dict(config))
        log = MetricsLog(run_dir, start, config.run)
        writer = checkpoint.Writer(run_dir, config.run.keep_checkpoints, log.publish)

    global_batch = config.train.lanes * config.train.lane_batch
    progress = Progress(context, config.recipe, start, session.total_steps, global_batch, quiet)
    guard = FiniteGuard(context.device)
    meter = Meter(context.device, global_batch)
    rhythm = Rhythm(config.run, context, session.order.steps_per_epoch, start)
    batches = session.batches(start)
    timeline.mark("built")
    held_out: dict[str, Any] = {}

    for step in range(start, session.total_steps):
        record = session.step(step, batches)
        done = step + 1
        guard.add(step, record.log, record.ids)
        meter.step()
        timeline.mark("first_step")
        if done % config.train.log_every == 0 or done == session.total_steps:
            write_step(log, session, done, record.log, meter)
        if config.run.log_samples:
            ids_LB = gather_lanes(torch.stack(record.ids), config.train.lanes)
            if log is not None:
                log.write_samples(done, record.view, ids_LB)
        progress.update(done, partial(summary, record.log))

        epoch, rest = divmod(done, session.order.steps_per_epoch)
        last = done == session.total_steps
        if last or (rest == 0 and config.train.eval_every and epoch % config.train.eval_every == 0):
            guard.check_all()
            with meter.paused():
                held_out = session.evaluate()
            if log is not None:
                log.write("eval", done, {"epoch": epoch, **held_out})
                log.publish()
            if not quiet:
                say(context, f"{config.recipe}: epoch {epoch}, held-out top-1 {held_out['top1']:.2f} %")
                context.report({"step": done, "epoch": epoch, **held_out})
        decision = rhythm.after(done)
        if decision.save and not last:
            guard.check_all()
            with meter.paused():
                session.save(done, writer)
        if decision.notice:
            say(context, f"{decision.notice} will be taken away: saving at step {done}, and training on")
        if (decision.stop or decision.notice) and writer is not None:
            writer.wait()
        if decision.stop and not last:
            barrier()  # no worker leaves before the state is committed
            raise Interrupted(f"asked to stop: saved at step {done} of {session.total_steps} in {run_dir}")

    progress.close()
    session.close()
    result = {
        **describe(config, session, held_out, meter, start, time.perf_counter() - began),
        **(extra or {}),
        "damaged": int(all_sum(torch.tensor(session.damage.damaged, device=context.device)).item()),
    }
    with session.settled():
        weights = {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in session.exported().state_dict().items()
        }
    if log is not None and writer is not None:
        writer.wait()
        log.close()
        result["checkpoints"] = {"saved": len(writer.stalls), "stall_seconds": sum(writer.stalls)}
        storage.write_bytes(storage.join(run_dir, "student.safetensors"), save_safetensors(weights))
        write_json(storage.join(run_dir, "result.json"), result)
    barrier()
    return share_from_first(result)


def write_step(log: MetricsLog | None, session: Session, done: int, record: Mapping[str, Tensor], meter: Meter) -> None:
    """Average a step's breakdown over all lanes and write it. Every worker takes part."""
    share = len(session.my_lanes) / session.config.train.lanes
    values = all_sum(torch.stack([value.double() for value in record.values()]) * share).tolist()
    if log is not None:
        rates = {
            "images_per_second": meter.rate(),
            "data_wait": session.feed.waited / max(meter.elapsed(), 1e-9),
            "lr": session.optimizer.param_groups[0]["lr"],
            "epoch": done / session.order.steps_per_epoch,
        }
        log.write("train", done, dict(zip(record, values, strict=True)) | rates)


def summary(record: Mapping[str, Tensor]) -> str:
    """The loss and the nats of each term in one short text."""
    parts = [f"loss {float(record['loss']):.3f}"]
    parts += [f"{key.removesuffix('/nats')} {float(v):.2f} nats" for key, v in record.items() if key.endswith("/nats")]
    return ", ".join(parts)


def describe(
    config: Config, session: Session, held_out: Mapping[str, Any], meter: Meter, start: int, seconds: float
) -> dict[str, Any]:
    """What result.json says of this run."""
    nats = {
        term.name: {key: held_out.get(f"{term.name}/{key}") for key in ("nats", "ceiling")}
        for term in session.distiller.loss.plan
    }
    return {
        "recipe": config.recipe,
        "student": {
            "name": config.student.name,
            **{key: held_out.get(key) for key in ("top1", "top5", "rows")},
        },
        "nats": nats,
        "images_per_second": meter.rate(),
        "seconds": seconds,
        "steps": session.total_steps,
        "epochs": session.total_steps / session.order.steps_per_epoch,
        "workers": session.context.world_size,
        "lanes": config.train.lanes,
        "lane_batch": config.train.lane_batch,
        "seed": config.train.seed,
        "resumed_from": start,
        "timeline": timeline.marks(),
        "digests": {"config": digest(config), "data": session.data.digest},
        "versions": versions(),
    }
