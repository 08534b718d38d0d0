"""A student's state for a restart: what a checkpoint keeps of it, and how it goes on from one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors.torch import load as load_safetensors
from torch import Tensor

from mimkd_ray import storage
from mimkd_ray.config.digest import changes, refuse_changes, training_dict
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_if_sound
from mimkd_ray.train.distributed import ask_first, gather_by_rank
from mimkd_ray.train.engine.student import Student
from mimkd_ray.train.networks.optim import load_portable, portable_state
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.outcomes import RESULT
from mimkd_ray.train.records.progress import say


def save(student: Student, step: int, writer: checkpoint.Writer | None) -> None:
    """Checkpoint after ``step`` steps. Every worker takes part; the first has the writer."""
    own_statistics = gather_by_rank(student.norms.flat().cpu())
    with student.settled():
        if writer is not None:
            writer.save(step, state_of(student, step, own_statistics))


def state_of(student: Student, step: int, own_statistics: list[Tensor]) -> dict[str, Any]:
    """Everything a restart needs. The order, the views and the model's random numbers follow from the step.

    Batch-norm statistics are in it twice: averaged over workers, for any number of them, and each worker's own,
    with which the same number of workers goes on bit for bit.
    """
    return {
        "step": step,
        "config": training_dict(student.config),
        "data": student.data.digest,
        "distiller": student.distiller.state_dict(),
        "optimizer": portable_state(student.optimizer),
        "ema": student.ema.state_dict() if student.ema is not None else None,
        "own_statistics": own_statistics,
    }


def resume(student: Student, run_dir: str) -> int:
    """Load the newest checkpoint of the run, if any. Returns the step to go on from (0 at the start)."""
    content = _newest(run_dir)
    step = 0 if content is None else restore(student, run_dir, content)
    if content is None and student.config.run.start_from:
        start_from(student, student.config.run.start_from)
    # Damaged ones of later steps would count as the newest, and the next saves be pruned for their sake.
    ask_first(lambda: checkpoint.drop_after(run_dir, step))
    return step


def start_from(student: Student, run_dir: str) -> None:
    """Begin with what another run ended with: the weights that it exports (its student's, or their moving average),
    and the critics', the queue and the optimiser's state of its newest checkpoint. Raises UserError if they do not
    fit."""
    content = _newest(run_dir)
    file = storage.join(run_dir, "student.safetensors")
    weights, result = ask_first(lambda: (storage.exists(file), read_if_sound(storage.join(run_dir, RESULT)) or {}))
    if content is None and not weights:
        raise UserError(f"run.start_from {run_dir} has neither checkpoint nor result: name a run that reached one")
    if content is None:
        say(student.context, f"{run_dir} has no checkpoint: critics and optimiser start anew")
    with _fitting(f"run.start_from {run_dir}"):
        if content is not None:
            state = checkpoint.parse(content, student.context.device)
            student.distiller.load_state_dict(state["distiller"])
            load_portable(student.optimizer, state["optimizer"], own_settings=True)
            # A run that was given more steps after its end has the weights of that end until the next one.
            weights = weights and result.get("steps", state["step"]) >= state["step"]
        exported = load_safetensors(storage.read_bytes(file)) if weights else checkpoint.student_of(state)
        student.distiller.student.model.load_state_dict(exported)
    if student.ema is not None:
        student.ema.module.load_state_dict(student.distiller.student.state_dict())


@contextmanager
def _fitting(what: str) -> Iterator[None]:
    """A with-block whose errors say that a state does not fit."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError) as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"{what} does not fit this configuration: {told}; networks, terms, layers and the optimiser must be the "
            "same"
        ) from error


def restore(student: Student, run_dir: str, content: bytes) -> int:
    """Take over the state in a checkpoint of the run. Returns the step to go on from."""
    state = checkpoint.parse(content, student.context.device)
    changed = changes(state["config"], student.config)
    if state["data"] != student.data.digest:
        changed.append(f"the data set's digest: {state['data'][:12]} -> {student.data.digest[:12]}")
    refuse_changes(run_dir, changed)
    with _fitting(f"the checkpoint in {run_dir}"):  # of another trial, in population-based training
        student.distiller.load_state_dict(state["distiller"])
        load_portable(student.optimizer, state["optimizer"])
    if student.ema is not None:
        student.ema.load_state_dict(state["ema"])
    if len(state["own_statistics"]) == student.context.world_size:
        student.norms.load(state["own_statistics"][student.context.rank])
        student.ema_follows()
    return int(state["step"])


def _newest(run_dir: str) -> bytes | None:
    """Return the content of a run's newest checkpoint; None without one. The first worker chooses: a straggler of an
    earlier start may commit another one meanwhile. Every worker calls it."""
    found: list[bytes] = []

    def look() -> str | None:
        newest = checkpoint.newest(run_dir)
        if newest is not None:
            found.append(newest[1])
        return newest and newest[0]

    folder = ask_first(look)
    return None if folder is None else found[0] if found else checkpoint.read(folder)
