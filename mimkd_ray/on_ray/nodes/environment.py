"""The environment in which this process starts Ray. Ray reads parts of it on import, so it must be set before."""

from __future__ import annotations

import os
import secrets
import sys

from mimkd_ray import run_lock
from mimkd_ray.errors import UserError
from mimkd_ray.on_ray.nodes.cluster_address import checked_address
from mimkd_ray.user_functions import LOOK_IN

EMBEDDED = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",  # nobody collects those of a Ray that ends with its run
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away with a notice to Ray
    "RAY_enable_metrics_collection": "0",  # nobody collects those either
    # Without clusters, as Ray has it on Windows, its node is 127.0.0.1, and all its servers listen there alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_worker_niceness": "0",  # the default of 15 would let other programs on a busy machine starve the training
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as Ray Train sets it for its controller
}
"""Defaults for a Ray started by this process; its processes inherit this environment."""

JOINED = {
    # After the loss of a node Ray Train may still count it and then waits for workers on it: by default for 60 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}
"""Defaults for joining an existing cluster; Ray Train passes them to its controller."""

OWNER = "MIMKD_RAY_OWNER"
"""Variable of all processes of a Ray started by this one: its number and identity (stale_processes.py)."""

LONGEST_FOLDER = 38
"""Bytes of a temporary folder whose sockets fit: Linux allows 107, and Ray appends up to 69."""
SHORT_FOLDER = "/tmp"
TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # its boxes are printed whatever `verbose` says
    "TUNE_GLOBAL_CHECKPOINT_S": "5",  # a killed search repeats at most what came after its last saved state
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",  # short trials save often
    "TUNE_WARN_THRESHOLD_S": "10",  # the report is drawn in a callback
}
"""Defaults for Ray Tune."""


def prepare(configured: str) -> None:
    """Set the environment for Ray, except variables that the user has set. Call before Ray is imported.

    Ray runs any code that is sent to it, so a Ray started by this process listens on 127.0.0.1, and requires a token
    that only this process and its children know. (If Ray was already imported, both are fixed and not changed.)
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # workers' lines would be shown twice
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # Ray colours the names before workers' lines, in files too
    joins = bool(checked_address(configured))
    for name, value in (TUNE | (JOINED if joins else EMBEDDED)).items():
        os.environ.setdefault(name, value)
    if not joins:
        os.environ.setdefault(LOOK_IN, os.getcwd())
        os.environ[OWNER] = f"{os.getpid()} {run_lock.process(os.getpid())}"
        _shorten_folder()
    if not joins and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _shorten_folder() -> None:
    """Give Ray a temporary folder that its sockets fit into. Raises UserError if the user has named one that is too
    long."""
    named = os.environ.get("RAY_TMPDIR")
    folder = named or os.environ.get("TMPDIR", "")
    if len(os.fsencode(folder)) <= LONGEST_FOLDER:
        return
    if named or not os.access(SHORT_FOLDER, os.W_OK):
        raise UserError(
            f"{'RAY_TMPDIR' if named else 'TMPDIR'} {folder} has {len(os.fsencode(folder))} bytes, and the names of "
            "Ray's sockets below it would be longer than Linux allows: set RAY_TMPDIR to a folder of at most "
            f"{LONGEST_FOLDER}"
        )
    os.environ["RAY_TMPDIR"] = SHORT_FOLDER
    print(f"TMPDIR {folder} is too long for Ray's sockets: Ray's files are in {SHORT_FOLDER}/ray", flush=True)
