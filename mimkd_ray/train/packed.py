"""A pack: several students with configurations of their own, trained in one process on the same batches and the same
teacher pass, each as if it were alone.

For a search without a cache: decoding and the teacher cost once what K runs would each pay for. Members share what
feeds them (data, mixing, cache, teacher, lanes, length, seed); loss, optimiser, student and moving average are their
own. On the CPU a member's weights and metrics equal those of its lone run bit for bit.

Each member has a run directory like a lone run's. Members are saved at the same steps and go on from the newest one
that all of them have. One that is finished, was stopped or has failed says so in result.json, stopped.json or
failed.json, and is not trained again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.digest import differences
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.data.sources.data_set import Data
from mimkd_ray.errors import MemberMemoryError, NonFiniteLossError, UserError, count
from mimkd_ray.train.distributed import Context
from mimkd_ray.train.engine.inputs import Inputs
from mimkd_ray.train.engine.restart import restore
from mimkd_ray.train.engine.step import StepRecord
from mimkd_ray.train.engine.student import Student
from mimkd_ray.train.from_cache.cached_teacher import open_cached
from mimkd_ray.train.loop import Loop
from mimkd_ray.train.networks.build import PlannedStudent, plan_student
from mimkd_ray.train.networks.teacher_head import teacher_head
from mimkd_ray.train.out_of_memory import is_out_of_memory
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.outcomes import STOPPED, Failed, Finished, Outcome, Stopped, claim, fail, read_outcome
from mimkd_ray.train.records.progress import judged, say
from mimkd_ray.train.records.run_dir import jsonable, read_metrics, write_json
from mimkd_ray.train.run_record import Run

FEWEST_CHECKPOINTS = 2
"""That a member keeps: a kill may come when some have committed a step and others only the one before."""


@dataclass(frozen=True)
class Member:
    """One student of a pack."""

    config: Config
    run_dir: str


Judge = Callable[[int, Mapping[int, Mapping[str, Any]]], Collection[int]]
"""(epoch, held-out figures by index of member) -> indices of members to stop. Called after an evaluation, once all that
belongs to it is committed.

After a restart it is called again for the evaluation that the pack goes on from: a kill may have come before its
verdict was carried out. The figures are then again those of all members that took part, so that a judge which decides
by its arguments alone decides the same. Members that have ended since may be named; nothing happens to them."""


def train_pack(
    members: Sequence[Member],
    data: Data,
    teacher: nn.Module | None,
    context: Context,
    judge: Judge | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[Outcome]:
    """Train all members to their ends. Returns their outcomes, in order.

    ``teacher`` is None where no member's loss needs one; ``extra`` (about the teacher, say) is added to every result.
    A member whose student or taps cannot be had ends with its UserError, before the first step.
    A step costs what the teacher and all students cost; one student's activations are held at a time. A member whose
    loss is no number, or which finds no memory in a step, an evaluation or a save, leaves; the others go on. With a
    ``judge`` a checkpoint is saved at every evaluation. Figures are told to the judge, not to ``context.report``.
    Raises UserError for members that do not go together, for a cache that lacks what they read, and for several
    workers; Interrupted when the job was asked to stop and has saved the state of all.
    """
    if context.world_size != 1:
        raise UserError(f"a pack is trained by one worker, and there are {context.world_size}: pass --launch.workers 1")
    check_members(members)
    outcomes = {number: read_outcome(member.run_dir) for number, member in enumerate(members)}
    going: dict[int, PlannedStudent] = {}
    for number, member in enumerate(members):
        if outcomes[number] is None:
            planned = _planned(member, data, teacher)
            if isinstance(planned, PlannedStudent):
                going[number] = planned
            else:
                outcomes[number] = planned
    if going:
        with ExitStack() as opened:
            pack, lost = _open(opened, members, going, data, teacher, context, judge, extra or {})
            if pack is not None:
                pack.go()
                outcomes |= pack.outcomes
        outcomes |= lost
    return [outcome for outcome in outcomes.values() if outcome is not None]


def shared_part(config: Config) -> dict[str, Any]:
    """Of a config, in JSON form, what all members of a pack have in common."""
    value = to_dict(config)
    shared = {section: value[section] for section in ("data", "mix", "cache", "teacher", "train", "run")}
    del shared["train"]["ema_decay"]
    shared["run"] = {name: item for name, item in value["run"].items() if name.startswith("checkpoint_")}
    return shared


def check_members(members: Sequence[Member]) -> None:
    """Raise UserError for members that cannot be trained together, or whose directories were begun otherwise."""
    if not members:
        raise UserError("a pack of no members: give at least one")
    first = shared_part(members[0].config)
    found: dict[str, list[str]] = {}
    for number, member in enumerate(members[1:], start=1):
        for difference in differences(first, shared_part(member.config)):
            found.setdefault(difference, []).append(str(number))
    if found:
        listed = "; ".join(f"{difference} (members 0 -> {', '.join(who)})" for difference, who in found.items())
        raise UserError(
            f"members of a pack train on the same batches and the same teacher pass, and differ in {listed}: put them "
            "in different packs"
        )
    asked: dict[str, list[str]] = {}
    for number, member in enumerate(members):
        if member.config.loss.uses_teacher:
            asked.setdefault(member.config.loss.resolved_negatives, []).append(str(number))
    if {"step", "cache"} <= asked.keys():
        raise UserError(
            f"loss.negatives is step for members {', '.join(asked['step'])} of the pack and cache for members "
            f"{', '.join(asked['cache'])}: put them in different packs"
        )
    if len({member.run_dir for member in members}) != len(members):
        raise UserError(f"two members of a pack have one directory: {', '.join(member.run_dir for member in members)}")
    for member in members:
        claim(member.config, member.run_dir)


def _planned(member: Member, data: Data, teacher: nn.Module | None) -> PlannedStudent | Outcome:
    """Plan the student of a member. Returns its outcome where student or taps are wrong, or memory is short."""
    config = member.config
    try:
        if teacher is None or not config.loss.uses_teacher:
            return plan_student(config, None, data.num_classes)
        return plan_student(config, teacher, data.num_classes, teacher_head(config, data).shared)
    except UserError as error:
        return Failed(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _found_no_memory(member.run_dir, error)


def _found_no_memory(run_dir: str, error: Exception) -> Outcome:
    return fail(run_dir, MemberMemoryError(f"out of memory before the first step: {error}"))


def _open(
    opened: ExitStack,
    members: Sequence[Member],
    going: Mapping[int, PlannedStudent],
    data: Data,
    teacher: nn.Module | None,
    context: Context,
    judge: Judge | None,
    extra: Mapping[str, Any],
) -> tuple[_Pack | None, dict[int, Outcome]]:
    """The pack of the members that are ``going``, at the newest step that they share, and the outcomes of those for
    which there was no memory. No pack where that is all of them. ``opened`` closes their inputs."""
    began = time.perf_counter()
    places = [members[number].run_dir for number in going]
    readers = [planned for planned in going.values() if planned.config.loss.uses_teacher]
    network = teacher if readers else None
    # What is fitted without a cache is kept with the first member, whoever goes on.
    cached = open_cached(readers, data, network, context, members[0].run_dir) if readers else None
    context.times.mark("cache")
    inputs = Inputs(list(going.values()), data, network, context, cached)
    opened.callback(inputs.close)
    start, contents = checkpoint.newest_shared(places)
    students: dict[int, Student] = {}
    lost: dict[int, Outcome] = {}
    for at, ((number, planned), place) in enumerate(zip(going.items(), places, strict=True)):
        try:
            student = Student(planned, inputs)
            if contents:
                restore(student, place, contents[at])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            lost[number] = _found_no_memory(place, error)
            continue
        checkpoint.drop_after(place, start)
        students[number] = student
    if not students:
        return None, lost
    if start:
        seconds = time.perf_counter() - began
        members_told = count(len(students), "member")
        say(context, f"resumed {members_told} from step {start} of {', '.join(places)} in {seconds:.1f} s")
    runs = {
        number: Run(student, members[number].run_dir, start, began, extra, FEWEST_CHECKPOINTS)
        for number, student in students.items()
    }
    told = {number: told_before(member.run_dir) for number, member in enumerate(members)} if judge is not None else {}
    return _Pack(runs, judge, told), lost


def told_before(run_dir: str) -> dict[int, dict[str, Any]]:
    """Held-out figures of the evaluations that the run's metrics.jsonl tells of, by step."""
    return {
        line["step"]: {key: value for key, value in line.items() if key not in ("kind", "step", "epoch")}
        for line in read_metrics(run_dir, "eval")
    }


class _Pack(Loop):
    """The loop with several students, of which some may leave before the end."""

    spares = True

    def __init__(
        self, runs: Mapping[int, Run], judge: Judge | None, told_before: Mapping[int, Mapping[int, Mapping[str, Any]]]
    ) -> None:
        """``runs`` by index of member. ``told_before``: figures of earlier starts, by index of any member and step."""
        super().__init__(list(runs.values()), f"pack of {len(runs)}", commits=judge is not None)
        self.numbers = {run: number for number, run in runs.items()}
        self.judge, self.told_before = judge, told_before
        self.outcomes: dict[int, Outcome] = {}

    def go(self) -> None:
        """Train to the end, which leaves ``outcomes``."""
        at_start = {number: told[self.start] for number, told in self.told_before.items() if self.start in told}
        if at_start:
            self._judge(self.start, self.start // self.steps_per_epoch, at_start)
        going = {self.numbers[run] for run in self.runs}
        self.told_before = {number: told for number, told in self.told_before.items() if number not in going}
        if self.runs:
            super().go()

    def text(self, records: Mapping[Run, StepRecord]) -> str:
        """The losses of all members."""
        return "loss " + ", ".join(f"{float(records[run].log['loss']):.3f}" for run in self.runs)

    def save(self, done: int) -> None:
        """A member removes its oldest checkpoint when it commits this one: by then all have the one before."""
        self.wait(done)
        super().save(done)

    def told(self, done: int, epoch: int) -> None:
        """Say it, and ask the judge."""
        runs = self.runs if self.inputs.data.judged else self.runs[:1]
        tops = "; ".join(judged(run.held_out, run.student.head_learns) for run in runs)
        say(self.context, f"{self.label}: epoch {epoch}, {tops}")
        figures = {number: told[done] for number, told in self.told_before.items() if done in told}
        self._judge(done, epoch, figures | {self.numbers[run]: jsonable(run.held_out) for run in self.runs})

    def _judge(self, done: int, epoch: int, figures: Mapping[int, Mapping[str, Any]]) -> None:
        """Carry out the judge's verdict. At the end all members have finished, and it only hears of it."""
        stop = set(self.judge(epoch, figures)) if self.judge is not None else set()
        for run in list(self.runs):
            number = self.numbers[run]
            if number in stop and number not in self.outcomes:
                say(self.context, f"member {number} of the {self.label} ({run.run_dir}) is stopped at epoch {epoch}")
                run.close()  # the file comes last: what it says is then all committed
                write_json(storage.join(run.run_dir, STOPPED), {"epoch": epoch, "step": done})
                self._end(run, Stopped(epoch))

    def leave(self, run: Run, error: NonFiniteLossError | MemberMemoryError) -> None:
        """The others go on without it."""
        say(self.context, f"member {self.numbers[run]} of the {self.label} ({run.run_dir}) leaves: {error}")
        run.close()
        self._end(run, fail(run.run_dir, error))

    def _end(self, run: Run, outcome: Outcome) -> None:
        """A member has ended before the others."""
        self.runs.remove(run)
        self.outcomes[self.numbers.pop(run)] = outcome

    def finish(self) -> None:
        """Write the results of those that came to the end."""
        super().finish()
        self.outcomes |= {self.numbers[run]: Finished(jsonable(told)) for run, told in self.results.items()}
