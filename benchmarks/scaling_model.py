"""Prediction for a cluster before it is rented: images/s, hours and cost of an epoch for 8 to 512 GPUs.

    python benchmarks/scaling_model.py --step-ms 180 --lane-batch 64 --gradient-mb 47 --link-gbit 25 --storage-gbit 10

Measure the step on one GPU of the intended kind (`images_per_second` of a run there), and links and storage with
`python -m mimkd_ray doctor`. The model:

* A step takes max(compute + exposed reduction, input).
* compute: the measured step of one worker, unchanged: each worker keeps its lane batch (weak scaling).
* reduction: a ring within a node is free; between nodes 2 (n - 1)/n gradient bytes cross the slowest link, plus a
  latency for each of 2 (n - 1) hops. `--overlap` of it hides behind the backward pass (DDP reduces while it runs), as
  far as that lasts: two thirds of the compute.
* input: in the first epoch blocks come from object storage, whose bandwidth is a node's own, up to
  `--storage-total-gbit` for all together; later epochs read the nodes' disks. Decoding is bounded by `--decode`
  images/s of each GPU's cores.
* cost: GPU hours, and the head's. Spot machines that are lost cost the steps since the last checkpoint and the
  restart: `--losses` per GPU and hour, `--checkpoint-minutes`, `--restart-seconds`.

Not included: stragglers, contention within the network, NCCL's choice of algorithm, evaluation, checkpoints to storage.
Treat the prediction as an upper bound, and examine the row at which the columns bend.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from report import table

from mimkd_ray.cli import command_line

GPUS = (8, 16, 32, 64, 128, 256, 512)
BACKWARD = 2 / 3
"""Share of a step's compute in which gradients become ready."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Prediction for a cluster before it is rented: images/s, hours and cost of an epoch. The module describes the
    model."""

    step_ms: float
    """Measured step of one GPU with its lane, ms."""
    lane_batch: int
    """Images of a GPU in a step."""
    gradient_mb: float
    """Bytes of gradients, MB: 4 bytes a trained parameter."""
    link_gbit: float
    """Slowest link between nodes, Gbit/s."""
    storage_gbit: float
    """Bandwidth of object storage for one node, Gbit/s."""
    gpus_per_node: int = 1
    """GPUs behind one link."""
    hop_us: float = 50.0
    """Latency of a hop of the ring, us."""
    overlap: float = 0.8
    """Share of the reduction that can overlap with the backward pass."""
    storage_total_gbit: float = 400.0
    """Bandwidth of object storage for all nodes together, Gbit/s."""
    image_kb: float = 110.0
    """Stored size of an image, kB; smaller if the set was prepared with a short side."""
    decode: float = 5000.0
    """Images/s that the cores of one GPU decode."""
    images: int = 1_281_167
    """Images of an epoch."""
    gpu_hour: float = 1.0
    """Price of a GPU's share of its machine for an hour."""
    head_hour: float = 0.2
    """Price of the head for an hour."""
    losses: float = 0.0
    """Spot losses per GPU and hour."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints."""
    restart_seconds: float = 30.0
    """Seconds from a loss to the next step."""
    gpus: tuple[int, ...] = GPUS
    """Cluster sizes to predict."""
    json: str = ""
    """File to which the predictions are written as well."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one cluster size. Shares are of the step."""

    gpus: int
    compute_ms: float
    reduction_ms: float
    input_first_ms: float
    input_later_ms: float
    step_first_ms: float
    step_ms: float
    images_per_second: float
    efficiency: float
    epoch_hours: float
    epoch_cost: float


def predict(known: Cluster, gpus: int) -> Prediction:
    """Return the prediction for this many GPUs."""
    nodes = max(1, gpus // known.gpus_per_node)
    reduction = 0.0
    if nodes > 1:
        bytes_each = 2 * (nodes - 1) / nodes * known.gradient_mb * 1e6
        reduction = 1e3 * bytes_each * 8 / (known.link_gbit * 1e9) + 1e-3 * known.hop_us * 2 * (nodes - 1)
    hidden = min(known.overlap * reduction, BACKWARD * known.step_ms)
    busy = known.step_ms + reduction - hidden
    storage = min(known.storage_gbit, known.storage_total_gbit / nodes) * 1e9 / 8  # bytes/s of a node
    read = known.gpus_per_node * known.lane_batch * known.image_kb * 1e3 / storage
    decode = known.lane_batch / known.decode
    first, later = 1e3 * max(read, decode), 1e3 * decode
    step_first, step = max(busy, first), max(busy, later)
    rate = gpus * known.lane_batch / step * 1e3
    hours = known.images / rate / 3600
    # A loss anywhere costs all GPUs half a checkpoint's interval and the restart.
    lost = known.losses * gpus * (known.checkpoint_minutes * 30 + known.restart_seconds) / 3600
    hours = hours / (1 - lost) if lost < 1 else float("inf")
    return Prediction(
        gpus=gpus,
        compute_ms=known.step_ms,
        reduction_ms=reduction - hidden,
        input_first_ms=first,
        input_later_ms=later,
        step_first_ms=step_first,
        step_ms=step,
        images_per_second=rate,
        efficiency=known.step_ms / step,
        epoch_hours=hours,
        epoch_cost=hours * (gpus * known.gpu_hour + known.head_hour),
    )


def main() -> int:
    known = command_line.from_flags(Cluster, sys.argv[1:])
    if known is None:
        return 0
    found = [predict(known, gpus) for gpus in known.gpus]
    assumed = {name: value for name, value in asdict(known).items() if name not in ("gpus", "json")}
    print(f"assumed: {', '.join(f'{name} {value:g}' for name, value in assumed.items())}\n")
    header = ["GPUs", "step ms", "reduction", "input", "first epoch", "images/s", "efficiency", "epoch h", "cost"]
    rows: list[list[object]] = [
        [
            each.gpus,
            each.step_ms,
            each.reduction_ms,
            each.input_later_ms,
            each.step_first_ms,
            round(each.images_per_second),
            f"{each.efficiency:.0%}",
            each.epoch_hours,
            each.epoch_cost,
        ]
        for each in found
    ]
    print(table(header, rows))
    if known.json:
        report = {"assumed": assumed, "predicted": [asdict(each) for each in found]}
        Path(known.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
