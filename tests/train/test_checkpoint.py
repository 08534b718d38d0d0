from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from mimkd_ray.train import checkpoint

CPU = torch.device("cpu")


def _save(run: Path, step: int, keep: int = 10) -> Path:
    return Path(checkpoint.save(str(run), step, {"step": step, "weights": torch.full((3,), float(step))}, keep))


def test_the_newest_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    weights = torch.randn(100)
    checkpoint.save(str(tmp_path), 3, {"step": 3, "weights": torch.zeros(1)}, 2)
    checkpoint.save(str(tmp_path), 12, {"step": 12, "weights": weights}, 2)
    state = checkpoint.load_latest(str(tmp_path), CPU)
    assert state is not None
    assert state["step"] == 12
    assert torch.equal(state["weights"], weights)


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_latest(str(tmp_path), CPU) is None


def test_without_its_marker_it_does_not_count(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (_save(tmp_path, 2) / checkpoint.MARKER).unlink()
    state = checkpoint.load_latest(str(tmp_path), CPU)
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
        state = checkpoint.load_latest(str(tmp_path), CPU)
    assert state is not None
    assert state["step"] == 1
    assert "step_00000002" in caplog.text


def test_old_ones_are_pruned(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]


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
        checkpoint.load_latest(str(tmp_path), CPU)
    assert not (tmp_path / "owned").exists()
