"""A server before the S3 server of the tests, which fails on request: as stores fail that really are away."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWERS = {
    "expired": (403, "ExpiredToken", "The provided token has expired."),
    "region": (400, "AuthorizationHeaderMalformed", "The region 'us-east-1' is wrong; expecting 'eu-central-1'"),
    "moved": (301, "PermanentRedirect", "The bucket must be addressed using another endpoint."),
    "busy": (503, "SlowDown", "Please reduce your request rate."),
}


class FailingStore:
    """Hands requests on to ``upstream``, unless ``how`` is "silent" or a key of ANSWERS: for ``most`` requests."""

    def __init__(self, upstream: str) -> None:
        self.upstream, self.how, self.failed, self.most = upstream, "", 0, 10**9
        self.over = threading.Event()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

            def _handle(self) -> None:
                if store.failed == store.most:
                    store.how = ""
                if store.how:
                    store.failed += 1
                if store.how == "silent":
                    store.over.wait()
                    self.close_connection = True
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if store.how:
                    status, code, said = ANSWERS[store.how]
                    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{said}</Message></Error>"
                    self._answer(status, {"Content-Type": "application/xml"}, text.encode())
                    return
                request = urllib.request.Request(store.upstream + self.path, body or None, method=self.command)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "content-length", "expect"):
                        request.add_header(name, value)
                request.add_header("Content-Type", self.headers.get("Content-Type", "application/octet-stream"))
                try:
                    with urllib.request.urlopen(request) as answer:
                        self._answer(answer.status, dict(answer.headers), answer.read())
                except urllib.error.HTTPError as error:
                    self._answer(error.code, dict(error.headers), error.read())

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("connection", "content-length", "transfer-encoding", "date", "server"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        serve = {"target": self._server.serve_forever, "kwargs": {"poll_interval": 0.01}}
        threading.Thread(**serve, name="failing store", daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """End it, and what hangs in it."""
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
