"""The environment in which this process starts Ray. Ray reads parts of it on import, so it must be set before."""

from __future__ import annotations

import os
import secrets
import sys

EMBEDDED = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",  # there is no dashboard to show them
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # there is no dashboard to show them
    "RAY_worker_niceness": "0",  # the default of 15 would let other programs on a busy machine starve the training
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as Ray Train sets it for its controller
}
"""Defaults for a Ray started by this process; its processes inherit this environment."""

JOINED = {
    # After the loss of a node Ray Train may still count it and then waits for workers on it: by default for 60 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}
"""Defaults for joining an existing cluster; Ray Train passes them to its controller."""


def cluster_address(configured: str) -> str:
    """Return the address of the cluster to join: the configured one, else RAY_ADDRESS; empty if this process starts
    Ray."""
    return configured or os.environ.get("RAY_ADDRESS", "")


def prepare(configured: str) -> None:
    """Set the environment for Ray, except variables that the user has set. Call before Ray is imported.

    Ray listens on every interface and runs any code that is sent to it, so a Ray started by this process requires a
    token that only this process and its children know. (If Ray was already imported, its mode is fixed and not
    changed.)
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # workers' lines would be shown twice
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # Ray colours the names before workers' lines, in files too
    joins = bool(cluster_address(configured))
    for name, value in (JOINED if joins else EMBEDDED).items():
        os.environ.setdefault(name, value)
    if not joins and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
