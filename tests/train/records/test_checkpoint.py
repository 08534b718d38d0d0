from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mimkd_ray.errors import UserError
from mimkd_ray.train.records import checkpoint
from mimkd_ray.train.records.run_files import is_ours

CPU = torch.device("cpu")


def _save(run: Path, step: int, keep: int = 10) -> Path:
    return Path(checkpoint.save(str(run), step, {"step": step, "weights": torch.full((3,), float(step))}, keep))


def _load_newest(run: Path) -> dict[str, Any] | None:
    found = checkpoint.newest(str(run))
    return None if found is None else checkpoint.parse(found[1], CPU)


def _steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in (run / "checkpoints").iterdir())


def test_the_newest_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    weights = torch.randn(100)
    checkpoint.save(str(tmp_path), 3, {"step": 3, "weights": torch.zeros(1)}, 2)
    checkpoint.save(str(tmp_path), 12, {"step": 12, "weights": weights}, 2)
    state = _load_newest(tmp_path)
    assert state is not None
    assert state["step"] == 12
    assert torch.equal(state["weights"], weights)


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(str(tmp_path)) is None


def test_without_its_marker_it_does_not_count(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (_save(tmp_path, 2) / checkpoint.MARKER).unlink()
    state = _load_newest(tmp_path)
    assert state is not None
    assert state["step"] == 1


def test_a_flipped_byte_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, 1)
    broken = _save(tmp_path, 2) / checkpoint.STATE
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING):
        state = _load_newest(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert "step_00000002" in caplog.text


def test_when_all_are_damaged_they_are_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {}
    for step, name in ((1, checkpoint.STATE), (2, checkpoint.MARKER)):
        folder = _save(tmp_path, step)
        (folder / name).write_bytes(b"cut")
        files |= {f"damaged_{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()}
    _save(tmp_path, 3).joinpath(checkpoint.MARKER).unlink()  # a kill: it was never one
    assert checkpoint.newest(str(tmp_path)) is None
    checkpoint.drop_after(str(tmp_path), 0)
    kept = tmp_path / "checkpoints"
    assert {str(file.relative_to(kept)): file.read_bytes() for file in kept.glob("*/*")} == files
    assert "is damaged, and training begins at step 0: it is kept as" in caplog.text
    assert all(is_ours(f"checkpoints/{name}") for name in files), "run.overwrite removes them"
    assert checkpoint.newest_step(str(tmp_path)) is None


def test_old_ones_are_pruned(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, keep=2)
    assert _steps(tmp_path) == [3, 4]


def test_what_never_counted_is_pruned_with_its_elders_and_does_not_push_others_out(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        _save(tmp_path, step)
    for step in (2, 4):
        (next((tmp_path / "checkpoints").glob(f"step_{step:08d}-*")) / checkpoint.MARKER).unlink()
    _save(tmp_path, 6, keep=3)  # those that count: 1, 3, 5, 6
    assert _steps(tmp_path) == [3, 4, 5, 6]


def test_two_attempts_at_one_step_do_not_touch_each_other(tmp_path: Path) -> None:
    """A worker that was given up for lost may still be writing when its successor saves the same step."""
    first, second = _save(tmp_path, 4), _save(tmp_path, 4)
    assert first != second
    (first / checkpoint.STATE).write_bytes(b"half of")
    assert _load_newest(tmp_path) is not None


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, order = threading.Event(), []
    save = checkpoint.save

    def slow_save(*arguments: Any) -> str:
        assert go.wait(20)
        order.append("saved")
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    writer = checkpoint.Writer(str(tmp_path), 2, lambda _: order.append("before"))
    weights = torch.zeros(3)
    writer.save(1, {"step": 1, "weights": weights, "nested": [{"own": weights}]})
    weights += 7  # the next step
    go.set()
    writer.wait()
    assert order == ["before", "saved"]
    state = _load_newest(tmp_path)
    assert state is not None
    assert state["weights"].tolist() == state["nested"][0]["own"].tolist() == [0, 0, 0]
    assert len(writer.stalls) == 1


def test_a_failed_write_is_raised_by_the_next_call_and_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    writer = checkpoint.Writer(str(tmp_path), 2, lambda _: None)
    writer.save(1, {"step": 1})
    with pytest.raises(UserError, match=r"cannot write .*checkpoints"):
        writer.wait()
    writer.wait()


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    """An attacker who can write to the bucket gets no code run, even with a right digest."""

    class Payload:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "owned").touch, ())

    import hashlib

    folder = _save(tmp_path, 1)
    torch.save({"step": 1, "x": Payload()}, folder / checkpoint.STATE)
    data = (folder / checkpoint.STATE).read_bytes()
    (folder / checkpoint.MARKER).write_text(json.dumps({"sha256": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(Exception, match=r"[Ww]eights"):
        _load_newest(tmp_path)
    assert not (tmp_path / "owned").exists()
