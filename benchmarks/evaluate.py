"""Speed of `evaluate`: images/s of its pass over a set, against bare inference.

* ours: `collect`, the pass of `evaluate`: it reads, decodes, normalises, runs the network with its taps, and keeps
  logits and features. Teacher, k-NN and probe, which are work of their own, are off.
* bare loop: a plain loop over the same batches of the same loader, which runs the network and counts what is right.
* in memory: the same loop over decoded images in memory: inference alone. On a GPU, and where decoding has cores of its
  own, ours can be as fast; on few cores decoding takes its share.

Arms take turns, in alternating order; figures are medians of the rounds' ratios. The target is that of ours against the
bare loop.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import image_set
import torch
from report import Targets, finish, parser, table

from mimkd_ray.cli.local_launch import LocalContext
from mimkd_ray.config import Config, DataConfig, ModelConfig, TrainConfig
from mimkd_ray.config.jobs.evaluate import EvaluateConfig, evaluate_job
from mimkd_ray.data.loading.batches import LaneBatch
from mimkd_ray.data.loading.loader import eval_batches, to_device
from mimkd_ray.data.sources.data_set import Data, open_data
from mimkd_ray.evaluation.forward_pass import collect
from mimkd_ray.evaluation.networks import Network, normalizer, subject_of

TARGETS: Targets = {"ours_over_bare_loop": (">=", 0.95)}


def bare(network: Network, job: Config, batches: Iterable[LaneBatch], device: torch.device) -> int:
    """Run the network without its taps on the batches; return how many images it has right."""
    normalize = normalizer(job, device)
    model = network.tapped.model
    right = 0
    with torch.no_grad():
        for batch in to_device(batches, device):
            right += int((model(normalize(batch.images_BCHW)).argmax(dim=1) == batch.labels_B).sum())
    return right


def loader(job: Config, data: Data) -> Iterator[LaneBatch]:
    """Return the batches as `collect` has them."""
    return eval_batches(data.val, job.data, job.train.eval_batch)


def compare(job: Config, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the images/s of each arm, round by round."""
    data = open_data(job.data)
    measured = evaluate_job(job, eval=EvaluateConfig(tap_rows=0))
    network = subject_of(measured, "", job, data, device).network
    kept = [batch.each_tensor(torch.clone) for batch in loader(job, data)]
    context = LocalContext(device)
    arms: dict[str, Callable[[], object]] = {
        "ours": lambda: collect([network], data.val, job, context),
        "bare_loop": lambda: bare(network, job, loader(job, data), device),
        "in_memory": lambda: bare(network, job, kept, device),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for count in range(rounds + 1):  # the first one fills caches
        for name in list(arms)[:: 1 if count % 2 else -1]:
            began = time.perf_counter()
            arms[name]()
            if count:
                rates[name].append(data.val.num_rows / (time.perf_counter() - began))
    return rates


def main() -> int:
    options = parser(__doc__)
    image_set.add_options(options, 512)
    options.add_argument("--model", default="mobilenet_v2", help="network (224 px)")
    options.add_argument("--batch", type=int, default=64, help="images of a batch")
    options.add_argument("--rounds", type=int, default=5, help="rounds of all arms")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        rows = image_set.images(args.images, args.rows)
        image_set.write_parquet(rows, Path(folder) / "train-00000-of-00001.parquet")
        job = Config(
            data=DataConfig(root=folder, val_split="train", pipeline="imagenet", image_size=image_set.SIZE, store_gb=0),
            student=ModelConfig(name=args.model),
            train=TrainConfig(eval_batch=args.batch),
        )
        rates = compare(job, args.rounds, device)

    def ratio(below: str) -> float:
        return statistics.median(mine / other for mine, other in zip(rates["ours"], rates[below], strict=True))

    figures = {f"ours_over_{name}": ratio(name) for name in ("bare_loop", "in_memory")}
    figures |= {f"{name}_images_per_second": statistics.median(each) for name, each in rates.items()}
    print(table(["arm", "images/s"], [[name, statistics.median(each)] for name, each in rates.items()]))
    return finish("evaluate", figures, TARGETS, args.json)


if __name__ == "__main__":
    sys.exit(main())
