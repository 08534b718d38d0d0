"""One student's run in its directory: what is written of it on the way, its checkpoints, its best, and its result."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from mimkd_ray import storage
from mimkd_ray.config.digest import digest
from mimkd_ray.json_files import NUMBER, read_if_sound
from mimkd_ray.train.distributed import all_sum, ask_first, gather_lanes, share_from_first
from mimkd_ray.train.engine import restart
from mimkd_ray.train.engine.step import StepRecord
from mimkd_ray.train.engine.student import Student
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.finite_guard import FiniteGuard
from mimkd_ray.train.records.outcomes import RESULT
from mimkd_ray.train.records.progress import Meter, say
from mimkd_ray.train.records.run_dir import MetricsLog, json_bytes, read_metrics, write_json
from mimkd_ray.versions import machine, versions

FIGURES = "best.json"

BUSY_SECONDS = 5.0
"""For which the first worker looks whether a file is committed, before it tells the others that it is not."""


class Run:
    """Files and checkpoints of one student's run. Every worker makes one and calls the same methods; the first writes.

    A lone run has one of them, a pack has one for each member.
    """

    def __init__(
        self, student: Student, run_dir: str, start: int, began: float, extra: Mapping[str, Any], keep: int = 0
    ) -> None:
        """``student`` stands at step ``start``. ``began``: when work on this run began, by perf_counter. ``keep``:
        checkpoints that are kept at least."""
        self.student, self.run_dir, self.start = student, run_dir, start
        self.began, self.extra = began, extra
        config, context = student.config, student.context
        self.log: MetricsLog | None = None
        self.writer: checkpoint.Writer | None = None

        def open_files() -> None:
            self.log = MetricsLog(run_dir, start, config.run)
            self.writer = checkpoint.Writer(run_dir, max(keep, config.run.keep_checkpoints), self._publish)

        ask_first(open_files)
        self.guard = FiniteGuard(context.device)
        self.best = Best(student, run_dir, start) if config.run.keep_best else None
        self.held_out: dict[str, Any] = {}

    def write_samples(self, done: int, record: StepRecord) -> None:
        """Note what step number ``done`` trained on, where the run keeps such notes."""
        if self.student.config.run.log_samples:
            ids_LB = gather_lanes(torch.stack(record.ids), self.student.config.train.lanes)
            if self.log is not None:
                self.log.write_samples(done, record.view, ids_LB)

    def evaluated(self, done: int, epoch: int, held_out: dict[str, Any]) -> None:
        """Take note of an evaluation. The best student is published ahead of the checkpoint of its step: a run that
        goes on from there has it."""
        self.held_out = held_out
        if self.best is not None:
            self.best.consider(done, epoch, held_out)

        def note() -> None:
            assert self.log is not None
            self.log.write("eval", done, {"epoch": epoch, **held_out})
            try:
                with storage.hurried():
                    self._publish(self.run_dir)
            except (storage.StorageError, storage.AccessError) as error:
                say(self.student.context, f"{error}; training goes on, and the next checkpoint waits for it")

        ask_first(note)

    def _publish(self, folder: str) -> None:
        """Bring to a folder what belongs to the next checkpoint there."""
        assert self.log is not None
        if self.best is not None:
            self.best.publish(folder)
        self.log.publish(folder)

    def save(self, done: int) -> None:
        """Checkpoint, in the background."""
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        restart.save(self.student, done, self.writer)
        if self.writer is not None:
            self.writer.stalls[-1] += waited
            self.student.context.observe(self.run_dir, {"checkpoint_stall": self.writer.stalls[-1]})

    def wait(self) -> None:
        """Return when everything is committed. While a store is waited for, all workers wait; not for long once they
        are asked to stop. Raises what went wrong on all of them."""
        while ask_first(lambda: self.writer is not None and self.writer.busy(BUSY_SECONDS)):
            if self.student.context.stop_requested():
                storage.be_patient(0)

    def close(self) -> None:
        """Commit and publish everything, and write no more."""
        if self.log is not None:
            self.wait()
            self._publish(self.run_dir)
            self.log.close()

    def finish(self, meter: Meter) -> dict[str, Any]:
        """Write student.safetensors and then result.json, and return what it says."""
        student = self.student
        damaged = torch.tensor(student.inputs.damage.damaged, device=student.context.device)
        seconds = time.perf_counter() - self.began
        result = {
            **describe(student, self.held_out, meter, self.start, seconds),
            **self.extra,
            "damaged": int(all_sum(damaged).item()),
        }
        weights = student.weights()
        self.wait()
        if self.writer is not None:
            result["checkpoints"] = {"saved": len(self.writer.stalls), "stall_seconds": sum(self.writer.stalls)}
            self.writer.start("result", partial(self._write_result, weights, result))
        self.wait()
        if self.log is not None:
            self.log.close()
        return share_from_first(result)

    def _write_result(self, weights: dict[str, Tensor], result: dict[str, Any], folder: str) -> None:
        self._publish(folder)
        storage.write_bytes(storage.join(folder, "student.safetensors"), save_safetensors(weights))
        write_json(storage.join(folder, RESULT), result)


class Best:
    """best.safetensors and best.json: the exported student with the highest held-out top-1 so far, or where images lack
    labels k-NN's; of equal ones the earliest. Where nothing held out has a label, the last one counts."""

    def __init__(self, student: Student, run_dir: str, start: int) -> None:
        """Goes on from the best.json that is there, unless it is of a later step than the run goes on from; a damaged
        one is made anew from metrics.jsonl."""
        self.student, self.run_dir, self.start = student, run_dir, start
        self.figures = storage.join(run_dir, FIGURES)
        self.key = "top1" if student.vector is None else "knn"
        known = ask_first(self._known)
        self.top1 = -math.inf
        self._owed: list[tuple[str, bytes]] = []  # names and contents that are to be written, in this order
        self._writing = threading.Lock()
        if known is not None and known["step"] <= start and known[self.key] is not None:
            self.top1 = known[self.key]

    def _known(self) -> dict[str, Any] | None:
        instead = "it is made anew from metrics.jsonl, where that has an evaluation"
        known = read_if_sound(self.figures, {self.key: (*NUMBER, type(None)), "step": int}, instead)
        if known is not None or not storage.exists(self.figures):
            return known
        seen = [line for line in read_metrics(self.run_dir, "eval") if line["step"] <= self.start]
        judged = [line for line in seen if isinstance(line.get(self.key), int | float)]
        if not judged:
            return None
        found = max(judged, key=lambda line: float(line[self.key]))  # of equal ones the first
        known = {name: value for name, value in found.items() if name != "kind"}
        write_json(self.figures, known)
        return known

    def consider(self, done: int, epoch: int, held_out: Mapping[str, Any]) -> None:
        """Keep the student, to be published, if it is better. Every worker calls it."""
        if held_out[self.key] <= self.top1:  # not so of NaN
            return
        self.top1 = held_out[self.key]
        weights: dict[str, Tensor] = self.student.weights()
        if self.student.context.rank == 0:
            figures = json_bytes({"step": done, "epoch": epoch, **held_out})
            with self._writing:
                self._owed = [("best.safetensors", save_safetensors(weights)), (FIGURES, figures)]

    def publish(self, folder: str) -> None:
        """Write what is kept to a folder. Weights come first: what best.json tells of is there."""
        with self._writing:
            while self._owed:
                name, content = self._owed[0]
                storage.write_bytes(storage.join(folder, name), content)
                self._owed.pop(0)


def describe(student: Student, held_out: Mapping[str, Any], meter: Meter, start: int, seconds: float) -> dict[str, Any]:
    """Return the content of result.json for this run."""
    config = student.config
    nats = {
        term.name: {key: held_out.get(f"{term.name}/{key}") for key in ("nats", "ceiling")}
        for term in student.distiller.loss.plan
    }
    return {
        "recipe": config.recipe,
        "student": {
            "name": config.student.name,
            **{key: held_out.get(key) for key in ("top1", "top5", "cross_entropy", "rows")},
            **({"knn": held_out.get("knn")} if student.vector is not None else {}),
            **({} if student.head_learns else {"head_learns": False}),
        },
        "nats": nats,
        "images_per_second": meter.rate(),
        "seconds": seconds,
        "steps": student.total_steps,
        "epochs": student.total_steps / student.order.steps_per_epoch,
        "workers": student.context.world_size,
        "lanes": config.train.lanes,
        "lane_batch": config.train.lane_batch,
        "seed": config.train.seed,
        "resumed_from": start,
        "timeline": student.context.times.marks(),
        "digests": {"config": digest(config), "data": student.data.digest},
        "machine": machine(student.context.device),
        "versions": versions(),
    }
