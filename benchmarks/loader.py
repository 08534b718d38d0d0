"""Speed of the loader: images/s at 224 px, against bare decoding and against other loaders.

Ours reads prepared shards on a local disk, decodes, takes RandomResizedCrop and flip, and hands over uint8 batches of
64. Its first epoch begins with an empty block store: blocks are read, compared with their sha256, parsed by Arrow, and
their images found in the file; the second epoch knows all that. The target applies to the first epoch, in which the
loader does all its work. All arms have one decoding process less than the machine has cores, as by default: a core is
the training process's.

* bare: the same decoding and transform of the same bytes in memory, in as many processes: no reading, no batches.
* all cores: ours and bare with a decoding process per core, so that all other work of ours takes their time.
* peers (loader_peers.py): each as its documentation sets it up, with its own decoder, from its own format on the same
  disk; and with our decoder and transform, which shows the remaining difference ("same decoder"). Peers that are not
  installed are left out.
* S3: ours from an S3 server on this machine, which takes a part of the same cores; blocks are copied to the store.

Arms take turns, in alternating order, each in a separate process; rates count from the 9th batch to the last, and
figures are medians of the rounds' ratios. Files are in the page cache. About 9 minutes on 2 cores with all peers.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import image_set
import torch
from children import in_child
from image_set import Encoded
from loader_peers import PEERS, Peer, Setting, count
from report import Targets, finish, parser, table
from s3_here import BUCKET, s3_server

from mimkd_ray.config import DataConfig
from mimkd_ray.data.loading.loader import train_batches
from mimkd_ray.data.order.sample_order import Order
from mimkd_ray.data.sources.data_set import open_data

BATCH = 64
BLOCK_ROWS = 128
WINDOW = 8  # blocks among which rows are shuffled: a quarter of the set
SKIPPED = 8  # batches before the clock starts
EPOCHS = ("first_epoch", "second_epoch")

Rates = dict[str, float]


def rate(batches: Iterable[Any]) -> float:
    """Return the images/s from the end of batch SKIPPED on."""
    images = 0
    began = 0.0
    for number, batch in enumerate(batches, start=1):
        size = count(batch)
        if number > SKIPPED:
            images += size
        elif number == SKIPPED:
            began = time.perf_counter()
    return images / (time.perf_counter() - began)


def ours(root: str, workers: int) -> Rates:
    """Return the images/s of two epochs, beginning with an empty block store."""
    with tempfile.TemporaryDirectory(prefix="blocks-") as store:
        source = open_data(DataConfig(root=root, val_split="train", store=f"{store}/blocks")).train
        order = Order(source.blocks, 1, BATCH, seed=0, window=WINDOW)
        steps = order.steps_per_epoch
        batches = train_batches(
            source,
            DataConfig(pipeline="imagenet", image_size=image_set.SIZE, views=0, loader_workers=workers),
            order,
            0,
            lanes=[0],
            start_step=0,
            stop_step=len(EPOCHS) * steps,
        )
        times = []
        for number, batch in enumerate(batches, start=1):
            count((batch.images_BCHW,))
            if number in (SKIPPED, steps, 2 * steps):
                times.append(time.perf_counter())
    started, middle, end = times
    return {
        "first_epoch": (steps - SKIPPED) * BATCH / (middle - started),
        "second_epoch": steps * BATCH / (end - middle),
    }


def one(key: str, value: Callable[[], float]) -> Rates:
    """Return the rate of an arm that has only one."""
    return {key: value()}


def all_cores(root: str, workers: int) -> Rates:
    """Return the rates of ours under separate names."""
    return {f"{key}, all cores": value for key, value in ours(root, workers).items()}


def peer_rate(peer: Peer, setting: Setting) -> float:
    """Return the images/s of a peer."""
    torch.set_num_threads(1)
    return rate(peer.batches(setting))


def make_arms(
    rows: Sequence[Encoded], folder: Path, workers: int, peers: Sequence[str]
) -> dict[str, Callable[[], Rates]]:
    """Write the data of each arm; return the arms, ours and bare next to each other."""
    root = str(folder / "prepared")
    image_set.prepared(rows, folder / "plain", root, BLOCK_ROWS)
    arms: dict[str, Callable[[], Rates]] = {
        "ours": partial(ours, root, workers),
        "bare": partial(one, "bare", partial(image_set.bare_rate, rows, workers, SKIPPED * BATCH // workers)),
    }
    cores = os.cpu_count() or 1
    if cores != workers:
        bare = partial(image_set.bare_rate, rows, cores, SKIPPED * BATCH // cores)
        arms |= {"all cores": partial(all_cores, root, cores), "bare, all cores": partial(one, "bare, all cores", bare)}
    for name in peers:
        peer, place = PEERS[name], folder / name.replace(" ", "-")
        if not peer.installed:
            print(f"{name} is not installed: left out", flush=True)
            continue
        in_child(partial(peer.write, rows, place))
        for key, same in ((name, False), (f"{name}, same decoder", True)):
            setting = Setting(folder=place, batch=BATCH, workers=workers, same=same)
            arms[key] = partial(one, key, partial(peer_rate, peer, setting))
    return arms


def take_turns(arms: Mapping[str, Callable[[], Rates]], rounds: int) -> dict[str, list[float]]:
    """Return the rates of every arm, round by round."""
    rates: dict[str, list[float]] = {}
    for number in range(rounds):
        found: Rates = {}
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            found |= in_child(arms[name])
        for name, value in found.items():
            rates.setdefault(name, []).append(value)
        print(f"round {number + 1}: " + ", ".join(f"{name} {value:.0f}" for name, value in found.items()), flush=True)
    return rates


def ratio(rates: Mapping[str, list[float]], above: str, below: str) -> float:
    """Return the median over rounds of one arm's rate over another's."""
    return statistics.median(a / b for a, b in zip(rates[above], rates[below], strict=True))


def from_s3(rows: Sequence[Encoded], folder: Path, workers: int, rounds: int) -> dict[str, list[float]]:
    """Return the rates of ours from an S3 server, without added latency."""
    with s3_server(0.0):
        root = f"s3://{BUCKET}/set"
        # In a child: this process is forked repeatedly and must have no connections of its own.
        in_child(partial(image_set.prepared, rows, folder / "plain", root, BLOCK_ROWS))
        return take_turns({"ours from S3": partial(ours, root, workers)}, rounds)


def main() -> int:
    options = parser(__doc__)
    image_set.add_options(options, rows=8192)
    options.add_argument("--rounds", type=int, default=5, help="rounds of all arms")
    options.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="loader processes of each arm"
    )
    options.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="whom to compare with")
    args = options.parse_args()
    torch.set_num_threads(1)  # of this process and those forked from it: processes share the cores
    rows = image_set.images(args.images, args.rows)
    with tempfile.TemporaryDirectory(prefix="loader-") as name:
        folder = Path(name)
        rates = take_turns(make_arms(rows, folder, args.workers, args.peers), args.rounds)
        s3 = from_s3(rows, folder, args.workers, min(2, args.rounds))
    figures = {
        f"{key.replace(',', '').replace(' ', '_')}/images_per_second": statistics.median(values)
        for key, values in rates.items()
    }
    figures |= {f"s3_{key}/images_per_second": statistics.median(values) for key, values in s3.items()}
    shown = [[key, statistics.median(v), ratio(rates, "first_epoch", key)] for key, v in rates.items()]
    shown += [[f"{key}, from S3", statistics.median(v), ""] for key, v in s3.items()]
    print(table(["images/s", "median", "first_epoch / this"], shown), flush=True)
    figures["ours_over_bare"] = ratio(rates, "first_epoch", "bare")
    figures["second_epoch_over_bare"] = ratio(rates, "second_epoch", "bare")
    if "bare, all cores" in rates:
        figures["ours_over_bare_all_cores"] = ratio(rates, "first_epoch, all cores", "bare, all cores")
    targets: dict[str, tuple[Any, float]] = {"ours_over_bare": (">=", 0.90), "second_epoch_over_bare": (">=", 0.90)}
    found = [name for name in PEERS if name in rates]
    if found:
        figures["ours_over_best_peer"] = min(ratio(rates, "first_epoch", name) for name in found)
        figures["ours_over_best_peer_same_decoder"] = min(
            ratio(rates, "first_epoch", f"{name}, same decoder") for name in found
        )
        targets["ours_over_best_peer"] = (">=", 1.2)
    checked: Targets = targets
    return finish("loader", figures, checked, args.json)


if __name__ == "__main__":
    sys.exit(main())
