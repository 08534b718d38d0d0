"""The process group of workers on one machine, which find each other by a file.

Ray's own TorchConfig has them find each other by torch's TCPStore, which listens on every interface, has no token, and
cannot be told where to listen. This one is for a Ray that a run has started itself, whose workers are all here.
"""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray.train
import torch.distributed as dist
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from mimkd_ray.train.distributed import stay_here

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 30
"""For all workers to leave the group; after that Ray ends them."""


@dataclass
class OneMachine(TorchConfig):
    """What :class:`TorchConfig` is, with a local ``folder`` for the file. Each start of the workers has its own."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray calls when it starts and ends workers."""
        return ByFile


class ByFile(Backend):
    """What Ray calls when it starts and ends workers."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: OneMachine) -> None:
        """Form the group."""
        file = os.path.join(backend_config.folder, f"group-{uuid.uuid4().hex}")
        worker_group.execute(join, file, backend_config.backend, backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: OneMachine) -> None:
        """Dissolve it."""
        try:
            ray.get(worker_group.execute_async(leave), timeout=LEAVE_SECONDS)
        except GetTimeoutError:
            logger.warning("workers have not left their process group in %d s", LEAVE_SECONDS)


def join(file: str, backend: str, seconds: int) -> None:
    """Join the group of this worker, and set the environment that torchrun would set."""
    place = ray.train.get_context()
    device = ray.train.torch.get_device()
    os.environ.update(
        RANK=str(place.get_world_rank()),
        WORLD_SIZE=str(place.get_world_size()),
        LOCAL_RANK=str(place.get_local_rank()),
        LOCAL_WORLD_SIZE=str(place.get_local_world_size()),
        NODE_RANK=str(place.get_node_rank()),
        ACCELERATE_TORCH_DEVICE=str(device),  # of a user's own loop in Hugging Face's library
    )
    stay_here()
    dist.init_process_group(
        backend,
        init_method=f"file://{file}",
        rank=place.get_world_rank(),
        world_size=place.get_world_size(),
        timeout=timedelta(seconds=seconds),
    )


def leave() -> None:
    """Leave it, unless this worker never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
