"""Connection to a named Ray cluster, or to a Ray started by this process."""

from __future__ import annotations

import os
import re
import signal
import socket
from typing import Any

import grpc
import ray

from mimkd_ray import console
from mimkd_ray.errors import UserError
from mimkd_ray.on_ray.nodes.cluster_address import checked_address
from mimkd_ray.on_ray.nodes.stale_processes import end_failed_start, end_left_behind
from mimkd_ray.signals import handled

PATIENCE_S = 120
"""Seconds that the second try gives the first of Ray's processes; the first try gives 30."""
ANSWER_S = 6.0
"""Seconds for which nothing may answer at the address of a cluster: a head that restarts comes back in a few."""
CONNECT_S = 2.0
"""Seconds in which a connection is made where something listens."""


def connect(configured: str, flag: str, state_api: bool = False, **options: Any) -> bool:
    """Join the cluster that ``configured`` (the value of ``flag``) or RAY_ADDRESS names, or start Ray in this process.

    Returns True if Ray was started here; it then ends with this process. ``state_api``: a Ray started here serves the
    state API, through its dashboard on loopback; Ray Train's clean-up actor calls it, and warns every few seconds if
    there is no answer. ``options`` go to ``ray.init``. Raises UserError if no cluster answers at the address.
    """
    address = checked_address(configured)
    handler = signal.getsignal(signal.SIGTERM)
    # Of Ray's handlers one ends the process with status 1, and one, set in C, aborts it 3 seconds later.
    with handled({signal.SIGTERM: handler} if callable(handler) else {}):
        if not address:
            _start(include_dashboard=state_api, dashboard_host="127.0.0.1", logging_level="warning", **options)
            return True
        _knock(address, flag)
        try:
            ray.init(address=address, logging_level="warning", **options)
        except ConnectionError as error:
            raise _nobody(address, str(error), flag) from None
        return False


def _start(**options: Any) -> None:
    """Start Ray in this process; a second time, with more patience, if it does not come up. Raises UserError."""
    end_left_behind()
    try:
        ray.init(address="local", **options)
        return
    except Exception as error:  # Ray raises plain ones for what did not come up in time
        first = error
    ray.shutdown()
    end_failed_start()
    console.line(f"Ray did not start ({_line(first)}): trying once more, for up to {PATIENCE_S} s")
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(PATIENCE_S))
    try:
        ray.init(address="local", **options)
    except Exception as error:
        ray.shutdown()
        raise UserError(
            f"Ray did not start in two tries ({_line(error)}), perhaps because this machine is busy or short of memory "
            "or disk: free some, or pass --launch.backend local, which needs no Ray"
        ) from None


def _knock(address: str, flag: str) -> None:
    """Raise UserError if nothing takes calls at host:port or ray://host:port for ANSWER_S; other forms of address are
    Ray's business, and so is TLS. Ray itself waits for minutes for what accepts connections and says nothing."""
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if found is None or os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    host, port = found[1], int(found[2])
    if not 0 < port < 65536:
        raise _nobody(address, f"{port} is no port: ports are 1 to 65535, and that of a head is 6379 by default", flag)
    with grpc.insecure_channel(f"{host}:{port}", options=(("grpc.enable_http_proxy", 0),)) as channel:
        ready = grpc.channel_ready_future(channel)
        try:
            ready.result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            ready.cancel()
            raise _nobody(address, f"{_silence(host, port)}; waited {ANSWER_S:g} s", flag) from None


def _silence(host: str, port: int) -> str:
    """Return why gRPC finds nobody at an address, which it does not tell itself."""
    try:
        socket.create_connection((host.strip("[]"), port), CONNECT_S).close()
    except (OSError, UnicodeError) as error:  # the second: a name that cannot be one, such as a..b
        return _line(error)
    return "it accepts connections and does not speak gRPC, as a head of Ray does, by default at port 6379"


def _nobody(address: str, why: str, flag: str) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address} ({why}): check {flag} or RAY_ADDRESS (host:port of the head, or `auto`), "
        "or unset both for a Ray of this process's own"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
