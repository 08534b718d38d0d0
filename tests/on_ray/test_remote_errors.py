"""Errors on their way through Ray, as results of tasks; no Ray is started. tests/cli/test_errors.py has workers'."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from mimkd_ray.data.prepare.work_units import Done
from mimkd_ray.data.store.locks import HeldError
from mimkd_ray.errors import UserError
from mimkd_ray.on_ray import cache_actors, remote_errors
from mimkd_ray.on_ray.cache_actors import BuildActor
from mimkd_ray.storage import AccessError, StorageError


def rows(*runs: list[Any], told: list[Any] | None = None) -> list[tuple[int, str, str]]:
    """What a builder answers for three units of which each run gives these results and errors. ``told``: gets what it
    tells the driver on the way."""
    left = list(runs)

    def run(units: list[str], seen: Any) -> Iterator[tuple[int, Done]]:
        for at, result in enumerate(left.pop(0)):
            if isinstance(result, Exception):
                raise result
            assert units[at] == result
            seen(at, 1)
            yield at, Done(1, 1)

    actor = BuildActor.__new__(BuildActor)
    actor.mailbox = SimpleNamespace(put=SimpleNamespace(remote=(told if told is not None else []).append))
    actor.told = -1e9
    actor.builder, actor.failed = SimpleNamespace(run=run), None  # type: ignore[assignment]
    units = [remote_errors.ray.cloudpickle.dumps(name) for name in "abc"]
    found = actor({"number": [5, 6, 7], "unit": units})
    return [(row["number"][0], row["error"][0], row["message"][0]) for row in found]


def test_a_builder_answers_with_the_error_and_repeats_what_storage_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_errors, "RETRY_WAITS_S", (0.0, 0.0))
    assert rows(["a", HeldError("a lock")]) == [(5, "", ""), (-1, "UserError", "a lock")]
    assert rows([AccessError("no key")]) == [(-1, "AccessError", "no key")]
    away = StorageError("away")
    assert rows(["a", away], ["b", away], ["c"]) == [(5, "", ""), (6, "", ""), (7, "", "")]
    (answer,) = rows([away], [away], [away])
    assert answer[:2] == (-1, "StorageError")
    assert answer[2].startswith("away; start again")


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [(5, 1), (6, 1), (7, 1)]), (60.0, [(5, 1)])])
def test_a_builder_tells_how_far_it_is_by_the_drivers_numbers(
    monkeypatch: pytest.MonkeyPatch, seconds: float, expected: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(remote_errors, "RETRY_WAITS_S", (0.0,))
    monkeypatch.setattr(cache_actors, "TELL_SECONDS", seconds)
    told: list[tuple[int, int]] = []
    rows(["a", StorageError("away")], ["b", "c"], told=told)
    assert told == expected, "the second run has only the units that were left"


@pytest.mark.parametrize("error", [UserError("a flag"), StorageError("away"), AccessError("no key")])
def test_a_tasks_error_is_raised_as_it_was(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(cause: Exception) -> None:
        raise RayTaskError("task", "a long traceback", cause)

    monkeypatch.setattr(remote_errors.ray, "get", get)
    with pytest.raises(type(error)) as raised:
        remote_errors.fetch(error)
    assert raised.value is error
    with pytest.raises(RayTaskError, match="a long traceback"):
        remote_errors.fetch(ZeroDivisionError())
