"""The training loop, the same for a plain process, torchrun and Ray, and for one student or a pack of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mimkd_ray import console, storage
from mimkd_ray.config import Config
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.errors import Interrupted, MemberMemoryError, NonFiniteLossError
from mimkd_ray.train.distributed import Context, Preemption, all_sum, ask_first, barrier
from mimkd_ray.train.engine.engines import make_engine
from mimkd_ray.train.engine.evaluation import evaluate_together
from mimkd_ray.train.engine.restart import resume
from mimkd_ray.train.engine.step import StepRecord
from mimkd_ray.train.engine.student import Student, lone_student
from mimkd_ray.train.out_of_memory import V, each
from mimkd_ray.train.records.outcomes import begin
from mimkd_ray.train.records.progress import Meter, Progress, judged, reading, say
from mimkd_ray.train.records.run_dir import MetricsLog
from mimkd_ray.train.records.save_and_stop import Rhythm
from mimkd_ray.train.run_record import Run

GRAPHS = 64
"""Students (and lane sizes) that one process compiles; torch's own limit is 8."""


def train(
    config: Config,
    data: Data,
    teacher: nn.Module | None,
    context: Context,
    run_dir: str,
    extra: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Begin or go on with a run of its own directory, and return what result.json says. A finished run is returned as
    it is. The rest is as in :func:`train_on`."""
    finished = ask_first(lambda: begin(config, run_dir))
    return train_on(config, data, teacher, context, run_dir, extra, quiet) if finished is None else finished


def train_on(
    config: Config,
    data: Data,
    teacher: nn.Module | None,
    context: Context,
    run_dir: str,
    extra: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train the student of ``config`` to its end and return what result.json says.

    Goes on from the newest checkpoint in ``run_dir``, which was begun (records/outcomes.py) and has no result.
    ``teacher`` is None where the loss needs none; ``extra`` (about the teacher, say) is added to the result. Raises
    Interrupted, on all workers, when the job was asked to stop and has saved its state.
    """
    began = time.perf_counter()
    with ExitStack() as opened:
        with console.phase(f"{config.recipe}: making the student and its inputs", said=False):
            student = lone_student(config, data, teacher, context, run_dir)
            opened.callback(student.inputs.close)
            start = resume(student, run_dir)
        resumed = time.perf_counter() - began
        if start:
            say(context, f"resumed from step {start} of {run_dir} in {resumed:.1f} s")
        run = Run(student, run_dir, start, began, extra or {})
        loop = Loop([run], config.recipe, quiet)
        loop.go()
    return loop.results[run]


class Loop:
    """Takes runs with the same inputs from the step where they stand to their end.

    As it is, it trains a single student. A pack (train/packed.py) has several, looks at them in one pass, and lets
    members leave.
    """

    spares = False
    """Whether a run that finds no memory leaves, and the others go on."""

    def __init__(self, runs: Sequence[Run], label: str, quiet: bool = False, commits: bool = False) -> None:
        """``commits``: whether all that belongs to an evaluation is committed before it is told."""
        self.runs, self.label, self.quiet = list(runs), label, quiet
        student = runs[0].student
        storage.be_patient(student.config.storage.patience_minutes)
        self.config, self.context, self.inputs = student.config, student.context, student.inputs
        self.start, self.total, self.steps_per_epoch = runs[0].start, student.total_steps, student.order.steps_per_epoch
        self.commits = commits or self.context.reports_are_final
        self.global_batch = self.config.train.lanes * self.config.train.lane_batch
        self.engine = make_engine([run.student for run in self.runs])
        self.meter = Meter(self.context.device, self.global_batch)
        self.results: dict[Run, dict[str, Any]] = {}

    def go(self) -> None:
        """Train to the end, which leaves ``results``. Raises Interrupted when the job was asked to stop."""
        with compile_settings() if any(run.student.compiled for run in self.runs) else nullcontext():
            try:
                self._go()
            finally:
                self.engine.close()

    def _go(self) -> None:
        context = self.context
        progress = Progress(context, self.label, self.start, self.total, self.global_batch)
        rhythm = Rhythm(self.config.run, context, self.steps_per_epoch, self.start)
        self.inputs.start(self.start)
        context.times.mark("built")
        if self.start == self.total:  # a kill came between the last checkpoint and the result
            with self.meter.paused():
                held_out = self.evaluate(self.total)
            for run, figures in zip(self.runs, held_out, strict=True):
                run.held_out = figures
            progress.close()
            self.finish()
            return
        for step in range(self.start, self.total):
            records = self._step(step)
            done, last = step + 1, step + 1 == self.total
            epoch, rest = divmod(done, self.steps_per_epoch)
            every = self.config.train.eval_every
            looks = last or (rest == 0 and every > 0 and epoch % every == 0)
            if looks:
                self._still_finite(lambda run: run.guard.check_all())
            if self.runs:
                progress.update(done, partial(self.text, records))
            if looks and self.runs:
                with self.meter.paused():
                    held_out = self.evaluate(done)
                for run, figures in zip(self.runs, held_out, strict=True):
                    run.evaluated(done, epoch, figures)
            decision = rhythm.after(done, save=looks and self.commits)
            truncated = self.total < self.config.train.epochs * self.steps_per_epoch  # it may go on with another limit
            if (decision.save and not last) or (last and truncated):
                self._still_finite(lambda run: run.guard.check_all())
                with self.meter.paused():
                    self.save(done)
            if decision.notice:
                say(context, f"{_foretold(decision.notice)}: saving at step {done}, and training on")
            if decision.stop or decision.notice or (looks and self.commits):
                self.wait(done)
            if last:
                progress.close()
                self.finish()
            if looks and self.runs:
                self.told(done, epoch)
            if not self.runs:
                break
            if decision.stop and not last:
                barrier()  # no worker leaves before the state is committed
                places = ", ".join(run.run_dir for run in self.runs)
                raise Interrupted(f"asked to stop: saved at step {done} of {self.total} in {places}")
        progress.close()

    def _step(self, step: int) -> dict[Run, StepRecord]:
        """One step of every run, and what is written of it."""
        failed: dict[Student, str] | None = {} if self.spares else None
        taken = self.engine.step([run.student for run in self.runs], step, failed)
        self._leave_for_memory(failed, f"step {step + 1}")
        records = {run: taken[run.student] for run in self.runs}
        self._still_finite(lambda run: run.guard.add(step + 1, records[run].log, records[run].ids))
        self.meter.step()
        self.context.times.mark("first_step")
        done = step + 1
        for run in self.runs:
            if done % self.config.train.log_every == 0 or done == self.total:
                line = write_step(run.log, run.student, done, records[run].log, self.meter)
                if line is not None:
                    self.context.observe(run.run_dir, {"step": done, **line})
            run.write_samples(done, records[run])
        return records

    def _still_finite(self, look: Callable[[Run], None]) -> None:
        """Let the guards look at the losses; a run whose loss is not a number leaves."""
        for run in list(self.runs):
            try:
                look(run)
            except NonFiniteLossError as error:
                self.leave(run, error)

    def text(self, records: Mapping[Run, StepRecord]) -> str:
        """The latest metrics, for the bar."""
        run = self.runs[0]
        known = [judged(run.held_out, run.student.head_learns)] if run.held_out else []
        return ", ".join([summary(records[run].log), *known])

    def evaluate(self, done: int) -> list[dict[str, Any]]:
        """Held-out figures of every run after ``done`` steps, in one pass for all."""
        failed: dict[Student, str] | None = {} if self.spares else None
        found = evaluate_together([run.student for run in self.runs], failed)
        self._leave_for_memory(failed, f"the evaluation after step {done}")
        return [found[run.student] for run in self.runs]

    def save(self, done: int) -> None:
        """Checkpoint every run."""
        self._each(lambda run: run.save(done), f"the checkpoint after step {done}")

    def wait(self, done: int) -> None:
        """Return when everything up to step ``done`` is committed."""
        self._each(lambda run: run.wait(), f"the checkpoint after step {done}")

    def _each(self, act: Callable[[Run], V], where: str) -> dict[Run, V]:
        """Return what ``act`` gives for every run. Of a pack, a run that finds no memory leaves."""
        runs = {run.student: run for run in self.runs}
        failed: dict[Student, str] | None = {} if self.spares else None
        done = each(runs, lambda student: act(runs[student]), failed)
        self._leave_for_memory(failed, where)
        return {runs[student]: value for student, value in done.items()}

    def _leave_for_memory(self, failed: Mapping[Student, str] | None, where: str) -> None:
        for run in list(self.runs):
            if failed and run.student in failed:
                self.leave(run, MemberMemoryError(f"out of memory in {where}: {failed[run.student]}"))

    def told(self, done: int, epoch: int) -> None:
        """Tell of an evaluation, whose checkpoint, where one was due, is under way by now."""
        (run,) = self.runs
        if not self.quiet:
            say(self.context, f"{self.label}: epoch {epoch}, {judged(run.held_out, run.student.head_learns)}")
        if not self.quiet or self.context.reports_are_final:
            self.context.report({"step": done, "epoch": epoch, **run.held_out})

    def leave(self, run: Run, error: NonFiniteLossError | MemberMemoryError) -> None:
        """End the run whose loss is not a number, or which found no memory."""
        raise error

    def finish(self) -> None:
        """Write the results of every run."""
        self.results = self._each(lambda run: run.finish(self.meter), f"the export after step {self.total}")


@contextmanager
def compile_settings() -> Iterator[None]:
    """A with-block with the settings of torch.compile that students need. torch has them for a whole process alone."""
    with torch._dynamo.config.patch(
        # The graph holds recomputed chunks (a higher-order operator), which DDP's graph splitter refuses.
        optimize_ddp=False,
        # Students of one process share the code of forward, and each has a graph: past the limit they would not be
        # compiled at all.
        recompile_limit=max(torch._dynamo.config.recompile_limit, GRAPHS),
    ):
        yield


def write_step(
    log: MetricsLog | None, student: Student, done: int, record: Mapping[str, Tensor], meter: Meter
) -> dict[str, float] | None:
    """Average a step's breakdown over all lanes and write it. Every worker takes part; the one with the log gets what
    was written."""
    share = len(student.my_lanes) / student.config.train.lanes
    values = all_sum(torch.stack([value.double() for value in record.values()]) * share).tolist()
    if log is not None:
        rates = {
            "images_per_second": meter.rate(),
            "data_wait": student.inputs.waited / max(meter.elapsed(), 1e-9),
            "lr": float(student.optimizer.param_groups[0]["lr"]),
            "epoch": done / student.order.steps_per_epoch,
        }
        hits = student.inputs.cache_hit_rate()
        if hits is not None:
            rates["cache_hit_rate"] = hits
        line = dict(zip(record, values, strict=True)) | rates
        log.write("train", done, line)
        return line
    return None


def summary(record: Mapping[str, Tensor]) -> str:
    """Return cross-entropy, KD, the nats of each term of MIMKD and the losses of rivals, in one short text. Their sum,
    which may be negative, tells nothing; nor does a cross-entropy of 0, of images without labels."""
    names = {"ce": "cross-entropy", "kd": "KD"}
    parts = [f"{name} {float(record[key]):.3f}" for key, name in names.items() if record.get(key)]
    for key in record:
        term, _, kind = key.rpartition("/")
        if kind == "nats":
            parts.append(f"{term} {reading(float(record[key]), float(record[f'{term}/ceiling']))}")
        elif term == "rival":
            parts.append(f"{kind} {float(record[key]):.3f}")
    return ", ".join(parts)


def _foretold(notice: Preemption) -> str:
    """Return a notice in words: which nodes, which workers, and in how many seconds if that is known."""
    when = "" if notice.deadline is None else f" in {max(0, notice.deadline - time.time()):.0f} s"
    return f"nodes {', '.join(notice.nodes)} with workers {', '.join(map(str, notice.ranks))} will be taken away{when}"
