"""The way of a worker's error to the console: one line, a status, and no restart. tests/one_ray has it under Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mimkd_ray.cli import command_line, training
from mimkd_ray.cli.local_launch import pick_device
from mimkd_ray.config import LaunchConfig
from mimkd_ray.config.form.json_form import to_dict
from mimkd_ray.errors import DamagedDataError, Interrupted, NonFiniteLossError, UserError
from mimkd_ray.on_ray import train_workers, worker_context
from mimkd_ray.recipes import IMAGENET_RECIPES
from mimkd_ray.run_lock import InUse
from mimkd_ray.storage import AccessError, StorageError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("a flag"), 2),
        (InUse("a directory"), 2),
        (AccessError("no key"), 2),
        (DamagedDataError("an image"), 1),
        (NonFiniteLossError("at step 3"), 1),
        (StorageError("an object"), 1),
        (Interrupted("saved at step 7"), 3),
    ],
)
def test_every_error_that_a_worker_leaves_ends_the_job_with_its_message_and_status(
    error: Exception, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way of an error, without Ray: a worker leaves it, the controller ends the run, the driver raises it."""

    def fail(*_: object) -> None:
        raise error

    class Worker:
        launch_id, device = "this", torch.device("cpu")

        def over(self) -> None:
            """The job has ended here."""

    monkeypatch.setattr(worker_context, "RayContext", lambda *_: Worker())
    monkeypatch.setattr(train_workers, "run_job", fail)
    setup = {"launch_id": "this", "run_dir": str(tmp_path), "joined": True, "timeline": {}, "threads_given": True}
    setup["config"] = to_dict(IMAGENET_RECIPES["demo"]())
    if status == 3:
        train_workers.worker(setup)  # all workers end together: nothing has failed
    else:
        with pytest.raises(type(error)) as raised:
            train_workers.worker(setup)
        with pytest.raises(type(error)):
            train_workers.EndAtOnce().after_exception(None, {1: RuntimeError("lost its peer"), 0: raised.value})
    monkeypatch.setattr(training, "run", lambda _: train_workers._raise_known(str(tmp_path), "this"))
    assert command_line.main(IMAGENET_RECIPES, "demo", []) == status
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(error) in said
    train_workers.worker(setup)  # should Ray restart it all the same, it ends by itself
    train_workers._raise_known(str(tmp_path), "another start")


def test_what_a_restart_may_mend_is_left_to_ray() -> None:
    train_workers.EndAtOnce().after_exception(None, {0: RuntimeError("lost its peer"), 2: OSError("reset")})


def test_a_gpu_that_is_not_there_is_told_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"gpu is on, and PyTorch .* sees 0 GPUs .* pass --launch\.gpu off"):
        pick_device(LaunchConfig(gpu="on"), 0)
    assert pick_device(LaunchConfig(), 3).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(LaunchConfig(), 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"gpu is auto, .* sees 2 GPUs .* needs number 3: start fewer processes"):
        pick_device(LaunchConfig(), 2)
