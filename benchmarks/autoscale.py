"""Test Ray's autoscaler with a training job: 0 -> 2 workers -> training -> 0, with times.

The cluster is the one of cluster/aws.yaml, with its types of nodes and their limits, but on this machine: Ray's fake
provider starts a raylet where a cloud would start a machine, its nodes are small and have no GPUs, and idle ones are
removed after seconds. A job is submitted while the head, which has no CPUs, is the only node.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import yaml
from head_here import ROOT, Head, free_port, ray_head
from ray_overhead import CASE
from report import finish, parser, table

WORKERS = 2
LAUNCH = ("--launch.workers", str(WORKERS), "--launch.cpus-per-worker", "1", "--launch.wait-minutes", "10")
LOOK_SECONDS, LONGEST_SECONDS = 0.2, 600
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
"""Node id and type of the head in the fake provider."""

STAGES = {
    "asked_seconds": "submission, process, imports, checks: the job finds no nodes",
    "nodes_seconds": "both nodes are up",
    "workers_seconds": "the job sees them; controller, workers, process group",
    "first_step_seconds": "data, networks, first step",
    "end_seconds": "training to its end",
    "gone_seconds": "idle, and gone",
}


def cluster(address: str, idle_seconds: float) -> dict[str, Any]:
    """Return cluster/aws.yaml adapted to this machine. Raises KeyError if its structure has changed."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    types = config["available_node_types"]
    types[HEAD_TYPE] = types.pop(config["head_node_type"])
    for each in types.values():
        each["node_config"] = {}
        each["resources"] = {name: min(amount, 1) for name, amount in each["resources"].items()}
    # Setup of machines: Ray requires every part of it, even if it is empty.
    kinds = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    setup: dict[str, object] = {f"{kind}_commands": [] for kind in kinds}
    setup |= {"auth": {}, "docker": {}, "file_mounts": {}}
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter")
    return {
        **config,
        # As an external provider, because the wheel lacks the defaults of `type: fake_multinode`; these are the
        # defaults.
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "use_node_id_as_ip": True,  # all nodes have one address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": HEAD_TYPE,
        **setup,
        **{name: [] for name in lists},
        "file_mounts_sync_continuously": False,
        "idle_timeout_minutes": idle_seconds / 60,
    }


def nodes(head: Head) -> int:
    """Return the number of running nodes, without the head."""
    summary = head.ask("/nodes?view=summary")["data"]["summary"]
    raylets = [each["raylet"] for each in summary]
    return sum(raylet["state"] == "ALIVE" and not raylet["isHeadNode"] for raylet in raylets)


def wait_for(head: Head, wanted: int, job: subprocess.Popen[str] | None = None) -> float:
    """Wait for ``wanted`` nodes; return the time at which they were there."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while nodes(head) != wanted:
        ended = job is not None and job.poll() is not None
        if ended or time.monotonic() > deadline:
            said = job.communicate()[0] if job is not None and ended else ""
            raise SystemExit(f"{nodes(head)} nodes instead of {wanted}: {said}\n{head.log.read_text()}")
        time.sleep(LOOK_SECONDS)
    return time.time()


def scale(head: Head, steps: int, work: Path) -> dict[str, float]:
    """Train once; return the duration of each stage and the number of nodes."""
    where = ("--run.root", str(work), "--train.max-steps", str(steps))
    figures = {"nodes_before": float(nodes(head))}
    began = time.time()
    command = head.submit("scaled", "python", "jobs/imagenet.py", *CASE, *LAUNCH, *where)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(head.environment)
    ) as job:
        try:
            up = wait_for(head, WORKERS, job)
            said, _ = job.communicate(timeout=LONGEST_SECONDS)
        finally:
            job.kill()
    print(said, flush=True)
    if job.returncode:
        raise SystemExit(f"the job ended with status {job.returncode}")
    result = json.loads((work / "run" / "result.json").read_text())
    marks, end = result["timeline"], head.job("scaled")["end_time"] / 1000
    figures["nodes_after_training"] = float(nodes(head))
    gone = wait_for(head, 0)
    times = [began, marks["connected"], up, marks["worker"], marks["first_step"], end, gone]
    stages = dict(zip(STAGES, (b - a for a, b in pairwise(times)), strict=True))
    since = accumulate(stages.values())
    rows: list[list[object]] = [[text, stages[name], next(since)] for name, text in STAGES.items()]
    print(table(["", "seconds", "since submission"], rows), flush=True)
    return {**figures, **stages, "workers": float(result["workers"]), "nodes_at_the_end": float(nodes(head))}


def main() -> int:
    options = parser(__doc__)
    options.set_defaults(threads=1)
    options.add_argument("--steps", type=int, default=100, help="steps of training")
    options.add_argument("--idle-seconds", type=float, default=10.0, help="how long an idle node stays")
    args = options.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="autoscale-") as made:
        work = Path(made)
        file = work / "cluster.yaml"
        file.write_text(yaml.safe_dump(cluster(f"127.0.0.1:{port}", args.idle_seconds)))
        with ray_head(
            *("--num-cpus", "0", "--autoscaling-config", str(file)),
            port=port,
            RAY_FAKE_CLUSTER="1",
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
            OMP_NUM_THREADS=str(args.threads),
        ) as head:
            figures = scale(head, args.steps, work) | {"idle_timeout_seconds": args.idle_seconds}
    targets: dict[str, tuple[Any, float]] = {
        "nodes_before": ("<=", 0),
        "workers": (">=", WORKERS),
        "nodes_at_the_end": ("<=", 0),
    }
    return finish("autoscale", figures, targets, args.json)


if __name__ == "__main__":
    sys.exit(main())
