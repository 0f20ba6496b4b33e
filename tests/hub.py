"""A server on loopback that speaks as much of the hub's API as downloads need, with one model in it."""

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/model"


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download needs, with one model; it refuses with `refusals` before it answers.

    So many requests for files as `busy_files` are answered 429. `gated` refuses files and still describes the model, as
    the hub does. `asked` are the requests, `sent` the bytes of files.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.refusals: list[tuple[int, Mapping[str, str]]] = []
        self.busy_files = 0
        self.gated: int | None = None
        self.knows_ranges = True
        self.asked: list[str] = []
        self.sent = 0


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        api, resolve = f"/api/models/{NAME}", f"/{NAME}/resolve/"
        if self.server.refusals:
            self._send(*self.server.refusals.pop(0))
        elif path.startswith(resolve):
            revision, _, file = path.removeprefix(resolve).partition("/")
            self._file(file) if revision in ("main", COMMIT) else self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.server.files.items()]
            self._json({"id": NAME, "sha": COMMIT, "siblings": siblings})
        elif path == f"{api}/tree/{COMMIT}":
            each = self.server.files.items()
            self._json([{"type": "file", "path": name, "size": len(text), "oid": name} for name, text in each])
        elif path.startswith(f"{api}/revision/"):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._send(401, {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        if self.server.gated:
            self._send(self.server.gated, {"X-Error-Code": "GatedRepo"})
            return
        if self.server.busy_files:
            self.server.busy_files -= 1
            self._send(429, {"Retry-After": "0"})
            return
        content, about = self.server.files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.server.knows_ranges:
            start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
            about["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._send(206, about, content[start:stop])
        else:
            self._send(200, about, content)

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: Mapping[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # a client that wants only the headers hangs up
                self.wfile.write(content)
            self.server.sent += len(content) if "ETag" in headers else 0

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the server; its address is `url`."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server
        server.shutdown()
