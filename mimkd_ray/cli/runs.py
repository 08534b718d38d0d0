"""`mimkd-ray runs ls | show | compare`: the runs below a folder or URL, one of them, the differences of several."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mimkd_ray import storage
from mimkd_ray.cli.command_line import parsed
from mimkd_ray.cli.result_table import SHAPE, columns, result_table
from mimkd_ray.cli.run_summary import closing, opening
from mimkd_ray.config import Config
from mimkd_ray.config.digest import differences, training_part
from mimkd_ray.config.form.json_form import from_dict
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_if_sound
from mimkd_ray.search.summary import CLOCK
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.outcomes import CONFIG, RESULT


def main(argv: Sequence[str], program: str) -> int:
    """Run one of the three for a command line; return the exit status. Raises UserError."""
    parser = argparse.ArgumentParser(prog=program, description="List, show and compare runs, local or by URL.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="all runs of a root").add_argument("root", nargs="?", default="runs")
    commands.add_parser("show", help="what a run is, and its result").add_argument("run")
    commands.add_parser("compare", help="results and differing fields").add_argument("run", nargs="+")
    options = parsed(parser, argv)
    if options is None:
        return 0
    if options.command == "ls":
        print(listing(storage.absolute(options.root)))
    elif options.command == "show":
        print(shown(storage.absolute(options.run)))
    else:
        print(comparison([storage.absolute(run) for run in options.run]))
    return 0


def listing(root: str) -> str:
    """Return the table of the runs below a root, those of searches and comparisons not taken apart."""
    places = sorted(storage.list_dirs(root))
    with ThreadPoolExecutor(storage.THREADS) as pool:
        found = list(pool.map(_facts, places))
    rows = [(_name(place), *_row(*facts)) for place, facts in zip(places, found, strict=True) if facts is not None]
    if not rows:
        raise UserError(f"{root} has no runs: give the folder or URL that was --run.root")
    return columns([("run", "state", "teacher", "student", "data", "top-1 %"), *rows])


def shown(run_dir: str) -> str:
    """Return the opening block of a run, and its table if it has a result."""
    config, result = _known(run_dir)
    read = from_dict(Config, {key: value for key, value in config.items() if key not in ("search", "space")})
    table = result_table(result) if result else f"state: {_state(run_dir, result)}"
    return "\n".join([opening(read, run_dir), table, *([closing(read, run_dir)] if result else [])])


def comparison(run_dirs: Sequence[str]) -> str:
    """Return the results of runs side by side, and the fields in which they differ from the first."""
    known = [_known(run_dir) for run_dir in run_dirs]
    rows = [(_name(place), *_row(place, *each)) for place, each in zip(run_dirs, known, strict=True)]
    lines = [columns([("run", "state", "teacher", "student", "data", "top-1 %"), *rows])]
    first = training_part(known[0][0])
    for place, (config, _) in zip(run_dirs[1:], known[1:], strict=True):
        found = differences(first, training_part(config)) or ["no field that decides what is trained"]
        lines += ["", f"{_name(run_dirs[0])} -> {_name(place)}:", *(f"  {line}" for line in found)]
    return "\n".join(lines)


def _name(run_dir: str) -> str:
    return run_dir.rstrip("/").rpartition("/")[2]


def _facts(run_dir: str) -> tuple[str, dict[str, Any], dict[str, Any] | None] | None:
    """The place, config and result of a run; None for a folder that is none."""
    config = read_if_sound(storage.join(run_dir, CONFIG), {"data": dict, "teacher": dict, "student": dict})
    result = read_if_sound(storage.join(run_dir, RESULT), {"student": dict})
    return None if config is None else (run_dir, config, result)


def _known(run_dir: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    facts = _facts(run_dir)
    if facts is None:
        raise UserError(f"{run_dir} is no run: it has no {CONFIG}; see mimkd-ray runs ls ROOT")
    return facts[1:]


def _row(run_dir: str, config: Mapping[str, Any], result: Mapping[str, Any] | None) -> tuple[str, ...]:
    try:
        names = (str(config["teacher"]["name"]), str(config["student"]["name"]), _name(config["data"]["root"]))
        return (_state(run_dir, result), *names, _top1(result or {}))
    except SHAPE:  # of one run, which must not hide the others
        return ("damaged", "", "", "", "")


def _top1(result: Mapping[str, Any]) -> str:
    if "compare" in result:
        return ", ".join(f"{arm} {value['mean']:.2f}" for arm, value in result["compare"].items())
    student = result.get("student", {})
    kind, key = ("", "top1") if student.get("head_learns", True) else ("k-NN ", "knn")
    return f"{kind}{student[key]:.2f}" if student.get(key) is not None else ""


def _state(run_dir: str, result: Mapping[str, Any] | None) -> str:
    if result is not None or (read_if_sound(storage.join(run_dir, CLOCK)) or {}).get("finished"):
        return "finished"
    step = checkpoint.newest_step(run_dir)
    return "begun" if step is None else f"saved at step {step}"
