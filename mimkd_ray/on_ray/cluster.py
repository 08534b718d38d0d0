"""Joining the Ray that is named, or starting one of our own."""

from __future__ import annotations

from typing import Any

import ray

from mimkd_ray.errors import UserError
from mimkd_ray.on_ray.environment import cluster_address


def connect(configured: str, flag: str, state_api: bool = False, **options: Any) -> bool:
    """Join the cluster that ``configured`` (the value of ``flag``) or RAY_ADDRESS names, or start a Ray of our own.

    Returns whether it is our own, which ends with this process. ``state_api``: a Ray of our own serves it, as its
    dashboard does on loopback; Ray Train's clean-up actor asks it, and warns every few seconds where none answers.
    ``options`` go to ``ray.init``. Raises UserError if no cluster answers there.
    """
    address = cluster_address(configured)
    if not address:
        ray.init(
            address="local",
            include_dashboard=state_api,
            dashboard_host="127.0.0.1",
            logging_level="warning",
            **options,
        )
        return True
    try:
        ray.init(address=address, logging_level="warning", **options)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}): check {flag} or RAY_ADDRESS (host:port of the head, or "
            "`auto`), or unset both for a Ray of this process's own"
        ) from None
    return False


def disconnect() -> None:
    """Leave the cluster that this process is connected to; a Ray of our own ends with it."""
    ray.shutdown()
