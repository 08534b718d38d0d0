"""Legs: a run that goes on from where another ended, with more epochs, another rate or other data.

A leg is a run in a directory of its own, NAME-leg2 after NAME, with a schedule of its own that starts at step 0. It
begins with what the last leg left: the weights of student and critics, the queue, and the optimiser's state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from mimkd_ray import storage
from mimkd_ray.config import Config
from mimkd_ray.config.digest import differences, training_dict, training_part
from mimkd_ray.errors import UserError
from mimkd_ray.json_files import read_json
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.outcomes import CONFIG, has_trained

WEIGHTS = "student.safetensors"

C = TypeVar("C", bound=Config)


def leg_of(config: C, run_dir: str) -> tuple[C, str]:
    """Return the config and the directory of the leg that ``config`` is: one that was begun with the same training
    configuration, or the next one after the last, in place of one that was refused before it had trained. ``run_dir``
    is the first leg's.

    Raises UserError for a comparison, for a run without a name, for another kind of optimiser, and if the last leg has
    nothing to go on from.
    """
    if config.compare.seeds:
        raise UserError("run.extend goes on with one run, and compare.seeds trains several: pass --compare.seeds 0")
    if not config.run.name:
        raise UserError("run.extend needs to know which run it extends: pass --run.name with the name of its directory")
    wanted = training_dict(config)
    last, optimiser, number = "", config.optim.name, 0
    for place, begun in _legs(run_dir):
        number += 1
        start_from = begun["run"].get("start_from", "")
        if not differences(training_part(begun), wanted):
            return replace(config, run=replace(config.run, start_from=start_from)), place
        if last and not has_trained(place):
            number -= 1
            break
        last, optimiser = place, begun.get("optim", {}).get("name", optimiser)
    if not last:
        return config, run_dir
    if checkpoint.newest(last) is None and not storage.exists(storage.join(last, WEIGHTS)):
        raise UserError(
            f"{last} was begun and has no checkpoint to go on from: let it reach one, or start anew with "
            "--run.overwrite true"
        )
    if optimiser != config.optim.name:
        raise UserError(
            f"{last} was trained with {optimiser}, whose state a leg goes on with, and optim.name is "
            f"{config.optim.name}: pass --optim.name {optimiser}, or another --run.name with --student.weights "
            f"{storage.join(last, WEIGHTS)}"
        )
    return replace(config, run=replace(config.run, start_from=last)), f"{run_dir}-leg{number + 1}"


def _legs(run_dir: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Directory and config of each leg that was begun."""
    number = 1
    while True:
        place = run_dir if number == 1 else f"{run_dir}-leg{number}"
        begun = read_json(storage.join(place, CONFIG), {"run": dict})
        if begun is None:
            return
        yield place, begun
        number += 1


def history(config: Config) -> list[dict[str, Any]]:
    """Return the legs of a run up to this one, for its result: {"from", "epochs", "changes"} of each; [] of a run that
    did not start from another. They are read from the configs, because a leg that was stopped has no result; legs
    before one whose directory is gone are left out."""
    found: list[dict[str, Any]] = []
    part, place = training_dict(config), config.run.start_from
    seen = {""}
    while place not in seen:
        seen.add(place)
        begun = read_json(storage.join(place, CONFIG), {"run": dict, "train": dict})
        if begun is None:
            break
        before = training_part(begun)
        found.append({"from": place, "epochs": part["train"]["epochs"], "changes": differences(before, part)})
        part, place = before, begun["run"].get("start_from", "")
    if found:
        found.append({"from": place, "epochs": part["train"]["epochs"], "changes": []})
    return found[::-1]
