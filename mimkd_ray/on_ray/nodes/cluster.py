"""Connection to a named Ray cluster, or to a Ray started by this process."""

from __future__ import annotations

import os
import re
import socket
import time
from typing import Any

import ray

from mimkd_ray import console
from mimkd_ray.errors import UserError
from mimkd_ray.on_ray.nodes.environment import cluster_address

PATIENCE_S = 120
"""Seconds that the second try gives the first of Ray's processes; the first try gives 30."""
ANSWER_S = 10.0
"""Seconds for which nothing may answer at the address of a cluster: a head that restarts comes back in a few."""
HTTP_2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a client of gRPC begins (RFC 9113, 3.4, with no settings); servers answer with their settings."""


def connect(configured: str, flag: str, state_api: bool = False, **options: Any) -> bool:
    """Join the cluster that ``configured`` (the value of ``flag``) or RAY_ADDRESS names, or start Ray in this process.

    Returns True if Ray was started here; it then ends with this process. ``state_api``: a Ray started here serves the
    state API, through its dashboard on loopback; Ray Train's clean-up actor calls it, and warns every few seconds if
    there is no answer. ``options`` go to ``ray.init``. Raises UserError if no cluster answers at the address.
    """
    address = cluster_address(configured)
    if not address:
        _start(include_dashboard=state_api, dashboard_host="127.0.0.1", logging_level="warning", **options)
        return True
    _knock(address, flag)
    try:
        ray.init(address=address, logging_level="warning", **options)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}): check {flag} or RAY_ADDRESS (host:port of the head, or "
            "`auto`), or unset both for a Ray of this process's own"
        ) from None
    return False


def _start(**options: Any) -> None:
    """Start Ray in this process; a second time, with more patience, if it does not come up. Raises UserError."""
    try:
        ray.init(address="local", **options)
        return
    except Exception as error:  # Ray raises plain ones for what did not come up in time
        first = error
    ray.shutdown()
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
    """Raise UserError if nothing answers at host:port or ray://host:port for ANSWER_S; other forms of address are Ray's
    business. Ray itself waits for minutes for what accepts connections and says nothing."""
    found = re.fullmatch(r"(?:ray://)?\[?([\w.:-]+?)\]?:(\d+)", address)
    if found is None:
        return
    until = time.monotonic() + ANSWER_S
    while True:
        try:
            with socket.create_connection((found[1], int(found[2])), timeout=ANSWER_S / 2) as head:
                head.sendall(HTTP_2)
                if head.recv(1) in (b"\0", b"\x15", b""):  # a frame of HTTP 2, or a refusal by TLS
                    return
                refused = OSError("a web server is there, and no head of Ray, whose port is 6379 by default")
        except (OSError, OverflowError) as error:
            refused = error if isinstance(error, OSError) else OSError(error)
        if time.monotonic() > until:
            raise UserError(
                f"no Ray cluster answers at {address} ({_line(refused)}): check {flag} or RAY_ADDRESS (host:port of "
                "the head, or `auto`), or unset both for a Ray of this process's own"
            ) from None
        time.sleep(ANSWER_S / 10)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def disconnect() -> None:
    """Leave the cluster that this process is connected to; a Ray started by this process ends."""
    ray.shutdown()
