"""A small stand-in of the Hugging Face hub's HTTP interface: repositories are made, files are committed."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

TOKEN = "hf_stand_in"


class Hub:
    """What the stand-in has been given, and whom it refuses."""

    def __init__(self) -> None:
        self.repositories: list[str] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False
        self.asked: list[str] = []
        self.endpoint = ""


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, value: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            body = self.body()
            hub.asked.append(f"POST {self.path}")
            if hub.refuses or self.headers.get("Authorization") != f"Bearer {TOKEN}":
                said = "You don't have the rights to create a model under the namespace org"
                return self.answer({"error": said}, 403, (("X-Error-Message", said),))
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.repositories.append(name)
                return self.answer({"url": f"{hub.endpoint}/{name}", "name": name, "id": name})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if path.endswith("/preupload/main"):
                files = [
                    {"path": each["path"], "uploadMode": _mode(each["path"])} for each in json.loads(body)["files"]
                ]
                return self.answer({"files": [{**each, "shouldIgnore": False, "oid": None} for each in files]})
            if path.endswith("/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                return self.answer({"transfer": "basic", "objects": objects})
            if path.endswith("/commit/main"):
                for line in body.splitlines():
                    self.commit(json.loads(line))
                made = {"commitUrl": f"{hub.endpoint}/org/net/commit/0", "commitOid": "0", "hookOutput": ""}
                return self.answer(made)
            return self.answer({"error": f"no {path}"}, 404)

        def commit(self, line: dict[str, Any]) -> None:
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.files.pop(value["oid"])

        def do_PUT(self) -> None:
            hub.files[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_GET(self) -> None:
            hub.asked.append(f"GET {self.path}")
            self.answer({"sha": "0", "id": "org/net", "siblings": []})

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    return Handler


def _mode(path: str) -> str:
    return "regular" if path.endswith((".json", ".md")) else "lfs"


@pytest.fixture
def stand_in() -> Iterator[Hub]:
    hub = Hub()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as served:
        hub.endpoint = f"http://127.0.0.1:{served.server_address[1]}"
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        served.shutdown()
        thread.join()
