"""Checks of object storage, of the disk of the block store, and of the speed at which images are decoded."""

from __future__ import annotations

import io
import os
import time
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

import numpy as np

from mimkd_ray import storage
from mimkd_ray.data.augment.decode import decode
from mimkd_ray.data.store.block_store import BlockStore
from mimkd_ray.data.store.local_disk import is_on_local_disk
from mimkd_ray.doctor.outcome import Outcome, Status, redacted
from mimkd_ray.errors import UserError, count

OBJECT_BYTES = 16 << 20
"""Size of the object that is written and read to measure MB/s, about that of a block of data."""

SLOW_STORAGE_MB_S = 20.0
"""Reading speed below which a node gets fewer than 200 ImageNet images/s in its first epoch."""

IMAGE_BYTES = 110_000
"""Mean size of an unprocessed ImageNet training image."""

LATENCY_TRIES = 5

DISK_REMEDY = "name a local disk with --data.store (--store here), or less with --data.store-gb (--store-gb here)"

SLOW_DECODE = 300.0
"""Images/s of one core below which the check warns: less than half of the slowest server CPUs."""

DECODE_SECONDS = 0.5

MOST_FOLDERS = 2000
"""Folders that are looked through for links."""

NOT_SUBMITTED = (".git", ".venv", "venv", "__pycache__")
"""Names that Ray leaves out of what is submitted, beside those in .gitignore and .rayignore."""


def check_links(folder: str) -> Outcome:
    """Look for links below the folder that lead out of it: `ray job submit --working-dir` uploads what they lead to,
    under their own names. Names that its .gitignore or .rayignore has are left out."""
    patterns = list(NOT_SUBMITTED)
    for ignore in (Path(folder) / ".gitignore", Path(folder) / ".rayignore"):
        patterns += [line.strip().strip("/") for line in ignore.read_text().splitlines()] if ignore.exists() else []

    def goes(name: str) -> bool:
        return not any(fnmatch(name, pattern) for pattern in patterns)

    whole, found = Path(folder).resolve(), []
    for at, folders, files in islice(os.walk(folder), MOST_FOLDERS):
        links = [path for name in (*folders, *files) if goes(name) and (path := Path(at) / name).is_symlink()]
        found += [path for path in links if path.exists() and not path.resolve().is_relative_to(whole)]
        folders[:] = [name for name in folders if goes(name)]
    if not found:
        return Outcome(check="links", status="pass", text=f"none leads out of {folder}")
    named = ", ".join(f"{path.relative_to(folder)} to {path.resolve()}" for path in found[:3])
    return Outcome(
        check="links",
        status="warn",
        text=f"{count(len(found), 'link')} in {folder} to elsewhere: {named}",
        remedy="`ray job submit --working-dir .` would upload what is there to every node: name them in .rayignore",
    )


def leave_mark(folder: str) -> str:
    """Write a file to `folder` for the other nodes to find. Returns the error, "" on success."""
    try:
        storage.write_bytes(storage.join(folder, "mark"), b"mark")
    except (OSError, UserError) as error:
        return redacted(str(error))
    return ""


def check_storage(node: str, root: str, folder: str) -> Outcome:
    """Write, read, compare and delete an object of this node in `folder`, below `root`, with the credentials of this
    process, and look for the mark that another node has left there.

    Causes 32 MB of traffic. The object has a unique name and is removed, even if the check fails.
    """
    own = storage.join(folder, f"node-{os.urandom(6).hex()}")
    content = os.urandom(OBJECT_BYTES)
    try:
        if not storage.exists(storage.join(folder, "mark")):
            remedy = "it is not the same place there: give a URL or a folder that all nodes share"
            text = f"{root} does not show here what another node wrote to it"
            return Outcome(check="storage", status="fail", node=node, text=redacted(text), remedy=remedy)
        try:
            began = time.perf_counter()
            storage.write_bytes(own, content)
            write_s = time.perf_counter() - began
            began = time.perf_counter()
            back = storage.read_bytes(own)
            read_s = time.perf_counter() - began
            latency_ms = 1000 * min(_seconds_of_small_read(own) for _ in range(LATENCY_TRIES))
        finally:
            storage.remove_tree(own)
        left = storage.exists(own)
    except (OSError, UserError) as error:
        remedy = "check the endpoint, the credentials of this node, and that its policy allows the prefix"
        return Outcome(check="storage", status="fail", node=node, text=redacted(str(error)), remedy=remedy)
    if back != content or left:
        what = "other bytes came back than were written" if back != content else "a removed object is still there"
        remedy = "the store is not consistent: jobs cannot rely on it, use another"
        return Outcome(check="storage", status="fail", node=node, text=redacted(f"{root}: {what}"), remedy=remedy)
    write, read = OBJECT_BYTES / 1e6 / write_s, OBJECT_BYTES / 1e6 / read_s
    slow = read < SLOW_STORAGE_MB_S
    return Outcome(
        check="storage",
        status="warn" if slow else "pass",
        node=node,
        text=redacted(
            f"{root}: write {write:.0f} MB/s, read {read:.0f} MB/s ({read * 1e6 / IMAGE_BYTES:.0f} ImageNet images/s), "
            f"{latency_ms:.2f} ms a request"
        ),
        remedy="use storage in the nodes' region, and smaller images (--short-side 256 when preparing)" if slow else "",
        figures={"write_mb_s": write, "read_mb_s": read, "latency_ms": latency_ms},
        speed=read,
    )


def _seconds_of_small_read(url: str) -> float:
    began = time.perf_counter()
    storage.read_range(url, 0, 1)
    return time.perf_counter() - began


def check_disk(node: str, folder: str, gigabytes: float) -> Outcome:
    """Check that the block store can be created in `folder` ("" for the default) and that its disk has room for
    `gigabytes`."""
    if not gigabytes:
        return Outcome(check="disk", status="pass", node=node, text="no block store is wanted")
    store = BlockStore(folder)
    try:
        store.prepare()
    except UserError as error:
        text, _, remedy = str(error).partition("; ")
        return Outcome(check="disk", status="fail", node=node, text=text, remedy=remedy)
    except OSError as error:  # an existing folder that cannot be written to
        text = f"the block store {store.folder} cannot be used: {error}"
        return Outcome(check="disk", status="fail", node=node, text=text, remedy=DISK_REMEDY)
    disk = os.statvfs(store.folder)
    free = disk.f_bavail * disk.f_frsize / 1e9
    held = sum(entry.stat().st_size for entry in os.scandir(store.folder) if entry.is_file()) / 1e9
    text = f"{store.folder} has {free:.1f} GB free and {held:.1f} GB of blocks, the store may take {gigabytes:g} GB"
    figures = {"free_gb": free, "held_gb": held}
    status, advice = _judge_disk(store.folder, free + held, gigabytes)
    remedy = f"{advice}: {DISK_REMEDY}" if advice else ""
    return Outcome(check="disk", status=status, node=node, text=text, remedy=remedy, figures=figures, speed=free)


def _judge_disk(folder: Path, room: float, gigabytes: float) -> tuple[Status, str]:
    if room < gigabytes:
        return "fail", "the disk would run full"
    if not is_on_local_disk(folder):
        return "warn", "it is on a network's file system, which is slow to map"
    return "pass", ""


def check_decode(node: str, cores: int) -> Outcome:
    """Measure how many JPEGs of ImageNet's usual size one core decodes; `cores` is the number of the node's cores."""
    jpeg = photograph()
    decode(jpeg)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < DECODE_SECONDS:
        decode(jpeg)
        count += 1
    rate = count / (time.perf_counter() - began)
    text = (
        f"{rate:.0f} images/s a core ({len(jpeg) / 1000:.0f} kB, 500x375, without augmentation), {cores} cores: at "
        f"most {rate * cores:.0f}"
    )
    figures = {"images_s": rate, "cores": float(cores)}
    if rate < SLOW_DECODE:
        remedy = "is something else running? take more cores a GPU, or prepare the data with --short-side 256"
        return Outcome(check="decode", status="warn", node=node, text=text, remedy=remedy, figures=figures)
    return Outcome(check="decode", status="pass", node=node, text=text, figures=figures, speed=rate)


def photograph() -> bytes:
    """Return a JPEG of 500 x 375 that costs about as much as an ImageNet photograph: smooth shapes with grain, about 65
    kB."""
    from PIL import Image

    y, x = np.mgrid[0:375, 0:500]
    noise = np.random.default_rng(0).normal(0, 14, (375, 500, 3))
    waves = np.stack([np.sin(x / 31 + y / 47), np.cos(x / 53 - y / 29), np.sin((x + y) / 41)], axis=-1)
    pixels = np.clip(128 + 80 * waves + noise, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return out.getvalue()
