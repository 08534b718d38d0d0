"""Checkpoints: checkpoints/step_XXXXXXXX/state.pt, which counts once its digest marker, written last, is there."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from typing import Any

import torch

from mimkd_ray import storage

logger = logging.getLogger(__name__)

MARKER = "committed.json"
STATE = "state.pt"


def _folder(run_dir: str, step: int) -> str:
    return storage.join(run_dir, "checkpoints", f"step_{step:08d}")


def save(run_dir: str, step: int, state: dict[str, Any], keep: int) -> str:
    """Commit a checkpoint and prune all but the newest ``keep``. Returns its URL. Called by rank 0 only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    folder = _folder(run_dir, step)
    storage.write_bytes(storage.join(folder, STATE), data)
    marker = {"step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    storage.write_bytes(storage.join(folder, MARKER), json.dumps(marker).encode())
    for old in _steps(run_dir)[:-keep]:
        if old != step:
            storage.remove_tree(_folder(run_dir, old))
    return folder


def load_latest(run_dir: str, device: torch.device) -> dict[str, Any] | None:
    """The newest committed and undamaged checkpoint, or None. Tensors only: ``weights_only`` refuses pickled code."""
    for step in reversed(_steps(run_dir)):
        folder = _folder(run_dir, step)
        marker_url = storage.join(folder, MARKER)
        if not storage.exists(marker_url):
            continue  # a kill came between state and marker: it was never a checkpoint
        marker = json.loads(storage.read_bytes(marker_url))
        data = storage.read_bytes(storage.join(folder, STATE))
        if hashlib.sha256(data).hexdigest() != marker["sha256"]:
            logger.warning("checkpoint %s does not match its digest (%d bytes); trying an older one", folder, len(data))
            continue
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return None


def _steps(run_dir: str) -> list[int]:
    names = [url.rstrip("/").rsplit("/", 1)[-1] for url in storage.list_dirs(storage.join(run_dir, "checkpoints"))]
    return sorted(int(name.removeprefix("step_")) for name in names if name.startswith("step_"))
