"""A real HTTP server that answers the few requests of a push as the Hugging Face hub does, and keeps what was sent."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Hub:
    """A hub of its own.

    Attributes:
        address: where it listens.
        token: the one that it accepts.
        repositories: name -> private, files.
        refuse: path's pattern -> (status, message) that it answers instead.
        requests: everything that was asked, in order.
    """

    address: str = ""
    token: str = "hf_right"
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    def answer(self, asked: Request) -> tuple[int, Any]:
        """Status and JSON for a request."""
        for pattern, (status, message) in self.refuse.items():
            if re.search(pattern, asked.path):
                return status, {"error": message}
        if asked.method == "PUT":
            self.objects[asked.path.removeprefix("/lfs/")] = asked.body
            return 200, {}
        if asked.headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if asked.path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if asked.path == "/api/repos/create":
            return self._create(json.loads(asked.body))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit)/main)?", asked.path)
        if found and found[1] in self.repositories:
            act = {"preupload": self._modes, "commit": self._commit, None: self._info}[found[2]]
            return 200, act(found[1], asked.body)
        if asked.path.endswith(".git/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(asked.body))
        return 404, {"error": "Repository not found"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
        self.repositories[name] = {"private": asked["visibility"] == "private", "files": {}}
        return 200, {"url": f"{self.address}/{name}", "name": name, "id": "1"}

    def _modes(self, repository: str, body: bytes) -> Any:
        files = json.loads(body)["files"]
        modes = {True: "lfs", False: "regular"}
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
        }

    def _batch(self, asked: dict[str, Any]) -> Any:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}} for one in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repository: str, body: bytes) -> Any:
        files = self.repositories[repository]["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        return {"success": True, "commitUrl": f"{self.address}/{repository}/commit/1", "commitOid": "1" * 40}

    def _info(self, repository: str, body: bytes) -> Any:
        kept = self.repositories[repository]
        siblings = [{"rfilename": name} for name in (".gitattributes", *kept["files"])]
        return {"id": repository, "private": kept["private"], "siblings": siblings, "tags": [], "downloads": 0}


@contextlib.contextmanager
def listening() -> Iterator[Hub]:
    """A hub on a free port of this machine, until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            length, chunked = self.headers.get("Content-Length"), self.headers.get("Transfer-Encoding") == "chunked"
            body = self._chunks() if chunked else self.rfile.read(int(length or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Request(self.command, self.path, headers, body)
            hub.requests.append(asked)
            status, content = hub.answer(asked)
            sent = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            if status >= 400:
                self.send_header("X-Error-Message", content["error"])
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = do_HEAD = serve

        def _chunks(self) -> bytes:
            found = b""
            while length := int(self.rfile.readline(), 16):
                found += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def log_message(self, format: str, *values: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, name="hub", daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
