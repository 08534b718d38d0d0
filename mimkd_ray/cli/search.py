"""The command line of jobs/search.py, and the search that it starts: trials, finals and results.

Exit status: 0 done, 1 no usable trial, 2 bad input, 3 stopped (SIGTERM), 130 interrupted. Errors are one line on
standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from mimkd_ray import console, storage
from mimkd_ray.cli import command_line
from mimkd_ray.cli.preflight import preflight
from mimkd_ray.cli.training import absolute, below_root
from mimkd_ray.config import Config, SearchJob
from mimkd_ray.config.jobs.search import PACKAGES, POPULATION, search_job
from mimkd_ray.errors import UserError, count
from mimkd_ray.on_ray.nodes import environment
from mimkd_ray.run_lock import check_free, held
from mimkd_ray.search.configs import TrialConfigs, claim, search_digest, trial_config
from mimkd_ray.search.finals import Finals
from mimkd_ray.search.optuna_study import combinations
from mimkd_ray.search.spaces import find_spaces
from mimkd_ray.search.suggest import Grid, Range
from mimkd_ray.search.summary import Clock, brief, closing, write_report
from mimkd_ray.search.trial_files import Table
from mimkd_ray.train.records import run_files
from mimkd_ray.train.records.loggers import require, require_loggers
from mimkd_ray.user_functions import named_function


def main(
    recipes: Mapping[str, Callable[[], Config]], argv: Sequence[str] | None = None, program: str | None = None
) -> int:
    """Run ``search.py [RECIPE] [--search.field value ...] [--field.path value ...]``; return the exit status."""
    program = program or sys.argv[0]
    jobs = {name: _as_search(recipe) for name, recipe in recipes.items()}

    def work() -> int:
        command_line.wait_asleep()
        job = command_line.parse(jobs, next(iter(jobs)), sys.argv[1:] if argv is None else argv, program)
        return 0 if job is None else search(job)

    return command_line.guarded(program, work, "the same command goes on from the trials so far")


def _as_search(recipe: Callable[[], Config]) -> Callable[[], SearchJob]:
    def made() -> SearchJob:
        return search_job(recipe())

    made.__doc__ = recipe.__doc__
    return made


def search(job: SearchJob) -> int:
    """Run a search to its end and write its results; return the exit status."""
    storage.be_patient(job.storage.patience_minutes)
    found = find_spaces(job.search.space)
    if job.launch.backend == "local":
        raise UserError("launch.backend is local, and a search is run by Ray Tune: leave it out; Ray starts by itself")
    require_loggers(job.run.loggers)
    if job.search.algorithm in PACKAGES:
        require(PACKAGES[job.search.algorithm], f"--search.algorithm {job.search.algorithm}")
    elif ":" in job.search.algorithm:
        named_function("search.algorithm", job.search.algorithm)  # for its error
    job = absolute(job)
    folder = below_root(job, f"search-{job.recipe}-{search_digest(job)[:8]}")
    check_free(folder)
    configs = TrialConfigs(trial_config(job, job.search), found)
    if job.search.metric != "knn" and not configs.head_learns:
        raise UserError(
            f"search.metric is {job.search.metric}, and nothing teaches the student's head what the classes are "
            "(data.labels none): pass --search.metric knn"
        )
    if job.search.scheduler in POPULATION and not any(isinstance(each, Range) for each in configs.asked.values()):
        names = ", ".join(job.search.space)
        raise UserError(f"search.scheduler {job.search.scheduler} moves numbers, and search.space {names} has none")
    if not job.run.overwrite:
        claim(job, folder, write=False)
    grid = combinations(job.search, configs) if job.search.algorithm == "grid" else None
    with console.phase("checking data, networks and places"):
        preflight(configs.widest())
    if job.run.overwrite:  # not before: a search that cannot be run costs nothing that is there
        check_free(folder)
        run_files.overwrite(folder, "search")
    with held(folder), console.phase(f"search of {job.search.algorithm}", said=False):
        claim(job, folder)
        console.line(opening(job, configs, Table(folder, job.search.metric)))
        run(job, folder, configs, grid)
    table = Table(folder, job.search.metric)
    if not table.ranked():
        failed = [f"trial {trial.number}: {brief(trial.reason)}" for trial in table.trials() if trial.reason]
        why = "; ".join(failed[:3]) or "none began"
        return command_line.fail(f"no trial of {folder} is usable: {why}", 1)
    console.line(closing(table, Clock(folder).hours))
    return 0


def opening(job: SearchJob, configs: TrialConfigs, table: Table) -> str:
    """Return the description of a search that is printed before it starts."""
    search = job.search
    pairs = ", ".join(configs.candidates.feature)
    known = sum(trial.state != "running" for trial in table.trials())
    return "\n".join(
        [
            f"search directory: {table.folder}" + (f" ({count(known, 'trial')} ended before)" if known else ""),
            f"searching {', '.join(search.space)} by {search.algorithm}, scheduler {search.scheduler}, for the best "
            f"{search.metric} on {configs.base.data.holdout:.0%} of the training rows",
            *([f"candidate pairs of the feature terms: {pairs or 'none'}"] if "taps" in search.space else []),
        ]
    )


def run(job: SearchJob, folder: str, configs: TrialConfigs, grid: Grid | None) -> None:
    """Run the trials and the finals that are not over yet. ``grid``: the combinations of one."""
    finals = Finals(job, Table(folder, job.search.metric))
    if Clock(folder).finished == finals.name and not (job.search.hours or job.search.gpu_hours):
        return
    Clock(folder).check_place()
    environment.prepare(job.launch.address)
    from mimkd_ray.on_ray.driver_console import joined
    from mimkd_ray.on_ray.search import tune_search  # Ray takes seconds to import and reads its environment on import

    with joined(job.launch.address, "--launch.address", folder, job.launch.verbose) as own:
        shape = tune_search.shape_there(job, own)
        console.line(shape.text())
        if not own:
            tune_search.wait_for_others(job, shape)
        clock = Clock(folder)
        with tune_search.while_nodes_last(job, shape, own):
            with console.phase("preparing what all trials share"):
                tune_search.prepare_on_ray(configs.widest(), folder, shape)
            clock.save()  # from which the journal goes on
            tune_search.run_trials(job, folder, configs, grid, shape, own)
            table = Table(folder, job.search.metric)
            finals = Finals(job, table)
            if finals.runs:
                names = ", ".join(map(str, finals.chosen))
                console.line(f"finalists: trials {names}, {count(job.search.seeds, 'seed')} each")
                results = tune_search.run_finals(finals, folder, shape, own)
                chosen = finals.publish(job, folder, results)
                write_report(job, configs.base, table, clock.hours, chosen)
                means = ", ".join(f"trial {final.trial} {final.mean:.2f} %" for final in chosen)
                best = "the lowest cross-entropy" if job.search.metric == "cross_entropy" else "the best"
                console.line(f"mean top-1 of the finalists, {best} first: {means or 'none came to its end'}")
            clock.save(finals.name)
