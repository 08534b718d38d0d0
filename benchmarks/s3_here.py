"""An S3 server on this machine, in a separate process: moto, which keeps objects in memory, behind a delaying proxy.

The proxy holds each message of a client for some time before it passes it on. A read is one small message, so each
waits once, as for a far server; answers come back at full speed. The proxy is for reading: an upload of many messages
would wait for each, and goes to moto directly.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BUCKET = "benchmark"


class Endpoints(NamedTuple):
    """URLs of the server itself and of the delaying proxy."""

    near: str
    late: str


@contextlib.contextmanager
def s3_server(latency_s: float) -> Iterator[Endpoints]:
    """Run a server with an empty bucket; the environment has its credentials, and `turn_to` selects the endpoint."""
    command = [sys.executable, str(Path(__file__).resolve()), str(latency_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            if len(words) != 2:
                raise SystemExit("the S3 server did not start; is moto[server] installed?")
            os.environ.update(
                AWS_ACCESS_KEY_ID="benchmark", AWS_SECRET_ACCESS_KEY="benchmark", AWS_DEFAULT_REGION="us-east-1"
            )
            endpoints = Endpoints(*words)
            turn_to(endpoints.near)
            import boto3

            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield endpoints
        finally:
            os.environ.pop("AWS_ENDPOINT_URL", None)
            process.kill()


def turn_to(endpoint: str) -> None:
    """Make this process, and those it starts, use this endpoint."""
    os.environ["AWS_ENDPOINT_URL"] = endpoint


async def proxy(host: str, port: int, latency_s: float, near: str) -> None:
    """Open the proxy and print its place; run until standard input, which the parent holds, ends."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(host, port)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(forward(reader, server_writer, latency_s), forward(server_reader, writer, 0.0))

    server = await asyncio.start_server(answer, host, 0)
    print(near, f"http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Forward each piece after the delay, and the end of the stream."""
    try:
        while data := await reader.read(2**20):
            if delay_s:
                await asyncio.sleep(delay_s)
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("latency", type=float, help="seconds for which the proxy holds a message")
    latency_s = options.parse_args().latency
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    asyncio.run(proxy(host, port, latency_s, f"http://{host}:{port}"))
    os._exit(0)  # threads of the server may still wait for connections


if __name__ == "__main__":
    main()
