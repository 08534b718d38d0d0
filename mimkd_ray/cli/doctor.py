"""`python -m mimkd_ray doctor`: the checks of mimkd_ray/doctor on every node of a cluster, or on this machine.

Exit status: 0 nothing failed (there may be warnings), 1 a check failed, 2 bad input. On a cluster it needs one process
per node without reservations, and for the all-reduce one GPU on each node if all nodes have one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace

from mimkd_ray import storage
from mimkd_ray.cli import command_line
from mimkd_ray.config import DoctorConfig
from mimkd_ray.doctor.outcome import lines
from mimkd_ray.doctor.storage_checks import check_links
from mimkd_ray.on_ray.nodes import environment
from mimkd_ray.train.records.run_dir import write_json


def main(argv: Sequence[str], program: str) -> int:
    """Run the checks of a command line; return the exit status."""
    config = command_line.from_flags(DoctorConfig, argv, prog=program)
    return 0 if config is None else doctor(config)


def doctor(config: DoctorConfig) -> int:
    """Run the checks, print the lines, and return the exit status."""
    config = _absolute(config)
    environment.prepare(config.address)
    from mimkd_ray.on_ray.nodes import doctor_on_nodes  # Ray takes seconds to import, and reads its environment then

    outcomes = [*doctor_on_nodes.cluster(config), check_links(os.getcwd())]
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in ("pass", "warn", "fail")}
    for line in lines(outcomes):
        print(line)
    print(f"{counts['pass']} passed, {counts['warn']} warnings, {counts['fail']} failed", flush=True)
    if config.json:
        checks = [asdict(outcome) for outcome in outcomes]
        write_json(config.json, {"ok": not counts["fail"], **counts, "checks": checks})
    return 1 if counts["fail"] else 0


def _absolute(config: DoctorConfig) -> DoctorConfig:
    """Return the config with its places as any process needs them (places.py); Ray's workers start elsewhere."""

    def full(path: str) -> str:
        return storage.absolute(path) if path else ""

    return replace(config, root=tuple(map(full, config.root)), store=full(config.store), json=full(config.json))
