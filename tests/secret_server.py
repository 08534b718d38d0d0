"""A server of weights that asks for a password and a signature, and a look for them where they must not be."""

from __future__ import annotations

import base64
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from safetensors.torch import save

from mimkd_ray.models.build_model import build_model

SECRETS = ("hunter2", "c2lnbmF0dXJl", "me:hun")


@pytest.fixture
def server() -> Iterator[str]:
    """host:port of a server that gives weights to whoever has the password and the signature."""
    weights = save({k: v.contiguous() for k, v in build_model("cifar/resnet8", 10).state_dict().items()})
    password = "Basic " + base64.b64encode(b"me:hunter2").decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            allowed = self.headers.get("Authorization") == password and "c2lnbmF0dXJl" in parse_qs(url.query)["sig"]
            found = url.path in ("/a/t.safetensors", "/a/other.safetensors")
            self.send_response((200 if found else 404) if allowed else 403)
            body = weights if allowed and found else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{made.server_address[1]}"
        made.shutdown()
        thread.join()


def url_of(server: str, file: str = "t.safetensors", more: str = "") -> str:
    return f"http://me:hunter2@{server}/a/{file}?sig=c2lnbmF0dXJl{more}"


def saved(folder: Path) -> bytes:
    """The bytes of all files below a folder, and their names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    assert paths
    return b"".join(str(path).encode() + path.read_bytes() for path in paths)


def no_secret_in(text: str | bytes) -> None:
    raw = text if isinstance(text, bytes) else text.encode()
    assert [secret for secret in SECRETS if secret.encode() in raw] == []
