"""Puts this folder on the path, for the helpers in it, and deals the tests to the processes of pytest-xdist."""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores


class Dealer(LoadScopeScheduling):
    """Deals whole files, as their fixtures are dear. Those of launch/ go to one process: two Rays would starve each
    other."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "launch" if "/launch/" in file else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Dealer:
    """Called by pytest-xdist."""
    return Dealer(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist launch/ begins first, because it takes longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.parent.name != "launch")
