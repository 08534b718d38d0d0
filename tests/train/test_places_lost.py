"""A run whose directory, stored blocks or process are touched from outside while it goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import IMAGES, table
from tiny_run import run_tiny, tiny_config

from mimkd_ray import local_files, storage
from mimkd_ray.cli import local_launch, training
from mimkd_ray.config import DataConfig, RunConfig
from mimkd_ray.data.loading.batches import Key
from mimkd_ray.data.loading.loader import eval_batches, view_batches
from mimkd_ray.data.sources.data_set import open_data
from mimkd_ray.data.store.stored_block import StoredBlock, read_stored
from mimkd_ray.errors import UserError
from mimkd_ray.train.records.run_dir import MetricsLog


@pytest.mark.parametrize("how", ["moved", "removed", "begun anew"])
def test_a_directory_that_goes_away_ends_the_run_with_a_line(how: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    log = MetricsLog(str(run), 0, RunConfig(tensorboard=False))
    log.write("train", 1, {"loss": 1.0})
    log.publish(str(run))
    shutil.move(run, tmp_path / "other")
    if how == "removed":
        shutil.rmtree(tmp_path / "other")
    if how == "begun anew":
        MetricsLog(str(run), 0, RunConfig(tensorboard=False)).close()
    with pytest.raises(UserError, match=r"metrics\.jsonl is gone, or another file: the directory of the run was moved"):
        log.publish(str(run))
    assert run.exists() == (how == "begun anew"), "it is not made again with half of the files"


def test_a_finished_run_can_be_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tiny(tmp_path / "tiny", run={"root": str(tmp_path), "name": "tiny"}, train={"max_steps": 1})

    def refuse(url: str, data: bytes) -> None:
        raise UserError(f"cannot write {url}: Read-only file system")

    monkeypatch.setattr(storage, "write_bytes", refuse)
    config = tiny_config(run={"root": str(tmp_path), "name": "tiny", "keep_best": True}, train={"max_steps": 1})
    assert training.run(config)["recipe"] == "tiny"


def test_a_stored_block_is_verified_again_when_an_image_of_it_cannot_be_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bits flip in the store, where a block is verified only when it comes in."""
    import pyarrow.parquet as pq

    for split in ("train", "validation"):
        pq.write_table(table(), tmp_path / f"{split}-00000-of-00001.parquet")
    store = tmp_path / "store"
    config = DataConfig(root=str(tmp_path), store=str(store), pipeline="none", image_size=8, loader_workers=0)
    data = open_data(config)
    block = StoredBlock.of([b"damaged" for _ in IMAGES], data.val.labels())
    data.val.fetch(0)
    (stored,) = (path for path in store.rglob("*") if path.is_file() and _is_block(path))
    block.write(stored, durable=False)
    (batch,) = eval_batches(data.val, config, 40)
    assert batch.damaged == ()
    assert "validation-00000-of-00001.parquet: an image of row group 0 cannot be decoded: it is fetched" in caplog.text
    assert len(batch.images_BCHW) == len(IMAGES)
    data.val._loaded_again.clear()  # as another process
    block.write(stored, durable=False)
    (cached,) = view_batches(data.val, config, [Key(0, 0, np.arange(len(IMAGES)), 0)], 0)
    assert cached.damaged == (), "for a cache, too"
    assert torch.equal(cached.images_BCHW, batch.images_BCHW)
    stored.write_bytes(b"")
    again = data.val.read_again(0)
    assert again is not None
    assert stored.read_bytes() == b"", "verified anew once in a process: an image may be damaged at its source"


def _is_block(path: Path) -> bool:
    try:
        return bool(len(read_stored(path).labels))
    except ValueError:
        return False


def test_folders_of_killed_processes_are_removed_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_files.tempfile, "tempdir", str(tmp_path))
    mine = Path(local_files.scratch_folder("run"))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    elsewhere = mine.with_name(f"mimkd-run-00000000-{ended.pid}-abc")
    stranger = tmp_path / "mimkd-data"
    for folder in (left, elsewhere, stranger):
        folder.mkdir()
    assert Path(local_files.scratch_folder("ray")).is_dir()
    assert [folder.exists() for folder in (mine, left, elsewhere, stranger)] == [True, False, True, True]
    with local_files.scratch("trial") as own:
        Path(own, "file").touch()
    assert not Path(own).exists()


def test_a_process_that_is_stuck_ends_on_request(tmp_path: Path) -> None:
    """And one in which a step ends goes on for as long as it takes."""
    code = (
        "import signal, os, time, torch; from mimkd_ray.cli import local_launch as l\n"
        "l.STOP_SECONDS = 0.5\n"
        "for heard in (True, False):\n"
        "    context = l.LocalContext(torch.device('cpu'))\n"
        "    with context.stops_on_signals():\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('heard', heard and context.stop_requested(), flush=True)\n"
        "        end = time.monotonic() + (2 if heard else 30)\n"
        "        while time.monotonic() < end: time.sleep(0.05)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    first, second, *end = done.stdout.splitlines()
    assert (first, second) == ("heard True", "heard False"), "the first was let go on"
    assert "no step has ended in" in " ".join(end) + done.stderr
    assert local_launch.STOP_SECONDS > 60
