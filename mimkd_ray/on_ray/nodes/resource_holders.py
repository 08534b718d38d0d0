"""What others hold of a cluster that this process has joined, and who they are, as Ray's state API tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.util.state import list_actors, list_jobs, list_placement_groups, list_tasks
from ray.util.state.exception import RayStateApiException

from mimkd_ray import console

MOST_NAMED, LONGEST_COMMAND = 3, 60
LIMIT = 1000
ANSWER_SECONDS = 10


class Held(NamedTuple):
    """Resources of a node that an actor, a task or a bundle of a placement group of a job holds."""

    node: str
    job: str
    amounts: Mapping[str, float]


def held_by_others() -> list[Held] | None:
    """Return what jobs other than this one hold. None, and a line, if the state API, which the dashboard serves, does
    not answer."""
    free, there = ray.available_resources(), ray.cluster_resources()
    if all(free.get(kind) == there.get(kind) for kind in ("CPU", "GPU")):  # an actor may hold a GPU and no CPU
        return []
    context = ray.get_runtime_context()
    try:
        return [held for held in all_held(context.gcs_address) if held.job != context.get_job_id()]
    except (RayStateApiException, OSError) as error:
        console.line(
            "what other jobs hold of the cluster is not known: its dashboard, which serves Ray's state API, "
            f"does not answer ({type(error).__name__})"
        )
        return None


def all_held(address: str) -> list[Held]:
    """Return what all jobs hold."""
    asked: dict[str, Any] = {"address": address, "limit": LIMIT, "timeout": ANSWER_SECONDS, "detail": True}
    found = [
        Held(bundle.get("node_id") or "", group.creator_job_id, bundle.get("unit_resources") or {})
        for group in list_placement_groups(filters=[("state", "=", "CREATED")], **asked)
        for bundle in group.bundles or []
    ]
    for actor in list_actors(filters=[("state", "=", "ALIVE")], **asked):
        if not actor.placement_group_id:
            found.append(Held(actor.node_id or "", actor.job_id, actor.required_resources or {}))
    for task in list_tasks(filters=[("state", "=", "RUNNING")], **asked):
        if not task.placement_group_id and task.type == "NORMAL_TASK":
            found.append(Held(task.node_id or "", task.job_id, task.required_resources or {}))
    return found


def named(held: Sequence[Held], kind: str) -> str:
    """Name those that hold most of a resource, such as "2 by job 02000000 (python other.py)"."""
    by_job: Counter[str] = Counter()
    for each in held:
        by_job[each.job] += each.amounts.get(kind, 0.0)  # type: ignore[assignment]
    try:
        address = ray.get_runtime_context().gcs_address
        jobs = list_jobs(address=address, limit=LIMIT, timeout=ANSWER_SECONDS)
        commands = {job.job_id: job.entrypoint[:LONGEST_COMMAND] for job in jobs if job.entrypoint}
    except (RayStateApiException, OSError):
        commands = {}
    names = [
        f"{amount:g} by job {job}" + (f" ({commands[job]})" if job in commands else "")
        for job, amount in by_job.most_common()
        if amount > 0
    ]
    more = f" and {len(names) - MOST_NAMED} more jobs" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
