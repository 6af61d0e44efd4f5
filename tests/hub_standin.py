"""The part of the hub's HTTP interface that an upload needs, on loopback: repositories, uploads and commits in memory.

What is asked for is not there, or (a name in `gated`) not for everybody.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Keeps what was uploaded: `repositories[name][path] = content`, and `private[name]`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        """Files that are stored by their sha256."""
        self.gated: set[str] = set()
        self.refuse = 0
        """HTTP status to answer everything with, if not 0."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that lives as long as the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, answer: object, status: int = 200, code: str = "") -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        if self.server.refuse:
            self._answer({"error": "refused"}, self.server.refuse)
        elif any(f"/{name}/" in f"{self.path}/" for name in self.server.gated):
            self._answer({"error": "Access is restricted"}, 403, "GatedRepo")
        else:
            self._answer({"error": "Repository not found"}, 401, "RepoNotFound")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.large[self.path.rsplit("/", 1)[-1]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body, path, hub = self._body(), self.path, self.server
        if hub.refuse:
            self._answer({"error": "refused"}, hub.refuse)
        elif path == "/api/repos/create":
            about = json.loads(body)
            name = "/".join(filter(None, (about.get("organization"), about["name"])))
            known = name in hub.repositories
            hub.private.setdefault(name, bool(about.get("private")) or about.get("visibility") == "private")
            hub.repositories.setdefault(name, {})
            self._answer({"url": f"{hub.url}/{name}"}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif re.match(r"/api/models/.*/preupload/", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in files
            ]
            self._answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            uploads = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}", "header": {}}}} for o in objects
            ]
            self._answer({"transfer": "basic", "objects": uploads})
        elif found := re.match(r"/api/models/(.*)/commit/", path):
            files = hub.repositories[found[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            self._answer({"commitUrl": f"{hub.url}/{found[1]}/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({"error": f"unknown {path}"}, 404)
