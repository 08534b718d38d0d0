"""The address of the Ray cluster that a job joins: the configured one, else RAY_ADDRESS. Imports no Ray."""

from __future__ import annotations

import os
import shlex
import sys

from mimkd_ray.errors import UserError


def cluster_address(configured: str) -> str:
    """Return the address of the cluster to join: the configured one, else RAY_ADDRESS; empty if this process starts
    Ray."""
    return configured or os.environ.get("RAY_ADDRESS", "")


def checked_address(configured: str) -> str:
    """Return the address of the cluster to join. Raises UserError for that of Ray's job server, at which `ray job
    submit` sends jobs."""
    address = cluster_address(configured)
    if address.startswith(("http://", "https://")):
        job = shlex.join(["python", *sys.argv])
        raise UserError(
            f"{address} is where `ray job submit` sends jobs, and no address to connect to: submit this job with `ray "
            f"job submit --address {address} --working-dir . -- {job}`, or unset RAY_ADDRESS for a Ray of this "
            "process's own"
        )
    return address
