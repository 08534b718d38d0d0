"""A run whose directory is in a store that goes away while it trains."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from failing_store import FailingStore
from tiny_run import run_tiny, wait_for_checkpoints

from mimkd_ray import retries, storage
from mimkd_ray.train import run_record
from mimkd_ray.train.records import checkpoint, rescue
from mimkd_ray.train.records.run_dir import MetricsLog, read_metrics


@pytest.fixture
def store(bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FailingStore]:
    """A store between this process and the bucket that fails on request. The home folder is the test's."""
    made = FailingStore(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(retries.PATIENCE, "")
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retries, "WAIT_CAP_S", 0.05)
    monkeypatch.setattr(run_record, "BUSY_SECONDS", 0.1)
    yield made
    made.close()


def _lost_at(store: FailingStore, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the credentials expire when the metrics of a step are written."""
    write = MetricsLog.write

    def write_and_lose(log: MetricsLog, kind: str, done: int, values: Any) -> None:
        write(log, kind, done, values)
        if (kind, done) == ("train", step):
            wait_for_checkpoints()
            store.how = "expired"

    monkeypatch.setattr(MetricsLog, "write", write_and_lose)


OPTIONS: dict[str, Any] = {
    "run": {"keep_best": True, "checkpoint_steps": 2, "tensorboard": False},
    "storage": {"patience_minutes": 0.005},
}


def test_a_state_that_cannot_be_written_is_saved_here_and_gone_on_from(
    store: FailingStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_tiny(tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as lost:
        _lost_at(store, 4, lost)
        with pytest.raises(storage.StorageError, match=r"the credentials have expired|they may have expired") as error:
            run_tiny(f"{bucket}/run", **OPTIONS)
    said = str(error.value)
    found = re.search(r"saved on \S+ in (\S+) \((.*)\): once the store answers, aws s3 cp --recursive", said)
    assert found is not None, said
    (folder,) = (tmp_path / "home" / rescue.FOLDER).iterdir()
    assert (found[1], found[2]) == (str(folder), "checkpoints, metrics.jsonl")
    assert checkpoint.newest(str(folder)) is not None
    store.how = ""
    steps = [url.rpartition("/step_")[2][:8] for url in storage.list_dirs(f"{bucket}/run/checkpoints")]
    assert steps == ["00000002", "00000003"]
    for path in storage.list_tree(str(folder)):
        storage.upload(folder / path, f"{bucket}/run/{path}")
    again = run_tiny(f"{bucket}/run", **OPTIONS)
    assert again["resumed_from"] == 4
    assert again["student"] == whole["student"]
    assert [line["step"] for line in read_metrics(f"{bucket}/run", "train")] == [1, 2, 3, 4, 5, 6]


def test_a_result_that_cannot_be_written_is_saved_here(
    store: FailingStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as lost:
        _lost_at(store, 6, lost)
        with pytest.raises(storage.StorageError, match=r"metrics\.jsonl, result\.json, student\.safetensors\)"):
            run_tiny(f"{bucket}/run", **OPTIONS)
    (folder,) = (tmp_path / "home" / rescue.FOLDER).iterdir()
    assert (folder / "student.safetensors").stat().st_size > 1000
    assert [line["step"] for line in read_metrics(str(folder), "eval")] == [3, 6]
    shutil.rmtree(folder)


def test_a_store_that_comes_back_costs_a_run_nothing(
    store: FailingStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes away before an evaluation, whose figures and best student come with the next checkpoint."""
    options = OPTIONS | {"storage": {"patience_minutes": 1.0}}
    _lost_at(store, 3, monkeypatch)
    store.most = 8
    done = run_tiny(f"{bucket}/run", **options)
    assert store.failed == 8
    assert done["steps"] == 6
    assert [line["step"] for line in read_metrics(f"{bucket}/run", "eval")] == [3, 6]
    assert storage.exists(f"{bucket}/run/best.json")
    assert not (tmp_path / "home").exists()
