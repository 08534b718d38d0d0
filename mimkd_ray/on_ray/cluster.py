"""Connection to a named Ray cluster, or to a Ray started by this process."""

from __future__ import annotations

from typing import Any

import ray

from mimkd_ray.errors import UserError
from mimkd_ray.on_ray.environment import cluster_address


def connect(configured: str, flag: str, state_api: bool = False, **options: Any) -> bool:
    """Join the cluster that ``configured`` (the value of ``flag``) or RAY_ADDRESS names, or start Ray in this process.

    Returns True if Ray was started here; it then ends with this process. ``state_api``: a Ray started here serves the
    state API, through its dashboard on loopback; Ray Train's clean-up actor calls it, and warns every few seconds if
    there is no answer. ``options`` go to ``ray.init``. Raises UserError if no cluster answers at the address.
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
    """Leave the cluster that this process is connected to; a Ray started by this process ends."""
    ray.shutdown()
