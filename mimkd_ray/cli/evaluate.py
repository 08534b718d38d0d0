"""The command line of jobs/evaluate.py: what a network does on a data set, in figures.

Exit status: 0 done, 1 failed, 2 bad input, 3 stopped (SIGTERM), 130 interrupted. Errors are one line on standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mimkd_ray import console, storage
from mimkd_ray.cli import command_line
from mimkd_ray.cli.local_launch import local_context
from mimkd_ray.cli.short_help import OF_EVALUATION, short_help
from mimkd_ray.cli.training import absolute
from mimkd_ray.config import Config, LaunchConfig
from mimkd_ray.config.jobs.evaluate import EvaluateConfig, EvaluateJob, evaluate_job
from mimkd_ray.errors import UserError
from mimkd_ray.evaluation.measure import FIGURES, PREDICTIONS, measure, save
from mimkd_ray.evaluation.networks import takes_own_student
from mimkd_ray.on_ray.nodes import environment
from mimkd_ray.pages.write_pages import try_to_write_report
from mimkd_ray.places import check_lasting
from mimkd_ray.train.records.read_run import read_run
from mimkd_ray.train.records.run_dir import jsonable
from mimkd_ray.train.start_times import StartTimes


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run ``evaluate [RUN] [--eval.field value ...] [--field.path value ...]``; return the exit status."""
    program = program or sys.argv[0]
    arguments = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        run_dir, base = _base(arguments.pop(0) if arguments and not arguments[0].startswith("-") else "")
        head = (
            f"{program} [RUN] [flags]\n\nRUN is a run's directory or URL; its config is the default of all flags but "
            "--launch and --eval."
        )
        given = evaluate_job(base)
        page = short_help(given, head, OF_EVALUATION, more="")
        job = command_line.from_flags(EvaluateJob, arguments, page, prog=program, description=head, default=given)
        if job is not None:
            untrained = job.student.weights == "random" and ":" not in job.student.name and "random" not in arguments
            if untrained and not run_dir and job.eval.network == "student":
                raise UserError(
                    "nothing to evaluate: give the directory of a run, or --student.name NAME --student.weights FILE "
                    "--data.root DIR"
                )
            with console.phase("evaluation", said=False):
                evaluate(absolute(job), run_dir, base if run_dir else None)
        return 0

    return command_line.guarded(program, work, "nothing was written")


def evaluate_run(run: str = "", settings: EvaluateConfig | None = None, **sections: Any) -> dict[str, Any]:
    """Evaluate a network as ``mimkd-ray evaluate`` does, print its table, write its files, and return what
    evaluation.json has.

    Args:
        run: the directory or URL of a run; "": none, and ``sections`` name the network and the data.
        settings: what is measured, the flags ``--eval.*``.
        sections: sections of the config in the place of the run's: ``data=DataConfig(root="imagenet-r", ...)``,
            ``student=ModelConfig(...)``; ``launch=LaunchConfig(backend="ray", workers=8)`` deals the images to workers.

    Raises UserError.
    """
    run_dir, base = _base(run)
    job = evaluate_job(base, eval=settings or EvaluateConfig(), **sections)
    return evaluate(absolute(job), run_dir, base if run_dir else None)


def _base(run: str) -> tuple[str, Config]:
    """The place of a run and its config, but for the launch of its training; without a run the defaults."""
    run_dir = storage.absolute(run) if run else ""
    config = absolute(read_run(run_dir).config) if run else Config(recipe="evaluate")
    return run_dir, replace(config, launch=LaunchConfig(backend="local"))


def evaluate(job: EvaluateJob, run_dir: str = "", trained_on: Config | None = None) -> dict[str, Any]:
    """Evaluate, print the table, write the files, and return the figures."""
    storage.be_patient(job.storage.patience_minutes)
    out = storage.absolute(job.eval.out or run_dir or ".")
    check_lasting("--eval.out", out)
    if takes_own_student(job, run_dir, trained_on or job):
        read_run(run_dir).single()
    if os.environ.get("RANK", "0") != "0":
        console.use(console.Nobody())  # torchrun's other processes
    if job.launch.backend == "ray":
        environment.prepare(job.launch.address)
        from mimkd_ray.on_ray.evaluate_workers import evaluate_on_ray  # Ray takes seconds, and reads its environment

        figures = evaluate_on_ray(job, out, run_dir, trained_on)
        _tell(figures, out, run_dir)
        return figures
    with local_context(job.launch, StartTimes()) as context:
        found = measure(job, context, run_dir, trained_on, out)
        figures = jsonable(found.figures)
        if context.rank == 0:
            save(found, out)
            _tell(figures, out, run_dir)
    return figures


def _tell(figures: Mapping[str, Any], out: str, run_dir: str) -> None:
    console.line(f"{table(figures)}\n{storage.join(out, FIGURES)}\n{storage.join(out, PREDICTIONS)}")
    if run_dir and out == run_dir and (page := try_to_write_report(run_dir)):
        console.line(page)


def table(figures: Mapping[str, Any]) -> str:
    """Return the figures as lines for people."""
    lines = [
        f"{figures['what']} {figures['network']} on {figures['rows']:,} images of {figures['data']} "
        f"({figures['classes']} classes)",
        f"  weights {figures['weights']}",
        f"  top-1 {_percent(figures['top1'], figures['labelled'], figures['what'])}"
        + (f", top-5 {_percent(figures['top5'])}" if figures["top5"] is not None else "")
        + (f" of {figures['labelled']:,} labelled" if figures["labelled"] < figures["rows"] else ""),
    ]
    if real := figures["real"]:
        lines.append(f"  top-1 {real['top1']:.2f} % by ReaL's labels of {real['rows']:,} images")
    if calibration := figures["calibration"]:
        lines.append(
            f"  calibration error {100 * calibration['ece']:.2f} %, {100 * calibration['ece_scaled']:.2f} % at "
            f"temperature {calibration['temperature']:.2f}, fitted on {calibration['fitted_on']}"
        )
    if teacher := figures["teacher"]:
        agreement = teacher["agreement"]
        lines.append(
            f"  teacher {teacher['name']}: top-1 {_percent(teacher['top1'])}"
            + (
                f", the same prediction for {agreement:.2f} %, KL {_number(teacher['kl'], 3)} nats"
                if agreement is not None
                else ""
            )
        )
    by_features = {"k-NN": figures["knn"], "linear probe": figures["linear_probe"]}
    if found := [f"{name} {value:.2f} %" for name, value in by_features.items() if value is not None]:
        lines.append(f"  features: {', '.join(found)}")
    lines += [
        f"  {tap['teacher']} - {tap['student']}: {_number(tap['nats'], 2)} of at most {_number(tap['ceiling'], 2)} "
        f"nats, CKA {_number(tap['cka'], 3)}"
        for tap in figures["taps"]
    ]
    if worst := sorted(figures["per_class"], key=lambda each: float(each["top1"]))[:3]:
        lines.append("  worst classes: " + ", ".join(f"{each['class']} {each['top1']:.1f} %" for each in worst))
    if figures["confusions"]:
        often = figures["confusions"][:3]
        lines.append("  confusions: " + ", ".join(f"{c['label']} as {c['prediction']} {c['count']}x" for c in often))
    by_name: dict[str, list[str]] = {}
    for each in figures["corruptions"]:
        by_name.setdefault(each["corruption"], []).append(f"{each['top1']:.1f}")
    lines += [f"  {name}, severity 1 to 5: {' '.join(values)} %" for name, values in by_name.items()]
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"  # such as the CKA of a tap that is constant


def _percent(value: float | None, labelled: int = 0, network: str = "") -> str:
    of_head = "its head is of other classes" if network == "teacher" else "nothing has trained the head"
    why = of_head if labelled else "no image has a label"
    return f"unknown, as {why}" if value is None else f"{value:.2f} %"
